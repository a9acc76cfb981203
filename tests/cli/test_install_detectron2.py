"""The recipe that builds detectron2, on a small tree in the shape of the published archive."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from maskdino.cli import install_detectron2

MODEL_ZOO = """\
import os
import pkg_resources


def get_config_file(config_path):
    return pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
"""
FILES = {
    "detectron2/__init__.py": "",
    "detectron2/data/__init__.py": "",
    "detectron2/data/transforms/__init__.py": "",
    "detectron2/data/transforms/transform.py": (
        "from PIL import Image\n\n\ndef warp(interp=Image.LINEAR):\n    return interp\n"
    ),
    "detectron2/evaluation/__init__.py": "",
    "detectron2/evaluation/fast_eval_api.py": (
        "from detectron2 import _C\n\n\nclass COCOeval_opt:\n    box = _C\n"
    ),
    "detectron2/evaluation/coco_evaluation.py": (
        "COCOeval = 'the slow one'\nfrom detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
    ),
    "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import TracingAdapter\n",
    "detectron2/export/api.py": "from caffe2.proto import caffe2_pb2\n",
    "detectron2/export/flatten.py": "TracingAdapter = 'traces'\n",
    "detectron2/masks.py": (
        "import numpy as np\n\nkinds = [np.bool, np.int, np.float, np.str, np.object]\n"
        "kept = [np.bool_, np.int64, np.float32, np.integer, np.floating]\n"
    ),
    "detectron2/model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
    "detectron2/model_zoo/model_zoo.py": MODEL_ZOO,
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "detectron2/projects/__init__.py": "",
    "projects/PointRend/point_rend/__init__.py": "NAME = 'point_rend'\n",
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    "setup.py": "raise RuntimeError('the original setup script must not run')\n",
}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The recipe as a module."""
    return install_detectron2


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A tree with every construct that the recipe changes."""
    root = tmp_path / "pb1-detectron2-0.6"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_changes_keep_other_numpy_types(recipe: ModuleType, sources: Path) -> None:
    report = recipe.apply_changes(sources)
    text = (sources / "detectron2/masks.py").read_text()
    assert "kinds = [bool, int, float, str, object]" in text
    assert "kept = [np.bool_, np.int64, np.float32, np.integer, np.floating]" in text
    assert report[1].startswith("5 x in 1 file(s)")


def test_changes_leave_nothing_removed(recipe: ModuleType, sources: Path) -> None:
    recipe.apply_changes(sources)
    assert "Image.BILINEAR" in (sources / "detectron2/data/transforms/transform.py").read_text()
    assert "pkg_resources" not in (sources / "detectron2/model_zoo/model_zoo.py").read_text()


def test_change_without_a_place_is_an_error(recipe: ModuleType, sources: Path) -> None:
    recipe.apply_changes(sources)
    with pytest.raises(recipe.BuildError, match=r"transform\.py matches .*LINEAR"):
        recipe.apply_changes(sources)


def test_wrong_archive_is_refused(recipe: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "other.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(recipe.BuildError, match=recipe.SOURCE_SHA256):
        recipe.check_hash(archive)


def test_hash_of_known_bytes(recipe: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "abc"
    archive.write_bytes(b"abc")
    recipe.check_hash(archive, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_archive_without_the_package(recipe: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "empty.tar.gz"
    tarfile.open(archive, "w:gz").close()
    with pytest.raises(recipe.BuildError, match="0 folders"):
        recipe.unpack(archive, tmp_path / "out")


def test_installed_detectron2_is_left_alone(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "installed_version", lambda: "0.6.1+other")
    monkeypatch.setattr(recipe, "build", lambda *_: pytest.fail("built in spite of it"))
    monkeypatch.setattr(sys, "argv", ["build_detectron2.py"])
    recipe.main()
    assert "detectron2 0.6.1+other is installed already" in capsys.readouterr().out


class Found:
    """A distribution in a folder."""

    def __init__(self, folder: Path, version: str, summary: str) -> None:
        self.folder, self.version, self.metadata = folder, version, {"Summary": summary}

    def locate_file(self, name: str) -> Path:
        return self.folder / name


@pytest.mark.parametrize(
    ("version", "ours", "expected"),
    [("0.6", True, None), ("0.6", False, "0.6"), ("0.7", False, "0.7"), (None, True, None)],
    ids=["earlier recipe", "of others", "newer", "this recipe"],
)
def test_only_builds_of_earlier_recipes_are_replaced(
    recipe: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    ours: bool,
    expected: str | None,
) -> None:
    (folder,) = importlib.util.find_spec("detectron2").submodule_search_locations
    found = Found(
        Path(folder).parent, version or recipe.VERSION, recipe.SUMMARY if ours else "detectron2"
    )
    monkeypatch.setattr(recipe.importlib.metadata, "distribution", lambda _: found)
    assert recipe.installed_version() == (expected if version else recipe.VERSION)


def test_source_tree_before_the_installed_one_is_left_alone(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Found(tmp_path, "0.6", recipe.SUMMARY)
    monkeypatch.setattr(recipe.importlib.metadata, "distribution", lambda _: found)
    monkeypatch.setattr(sys, "argv", ["build_detectron2.py", "--check"])
    with pytest.raises(SystemExit, match="False"):
        recipe.main()


def test_building_only_needs_a_folder(recipe: ModuleType) -> None:
    with pytest.raises(SystemExit):
        recipe.parse_arguments(["--no-install"])


def test_wheel_works(recipe: ModuleType, sources: Path, tmp_path: Path) -> None:
    """From archive to an importable package: contents, metadata and stand-in."""
    archive = tmp_path / "sources.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(sources, arcname=sources.name)
    root = recipe.unpack(archive, tmp_path / "unpacked")
    changes = recipe.apply_changes(root)
    recipe.write_build_files(root, changes)
    wheel = recipe.build_wheel(root, tmp_path / "wheels")

    assert wheel.name == f"detectron2-{recipe.VERSION}-py3-none-any.whl"
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as contents:
        contents.extractall(installed)
    metadata = (installed / f"detectron2-{recipe.VERSION}.dist-info" / "METADATA").read_text()
    assert "Requires-Dist: iopath>=0.1.7\n" in metadata
    assert "black" not in metadata
    assert all(line in metadata for line in changes)

    script = (
        "import os, detectron2._C as extension\n"
        "from detectron2.model_zoo import get_config_file\n"
        "from detectron2.projects.point_rend import NAME\n"
        "from detectron2.evaluation.coco_evaluation import COCOeval_opt\n"
        "assert COCOeval_opt == 'the slow one'\n"
        "from detectron2.export import TracingAdapter\n"
        "assert os.path.isfile(get_config_file('Base.yaml')), get_config_file('Base.yaml')\n"
        "assert NAME == 'point_rend' and not extension.has_cuda()\n"
        "try:\n"
        "    extension.nms_rotated()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "detectron2._C.nms_rotated was called" in result.stdout
