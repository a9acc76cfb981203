"""What is installed: names of requirements, and a wheel in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import maskdino
from maskdino import model_zoo
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = ("maskdino", "configs", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def test_requirements_are_those_of_the_package() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    extras = ("video", "export", "analysis", "dev")
    wanted = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    assert listed == wanted
    assert len({Requirement(line).name for line in listed}) == len(listed)


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", maskdino.__version__)
    assert PROJECT["dynamic"] == ["version"]
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {maskdino.__version__}\n" in citation


def test_citation_has_what_its_format_demands() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment with a wheel, made of a copy of the sources.

    What the project needs is found where the tests find it; the project itself is not.
    """
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = REPOSITORY / name
        skipped = shutil.ignore_patterns("*.so", "__pycache__")
        if path.is_dir():
            shutil.copytree(path, folder / "sources" / name, ignore=skipped)
        else:
            shutil.copy(path, folder / "sources" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    command = [*pip, "wheel", *options, "-w", str(folder), str(folder / "sources")]
    subprocess.run(command, check=True, env={**os.environ, "MASKDINO_BUILD_OPS": "0"})
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"maskdino-{maskdino.__version__}-py3-none-any.whl"
    venv.create(folder / "venv", with_pip=False)
    commands = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = next(commands.glob("python*"))
    subprocess.run([*pip, "--python", str(python), "install", *options, str(wheel)], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True)
    (Path(packages.stdout.strip()) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return commands


def run(installed: Path, folder: Path, *words: object) -> str:
    """Runs the command in an empty folder; returns what it printed."""
    environment = {**os.environ, "MASKDINO_DATASETS": str(REPOSITORY / "datasets")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [installed / "maskdino", *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_has_all_that_the_command_needs(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "--version") == f"maskdino {maskdino.__version__}\n"
    shown = run(installed, tmp_path, "doctor")
    assert str(installed.parent) in shown.splitlines()[0]
    assert "cpu: reference (the compiled library is not built" in shown
    assert "ADE20K" in run(installed, tmp_path, "prepare")
    code = """
from maskdino import model_zoo
lazy = model_zoo.get_config("lazy/coco_panoptic_R50")
print(len(model_zoo.list()), len(model_zoo.list(lazy=True)), len(lazy.model.is_thing))
"""
    python = next(installed.glob("python*"))
    counted = subprocess.run(
        [python, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True
    )
    expected = [len(model_zoo.list()), len(model_zoo.list(lazy=True)), 133]
    assert list(map(int, counted.stdout.split())) == expected
    (packed,) = installed.parent.rglob("site-packages/maskdino")
    for path in (REPOSITORY / "maskdino").rglob("*"):
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            assert (packed / path.relative_to(REPOSITORY / "maskdino")).is_file()


@pytest.mark.slow
def test_wheel_trains_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    keys = "SOLVER.MAX_ITER 2 SOLVER.STEPS () DATALOADER.NUM_WORKERS 0 DATASETS.TEST ()"
    config = "nuclei/instance/maskdino_tiny"
    run(installed, tmp_path, "train", "--config-file", config, *keys.split(), "OUTPUT_DIR", "out")
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert (tmp_path / "out" / "metrics.json").is_file()
