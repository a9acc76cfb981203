"""What tests bound of memory: sizes of tensors, and what a process held at most or holds now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

STATUS = Path("/proc/self/status")
ROOT = Path(__file__).parents[1]

needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="reads /proc of Linux")


class NewTensors(TorchDispatchMode):
    """Sizes of the tensors that operations make; views make none.

    Attributes:
        largest: bytes of the largest one.
        total: bytes of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors([args, kwargs])}
        for made in _tensors(out):
            storage = made.untyped_storage()
            if storage.data_ptr() not in given:
                self.largest = max(self.largest, storage.nbytes())
                self.total += storage.nbytes()
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def resident_mib() -> float:
    """Memory that this process holds."""
    return _status("VmRSS")


def most_resident_mib() -> float:
    """Memory that this process held at most."""
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == f"{name}:") / 1024


def in_child(module: str, *words: str, python: str = sys.executable) -> dict[str, Any]:
    """Runs a module of the tests in a process of its own; it prints one line of JSON at the end.

    `python` may be that of the fixture `warm_python` where the process is not measured as a whole.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-W", "ignore", "-m", module, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def one_thread() -> None:
    """Of torch, in a child: threads keep memory of their own."""
    torch.set_num_threads(1)
