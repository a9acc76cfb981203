"""Which GPUs the compiled library serves, and what setup.py builds it for: no GPU is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskdino.ops import _library, _triton
from maskdino.ops import ms_deform_attn as module

BUILT = ["sm_75", "sm_80", "sm_90a", "sm_100f", "sm_120", "compute_120"]
SERVED = [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]
NOT_SERVED = [(7, 0), (11, 0)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Compute capabilities of the GPUs that torch believes in, to be filled by the test."""
    capabilities: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(_library, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(_library, "_load", lambda: "")
    monkeypatch.setattr(_library, "cuda_architectures", lambda: BUILT)
    _library._lacks_code_for.cache_clear()
    yield capabilities
    _library._lacks_code_for.cache_clear()


def test_gpus_are_served_by_code_they_can_run(gpus: list[tuple[int, int]]) -> None:
    gpus += SERVED + NOT_SERVED
    served = [_library.serves("cuda", index) for index in range(len(gpus))]
    assert served == [True] * len(SERVED) + [False] * len(NOT_SERVED)
    assert _library.serves("cuda") and _library.serves("cpu")


def test_the_operator_is_chosen_for_each_gpu_by_itself(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus += [(9, 0), (7, 0)]
    monkeypatch.delenv("MASKDINO_OP", raising=False)
    monkeypatch.setattr(module, "_logged_choices", set())
    monkeypatch.setattr(_triton, "why_not", lambda _: "Triton is not installed")
    with caplog.at_level(logging.INFO, logger=module.__name__):
        choices = [module.choose_backend("cuda", "auto", index) for index in (0, 1, 0, 1)]
    assert choices == ["compiled", "reference"] * 2
    assert len(caplog.records) == 2 and "not for GPU 1" in caplog.records[1].message
    with pytest.raises(RuntimeError, match="asks for the compiled.*not for GPU 1"):
        module.choose_backend("cuda", "compiled", 1)


def test_code_for_one_gpu_alone_serves_no_other() -> None:
    assert _library._runs_on("sm_90a", 9, 0) and not _library._runs_on("sm_100a", 10, 3)
    assert not _library._runs_on("compute_90a", 10, 0) and _library._runs_on("compute_90", 10, 0)
    assert not _library._runs_on("sm_86", 8, 0) and not _library._runs_on("lto_90", 9, 0)


def test_what_a_gpu_lacks_is_told_with_the_remedy(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus += [(9, 0), (7, 0)]
    reason = _library.why_not("cuda", 1)
    assert "sm_75, sm_80" in reason and "GPU 1 of compute capability 7.0" in reason
    assert "TORCH_CUDA_ARCH_LIST=7.0" in reason and "setup.py build_ext" in reason
    monkeypatch.setattr(_library, "cuda_architectures", list)
    _library._lacks_code_for.cache_clear()
    assert _library.serves("cuda", 1)  # a library that does not say what it holds is tried


@pytest.mark.usefixtures("compiled")
def test_library_says_what_it_was_built_for() -> None:
    built = _library.cuda_architectures()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(
        "maskdino::ms_deform_attn_fused", "CUDA"
    )
    assert bool(built) == has_cuda
    assert all(name.startswith(("sm_", "compute_")) for name in built)


@pytest.mark.usefixtures("compiled")
def test_a_library_of_before_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = [x.partition("::") for x in torch._C._dispatch_get_all_op_names()]
    assert sorted(x[2] for x in known if x[0] == "maskdino") == sorted(_library.OPERATORS)
    library = Path("some/_C.so")
    _library._tell_of_missing(library)
    assert not caplog.records
    monkeypatch.setattr(_library, "OPERATORS", (*_library.OPERATORS, "of_tomorrow"))
    _library._tell_of_missing(library)
    (record,) = caplog.records
    assert f"{library} was built before this version: of_tomorrow run" in record.getMessage()
    assert "build_ext" in record.getMessage()


@pytest.mark.usefixtures("compiled")
def test_without_their_gradients_operators_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that was built while gradients were in Python: attention alone still has some."""
    assert all(_library.has(name) for name in _library.LEARNED)
    monkeypatch.setattr(_library, "_has_kernel", lambda _, key: key != "Autograd")
    assert not any(_library.has(name) for name in _library.LEARNED)
    assert _library.has("add_norm") and _library.serves("cpu")
    _library._tell_of_missing(Path("some/_C.so"))
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in _library.LEARNED)
    registered = []
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    monkeypatch.setattr(
        torch.library, "register_autograd", lambda name, *_, **__: registered.append(name)
    )
    _library._register()
    assert registered == ["maskdino::ms_deform_attn", "maskdino::ms_deform_attn_fused"]
