"""Which program this process is, and what must be settled before PyTorch is loaded.

Nothing of the package, and nothing but the standard library, is imported here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

VERSION = "0.2.0"
# Variables by which users decide how threads wait for work; where one is set, nothing is changed.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "1000"
NO_DETECTRON2 = (
    "maskdino needs detectron2, which is not installed: `maskdino doctor --install-detectron2` "
    "builds 0.6 for this PyTorch; or see https://github.com/facebookresearch/detectron2"
)
REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("tools", "demo", "datasets")  # folders of the repository


def is_command() -> bool:
    """Whether this process was started as `maskdino` or as `python -m maskdino`.

    A process that such a command starts, as a worker of a data loader, is none.
    """
    words = sys.orig_argv
    if sys.argv[:1] == ["-m"]:  # as long as Python looks for the module
        return any(
            option.startswith("-") and option.endswith("m") and name == "maskdino"
            for option, name in zip(words, words[1:], strict=False)
        )
    return bool(sys.argv) and Path(sys.argv[0]).stem == "maskdino" and sys.argv[0] in words


def is_script() -> bool:
    """Whether this process runs a file of the repository's tools."""
    if not sys.argv or not sys.argv[0].endswith(".py"):
        return False
    folder = Path(sys.argv[0]).resolve().parent
    return folder.parent == REPOSITORY and folder.name in SCRIPTS


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets threads that wait for work spin briefly, then sleep; before PyTorch is loaded.

    By default GNU's OpenMP spins for milliseconds. On a machine with nothing else to do that is
    harmless; beside one other busy process, it takes the cores from the threads that are waited
    for. What the user set is left alone.
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS


def leave_out_deprecations() -> None:
    """Leaves out what newer releases of PyTorch say of detectron2's and fvcore's scripted helpers.

    Users of our commands can do nothing about it; in programs of others it is shown.
    """
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", r"`torch\.jit\.", category)


def require_detectron2() -> None:
    """Raises an ImportError unless there is a detectron2, which no package index has."""
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(NO_DETECTRON2)
