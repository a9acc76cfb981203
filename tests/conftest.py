"""Fixtures shared by all tests; nothing here knows the model."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it does not wait for
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
PARITY = REPOSITORY / "tests" / "data" / "parity"


def load_module(path: Path) -> ModuleType:
    """Runs a file that belongs to no package, such as a tool, and returns it as a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch finds no CUDA device, and campaigns unless asked for.

    Those that ask for the fixture `device` run on MASKDINO_TEST_DEVICE, if it is set. Campaigns
    take minutes to hours: they run where ``-m`` names them. Files with slow tests come first, and
    coverage does not count what slow tests reach.
    """
    if "campaign" not in config.getoption("markexpr"):
        left = [item for item in items if item.get_closest_marker("campaign")]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if not item.get_closest_marker("campaign")]
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        item.add_marker("no_cover")  # counting lines makes tracing half as long again
    # Files with slow tests first: at the end of a run, all processes have short ones left.
    files = {item.path for item in slow}
    items.sort(key=lambda item: item.path not in files)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    elsewhere = "MASKDINO_TEST_DEVICE" in os.environ
    for item in items:
        if item.get_closest_marker("gpu") and not (elsewhere and "device" in item.fixturenames):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Stands for `sys.executable` where a start may be a short one; see `tests.warm_python`."""
    if sys.platform != "linux":
        yield sys.executable
        return
    from tests.warm_python import serving  # which needs what only POSIX has

    with serving(tmp_path_factory.mktemp("warm")) as program:
        yield program


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def parity() -> Path:
    """Folder of the parity cases and of the released parameter lists; see its README."""
    return PARITY


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """Finds data sets and videos that are not part of the repository.

    Returns:
        A function from path parts below the shared folder to the path, for example
        ``shared("data", "coco_mini")``. It skips the test where the path does not exist.
        The folder is ``$MASKDINO_SHARED``, or ``shared`` beside the repository.
    """
    folder = Path(os.environ.get("MASKDINO_SHARED") or REPOSITORY.parent / "shared")

    def find(*parts: str) -> Path:
        path = folder.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"{path} does not exist (set MASKDINO_SHARED to the shared folder)")
        return path

    return find


@pytest.fixture(scope="session")
def shared_dir(shared: Callable[..., Path]) -> Path:
    """The shared folder itself; skips the test where there is none."""
    return shared()
