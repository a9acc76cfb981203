#!/usr/bin/env python3
"""Build and install detectron2 0.6 for current PyTorch, NumPy and Pillow.

Detectron2 has no wheels for current PyTorch and its repository may be out of reach. The Python
sources of v0.6 are published on the package index as ``pb1-detectron2==0.6``. This recipe fetches
that archive, checks its hash, adapts the few lines that newer libraries reject, and builds a pure
Python wheel named ``detectron2``. The C++ extension is left out (its sources are not in the
archive): rotated boxes and detectron2's own deformable convolution raise an ``ImportError`` when
they are used, COCO evaluation runs in pycocotools; everything else works.

An installed detectron2, of whatever origin, is left alone; only what an earlier recipe of this
project built is replaced.

    python tools/build_detectron2.py                      build and install where it is missing
    python tools/build_detectron2.py --check              exit status 1 where that would be done
    python tools/build_detectron2.py --wheel-dir DIR      also keep the wheel, and print its path
    python tools/build_detectron2.py --wheel-dir DIR --no-install    only build
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE_REQUIREMENT = "pb1-detectron2==0.6"
SOURCE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# The archive names an optional dependency by URL. Recent pip declines to handle such an archive
# at all, even to save it without dependencies. The build drops that dependency, so the archive is
# saved with this release, which is put in a temporary folder and used for nothing else.
DOWNLOADER_REQUIREMENT = "pip==25.0.1"

# The second recipe: COCO evaluation without the extension. A change of the recipe counts this up.
VERSION = "0.6+maskdino.2"
SUMMARY = "Detectron2 v0.6, adapted to current libraries, without the C++ extension"

# What detectron2 0.6 imports, without its exact pins on black and iopath: black only formats
# exported Python configs, and iopath 0.1.10 is what current fvcore wants.
DEPENDENCIES = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1",
    "packaging",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

PYPROJECT = """\
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{version}"
description = "{summary}"
readme = {{ text = '''{changes}''', content-type = "text/plain" }}
license = {{ text = "Apache-2.0" }}
urls = {{ Homepage = "https://github.com/facebookresearch/detectron2" }}
requires-python = ">=3.8"
dependencies = {dependencies}

[tool.setuptools]
packages = {packages}
package-dir = {{ {package_dirs} }}
include-package-data = false

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""

# Sub-projects that detectron2 ships inside its own package, and where their sources lie.
PROJECTS = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

EXTENSION_STAND_IN = '''\
"""Stand-in for detectron2's C++ extension, which is not part of this build."""


def get_compiler_version():
    return "none (built without the C++ extension)"


def get_cuda_version():
    return "none (built without the C++ extension)"


def has_cuda():
    return False


def __getattr__(name):
    # Dunder names are asked for by the import system and by copying: they must stay ordinary.
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"detectron2._C.{name} was called, but this detectron2 was built without its C++ "
        "extension (rotated boxes, detectron2's deformable convolution, fast COCO evaluation). "
        "Install detectron2 from its own sources to use it."
    )
'''


class BuildError(RuntimeError):
    """A step of the build failed; the message says which and what to do."""


@dataclass(frozen=True)
class Change:
    """One kind of replacement in the sources, as ``re.sub`` makes it in all files of a glob.

    The pattern must match at least once over all of them.
    """

    reason: str
    files: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]


CHANGES = (
    Change(
        reason="Pillow 10 removed Image.LINEAR, the old name of Image.BILINEAR",
        files="detectron2/data/transforms/transform.py",
        pattern=r"\bImage\.LINEAR\b",
        replacement="Image.BILINEAR",
    ),
    Change(
        reason="NumPy 1.24 removed its aliases of Python's own types",
        files="detectron2/**/*.py",
        pattern=r"\bnp\.(bool|int|float|str|object)\b",
        replacement=r"\1",
    ),
    Change(
        reason="current setuptools no longer has pkg_resources: join the path instead",
        files="detectron2/model_zoo/model_zoo.py",
        pattern=r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo",\s*',
        replacement="os.path.join(os.path.dirname(os.path.abspath(__file__)), ",
    ),
    Change(
        reason="current setuptools no longer has pkg_resources",
        files="detectron2/model_zoo/model_zoo.py",
        pattern=r"^import pkg_resources\n",
        replacement="",
    ),
    Change(
        reason="the stand-in of the extension ends the import of what needs it",
        files="detectron2/evaluation/fast_eval_api.py",
        pattern=r"^from detectron2 import _C$",
        replacement=r"\g<0>\n\n_C.InstanceAnnotation",
    ),
    Change(
        reason="where the extension is missing, COCO evaluation runs in pycocotools",
        files="detectron2/evaluation/coco_evaluation.py",
        pattern=r"^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt$",
        replacement=r"try:\n    \g<0>\nexcept ImportError:\n    COCOeval_opt = COCOeval\n",
    ),
    Change(
        reason="current torch has no caffe2, which tracing and counting operations do not need",
        files="detectron2/export/__init__.py",
        pattern=r"^from \.api import \*$",
        replacement=r"try:\n    \g<0>\nexcept ImportError:\n    pass",
    ),
)


def run(
    command: Sequence[str | Path], *, step: str, environment: dict[str, str] | None = None
) -> None:
    """Run a command; BuildError with the last lines that it printed if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-30:])
        raise BuildError(f"{step} failed (exit status {result.returncode}):\n{tail}")


def check_hash(archive: Path, expected: str = SOURCE_SHA256) -> None:
    """Raise ``BuildError`` unless the SHA-256 of ``archive`` is ``expected`` (hexadecimal)."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != expected:
        raise BuildError(
            f"{archive} has sha256 {found}, expected {expected}: it is not the archive this "
            "recipe was written for. Delete it and fetch it again."
        )


def fetch_sources(folder: Path) -> Path:
    """Save the source archive with pip into ``folder`` and return its path.

    pip runs the archive's setup script to read its name, and that script imports torch; hence the
    hash stands in the requirement (pip checks it first) and torch must be installed.

    Raises:
        BuildError: torch or setuptools is missing, or pip failed.
    """
    for module in ("torch", "setuptools"):
        if importlib.util.find_spec(module) is None:
            raise BuildError(
                f"{module} is not installed in {sys.prefix}; detectron2 needs it to be built. "
                "Run: pip install -r requirements.txt"
            )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SOURCE_REQUIREMENT} --hash=sha256:{SOURCE_SHA256}\n")
    downloader = folder / "downloader"
    run(
        (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
        + ("--target", downloader, DOWNLOADER_REQUIREMENT),
        step=f"fetching {DOWNLOADER_REQUIREMENT}",
    )
    run(
        (sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation")
        + ("--no-binary", ":all:", "--require-hashes", "-r", requirements, "--dest", folder),
        step=f"fetching {SOURCE_REQUIREMENT}",
        environment={"PYTHONPATH": str(downloader)},
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack ``archive`` into ``folder`` and return the folder that holds ``detectron2/``."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    roots = [path.parent for path in folder.glob("*/detectron2")]
    if len(roots) != 1:
        raise BuildError(f"{archive} holds {len(roots)} folders */detectron2, expected one")
    return roots[0]


def apply_changes(root: Path) -> list[str]:
    """Apply ``CHANGES`` to the sources under ``root``.

    Returns:
        One line per change: how often and in how many files it was made, and why.

    Raises:
        BuildError: a change matches nothing, that is, the sources are not the expected ones.
    """
    report = []
    for change in CHANGES:
        places = files = 0
        for path in sorted(root.glob(change.files)):
            text, count = re.subn(
                change.pattern, change.replacement, path.read_text(), flags=re.MULTILINE
            )
            if count:
                path.write_text(text)
                places, files = places + count, files + 1
        if places == 0:
            raise BuildError(f"nothing in {change.files} matches {change.pattern!r}")
        report.append(f"{places} x in {files} file(s): {change.reason}")
    return report


def write_build_files(root: Path, changes: list[str]) -> None:
    """Replace the archive's setup script, which would compile, and its extension by our own."""
    (root / "detectron2" / "_C.py").write_text(EXTENSION_STAND_IN)
    for name in ("setup.py", "setup.cfg"):
        (root / name).unlink(missing_ok=True)
    packages = [
        ".".join(path.parent.relative_to(root).parts)
        for path in sorted((root / "detectron2").rglob("__init__.py"))
        if "configs" not in path.relative_to(root).parts
    ]
    text = PYPROJECT.format(
        version=VERSION,
        summary=SUMMARY,
        changes="Detectron2 v0.6 with these changes:\n" + "\n".join(f"* {c}" for c in changes),
        dependencies=list(DEPENDENCIES),
        packages=packages + list(PROJECTS),
        package_dirs=", ".join(f'"{name}" = "{folder}"' for name, folder in PROJECTS.items()),
    )
    (root / "pyproject.toml").write_text(text)


def build_wheel(root: Path, folder: Path) -> Path:
    """Build the wheel of the sources under ``root`` into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    run(
        (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
        + ("--wheel-dir", folder, root),
        step="building the detectron2 wheel",
    )
    (wheel,) = folder.glob(f"detectron2-{VERSION}-*.whl")
    return wheel


def installed_version() -> str | None:
    """Version of the detectron2 that this Python finds; nothing is imported.

    Returns:
        None where there is none, or one that an earlier recipe built.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        return None
    try:
        found = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"  # a source tree on PYTHONPATH has no metadata
    if str(found.locate_file("detectron2")) not in (spec.submodule_search_locations or ()):
        return "of unknown version"  # a source tree, or an editable installation, comes first
    is_earlier = found.metadata["Summary"] == SUMMARY and found.version != VERSION
    return None if is_earlier else found.version


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sdist", type=Path, help="use this copy of the archive, fetch nothing")
    add("--wheel-dir", type=Path, help="keep the wheel in this folder")
    add("--no-install", action="store_true", help="only build; needs --wheel-dir")
    add("--check", action="store_true", help="only tell whether all is there")
    options = parser.parse_args(arguments)
    if options.no_install and options.wheel_dir is None:
        parser.error("--no-install without --wheel-dir would leave nothing")
    return options


def build(options: argparse.Namespace, folder: Path) -> Path:
    """Fetch, check, adapt and build inside the temporary ``folder``; return the wheel's path."""
    archive = options.sdist or fetch_sources(folder)
    check_hash(archive)
    root = unpack(archive, folder)
    changes = apply_changes(root)
    changes.append("detectron2._C is a Python stand-in that raises when it is used")
    print("\n".join(f"  {line}" for line in changes))
    write_build_files(root, changes)
    return build_wheel(root, options.wheel_dir or folder / "wheel")


def main(words: list[str] | None = None) -> None:
    """Build and install, unless detectron2 is there already."""
    options = parse_arguments(words)
    version = installed_version()
    if options.check:
        sys.exit(version is None)
    if version is not None and not options.no_install:
        print(f"detectron2 {version} is installed already; it is left as it is")
        return
    with tempfile.TemporaryDirectory(prefix="build_detectron2_") as folder:
        wheel = build(options, Path(folder))
        if options.wheel_dir is not None:
            print(f"wheel: {wheel.resolve()}")
        if not options.no_install:
            run(
                [sys.executable, "-m", "pip", "install", wheel],
                step="installing the detectron2 wheel and what it needs",
            )
            print(f"installed detectron2 {VERSION} into {sys.prefix}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"build_detectron2: {error}")
