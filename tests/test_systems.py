"""Systems and releases that are not at hand, through what they lack or do otherwise."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskdino.custom import plan
from maskdino.ops.ms_deform_attn import compiled_op_available
from tests.helpers import drawn_batch, tiny_model

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


def test_every_module_imports_without_what_only_posix_has(
    repository: Path, warm_python: str
) -> None:
    command = [warm_python, "-W", "ignore", "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 0.0


def test_free_memory_is_assumed_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(plan.os, "sysconf_names")
    monkeypatch.setattr(plan.Path, "is_file", lambda _: False)
    assert plan._free_memory_mb() == plan.ASSUMED_FREE_MB


ON_OLD_PROCESSORS = """
import torch
from maskdino.ops import ms_deform_attn as ops

generator = torch.Generator().manual_seed(0)
value = torch.rand(1, 54, 2, 32, generator=generator)
locations = torch.rand(1, 5, 2, 2, 4, 2, generator=generator)
weights = torch.rand(1, 5, 2, 2, 4, generator=generator)
arguments = (value, [(6, 7), (3, 4)], locations, weights)
computed = ops.ms_deform_attn(*arguments, backend="compiled")
torch.testing.assert_close(computed, ops.ms_deform_attn_reference(*arguments))
print(torch.ops.maskdino.cpu_instruction_set())
"""


@pytest.mark.skipif(not compiled_op_available("cpu"), reason="the operator is not built")
@pytest.mark.parametrize("newest", ["plain", "avx2", "avx512"])
def test_operator_on_processors_without_newer_instructions(
    repository: Path, newest: str, warm_python: str
) -> None:
    """Where a processor has less than is allowed, it takes what it has."""
    environment = {**os.environ, "MASKDINO_CPU_CAPABILITY": newest}
    command = [warm_python, "-W", "ignore", "-c", ON_OLD_PROCESSORS]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    allowed = ["plain", "AVX2", "AVX-512"][: ["plain", "avx2", "avx512"].index(newest) + 1]
    assert done.stdout.split()[-1] in allowed


class WithoutDoubles(TorchDispatchMode):
    """Refuses what Apple's GPUs cannot hold: tensors in float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        found = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        assert not any(x.dtype == torch.float64 for x in found), function
        return result


def test_devices_without_float64_train_and_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS: the operator's PyTorch form, and no float64 on the way."""
    monkeypatch.setenv("MASKDINO_OP", "reference")
    overrides = {f"TEST__{task}_ON": True for task in ("INSTANCE", "PANOPTIC", "SEMANTIC")}
    model = tiny_model(**overrides)
    batch = drawn_batch([(60, 90), (64, 64)], (3, 0))
    with WithoutDoubles():
        sum(model.train()(batch).values()).backward()
        with torch.no_grad():
            results = model.eval()(batch)
    assert [set(result) for result in results] == [{"instances", "panoptic_seg", "sem_seg"}] * 2
