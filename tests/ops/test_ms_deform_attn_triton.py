"""The Triton form against one obvious loop: by Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
import torch

from maskdino.ops import _library, _triton
from maskdino.ops import ms_deform_attn as module
from maskdino.ops.ms_deform_attn import ms_deform_attn_fused
from tests.ops import triton_checks as checks
from tests.ops.deform_attn_cases import Case
from tests.ops.triton_checks import TEXTBOOK, Form

BASE = Case(shapes=((4, 6), (3, 2), (1, 1)), channels=8, heads=2)
# Several tiles of queries; padded points and channels; many points; hardly any channel.
CASES = [
    Case(shapes=((6, 9), (2, 3)), channels=32, heads=1, images=1, queries=19),
    Case(shapes=((4, 5), (1, 3), (3, 1), (1, 1)), points=3, channels=30, heads=2, images=1),
    Case(shapes=((3, 4), (2, 2)), points=8, channels=64, heads=1, images=1),
    Case(shapes=((3, 4), (1, 2)), points=1, channels=71, heads=1, images=1),
    Case(shapes=((2, 3),), points=5, channels=1, heads=3, queries=3),
]
MOST_LEVELS = Case(
    shapes=tuple((1 + i % 3, 1 + i // 5) for i in range(16)), points=1, heads=1, images=1
)
FORMS = [TEXTBOOK, None, 2, 4]
DTYPES = list(checks.TOLERANCE)
# On a GPU every combination is compiled, which takes seconds: each form, dtype and size once.
GPU_CASES = [
    *((BASE, torch.float32, form) for form in FORMS),
    (BASE, torch.bfloat16, None),
    (BASE, torch.bfloat16, 4),
    (BASE, torch.float16, 2),
    (CASES[0], torch.bfloat16, None),
    (CASES[1], torch.float32, 4),
    (CASES[2], torch.bfloat16, 2),
    (CASES[3], torch.float16, TEXTBOOK),
    (CASES[4], torch.float32, None),
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton's kernels are interpreted, one operation of NumPy after another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            pool.submit(int).result()  # starts the process, which keeps the environment
        yield pool


Run = Callable[..., None]


@pytest.fixture
def interpret(interpreter: ProcessPoolExecutor) -> Run:
    """Calls a check in the interpreter's process."""
    return lambda check, *arguments: interpreter.submit(check, *arguments, "cpu").result()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Calls a check: in the interpreter's process, or here on a GPU."""
    if request.param == "cuda":
        return lambda check, *arguments: check(*arguments, "cuda")
    return request.getfixturevalue("interpret")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, form: Form, interpret: Run) -> None:
    interpret(checks.check_form, BASE, dtype, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_size(case: Case, form: Form, interpret: Run) -> None:
    interpret(checks.check_form, case, torch.float32, form)


@pytest.mark.parametrize("form", [TEXTBOOK, 2])
def test_sixteen_levels(form: Form, interpret: Run) -> None:
    interpret(checks.check_form, MOST_LEVELS, torch.float32, form)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype", "form"), GPU_CASES, ids=str)
def test_gpu_computes_the_same(case: Case, dtype: torch.dtype, form: Form) -> None:
    checks.check_form(case, dtype, form, "cuda")


def test_borders(run: Run) -> None:
    run(checks.check_borders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -3e9])
def test_locations_without_meaning(bad: float, dtype: torch.dtype, run: Run) -> None:
    run(checks.check_locations_without_meaning, bad, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_any_number_in_fused_forms(bad: float, run: Run) -> None:
    run(checks.check_any_number_in_fused_forms, bad)


def test_nan_pixels(run: Run) -> None:
    run(checks.check_nan_pixels)


@pytest.mark.parametrize(
    ("form", "dtype"), [(TEXTBOOK, torch.bfloat16), (None, torch.float32)], ids=str
)
def test_fixed_point_sums(form: Form, dtype: torch.dtype, run: Run) -> None:
    run(checks.check_fixed_point_sums, form, dtype)


@pytest.mark.parametrize("name", ["images", "queries", "heads", "channels"])
def test_empty(name: str, run: Run) -> None:
    run(checks.check_empty, name)


def test_strides(interpret: Run) -> None:
    interpret(checks.check_strides)


@pytest.mark.parametrize("form", FORMS)
def test_registration(form: Form, interpret: Run) -> None:
    interpret(checks.check_registration, form)


def test_whole_graph(run: Run) -> None:
    run(checks.check_whole_graph)


def test_entry_points(run: Run) -> None:
    run(checks.check_entry_points)


def test_choice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Compiled, then Triton, then PyTorch; each with the reason, once."""
    monkeypatch.delenv("MASKDINO_OP", raising=False)
    monkeypatch.setattr(module, "_logged_choices", set())
    monkeypatch.setattr(_library, "serves", lambda *_: False)
    monkeypatch.setattr(_library, "_load", lambda: "no library here")
    monkeypatch.setattr(_triton, "why_not", lambda *_: "")
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert [module.choose_backend("cuda", "auto") for _ in range(3)] == ["triton"] * 3
        assert caplog.messages == [
            "deformable attention on cuda: triton operator (no library here)"
        ]
        assert module.choose_backend("cpu", "auto") == "reference"
        assert module.choose_backend("cuda", "reference") == "reference"
        caplog.clear()
        monkeypatch.setattr(_triton, "why_not", lambda *_: "no compiler")
        monkeypatch.setattr(module, "_logged_choices", set())
        assert module.choose_backend("cuda", "auto") == "reference"
        assert "reference operator (no library here; no compiler)" in caplog.text
    with pytest.raises(RuntimeError, match="backend asks for the Triton operator.*no compiler"):
        module.choose_backend("cuda", "triton")
    monkeypatch.setenv("MASKDINO_OP", "triton")
    with pytest.raises(RuntimeError, match="MASKDINO_OP asks for the Triton.*no compiler"):
        module.choose_backend("cuda", "auto")
    monkeypatch.setattr(_library, "serves", lambda *_: True)
    monkeypatch.setattr(_triton, "why_not", lambda *_: "")
    assert module.choose_backend("cuda", "auto") == "triton"
    monkeypatch.delenv("MASKDINO_OP")
    assert module.choose_backend("cuda", "auto") == "compiled"
    assert module.choose_backend("cuda", "triton") == "triton"


def test_a_cpu_needs_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="Triton operator, but.*TRITON_INTERPRET=1"):
        module.choose_backend("cpu", "triton")


def test_old_gpus_have_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    old = torch.device("cuda", 0)

    def choose(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x + 1 if _triton.takes(dtype, old, 32, 4, 4) else x - 1

    for function in (choose, torch.compile(choose, backend="eager", fullgraph=True)):
        assert function(torch.zeros(1), torch.bfloat16).item() == -1
        assert function(torch.zeros(1), torch.float16).item() == 1


def test_a_broken_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> None:
        raise RuntimeError("Failed to find C compiler.\nSecond line")

    monkeypatch.setattr(_triton.importlib, "import_module", fails)
    reason = _triton.why_not.__wrapped__("cuda")
    assert reason == "Triton does not work here (RuntimeError: Failed to find C compiler.)"


@pytest.mark.gpu
def test_gpu_chooses_triton_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKDINO_OP", raising=False)
    monkeypatch.setattr(_library, "serves", lambda *_: False)
    monkeypatch.setattr(_library, "_load", lambda: "no library here")
    assert module.choose_backend("cuda", "auto") == "triton"


@pytest.mark.gpu
def test_gpu_waits_for_nothing() -> None:
    case = Case(channels=32)
    leaves = [t.cuda().requires_grad_() for t in checks.inputs_of(case, torch.bfloat16, 4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = ms_deform_attn_fused(
            leaves[0], case.shapes, leaves[1], leaves[2], case.points, "triton"
        )
        output.backward(torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_capture() -> None:
    case = Case(channels=32)
    tensors = [t.cuda() for t in checks.inputs_of(case, torch.bfloat16, None)]
    expected = checks.call(case, None, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = checks.call(case, None, tensors)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected) and output.any()


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_more_elements_than_32_bits_count() -> None:
    """A map of 4 GiB, and queries that look at its last lines, against these lines alone."""
    lines, height, width, heads, channels = 4, 2897, 2900, 8, 32
    small = Case(((lines, width),), images=1, queries=3, heads=heads, channels=channels, points=2)
    value, locations, weights = (
        t.cuda() for t in checks.inputs_of(small, torch.bfloat16, TEXTBOOK)
    )
    locations = locations.clamp(0.2, 0.9)
    large = torch.zeros(1, height * width, heads, channels, dtype=torch.bfloat16, device="cuda")
    assert large.numel() > 2**31
    large[:, -lines * width :] = value
    x, y = locations.double().unbind(-1)
    in_map = torch.stack((x, (y * lines + height - lines) / height), dim=-1).float()
    operators = checks.operators()
    grad = torch.randn(1, 3, heads * channels, device="cuda").bfloat16()
    wide = (large, [height, width], in_map, weights)
    narrow = (value, [lines, width], locations, weights)
    checks.assert_close(
        operators.ms_deform_attn(*wide), operators.ms_deform_attn(*narrow).cpu(), 2e-2
    )
    grads = operators.ms_deform_attn_backward(grad, *wide)
    expected = operators.ms_deform_attn_backward(grad, *narrow)
    assert not grads[0][:, : -lines * width].any() and grads[0].any()
    checks.assert_close(grads[0][:, -lines * width :], expected[0].cpu(), 2e-2)
    checks.assert_close(grads[2], expected[2].cpu(), 2e-2)
