"""Systems and releases that are not at hand, through what they lack or do otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from maskdino.custom import plan

IMPORT_ALL = """
import importlib, os, pkgutil, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("resource", "fcntl", "pwd", "grp", "termios"):
            raise ModuleNotFoundError(name)

# What these import is theirs.
import multiprocessing, torch, detectron2.engine, detectron2.evaluation

for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
for name in ("sysconf", "sysconf_names"):
    vars(os).pop(name, None)
import maskdino
for module in pkgutil.walk_packages(maskdino.__path__, "maskdino."):
    if not module.name.endswith("._C") and "triton" not in module.name:
        importlib.import_module(module.name)
from maskdino.engine.hooks import peak_memory_mb
print(peak_memory_mb(torch.device("cpu")))
"""


def test_every_module_imports_without_what_only_posix_has(repository: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 0.0


def test_free_memory_is_assumed_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(plan.os, "sysconf_names")
    monkeypatch.setattr(plan.Path, "is_file", lambda _: False)
    assert plan._free_memory_mb() == plan.ASSUMED_FREE_MB
