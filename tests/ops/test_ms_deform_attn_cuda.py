"""The CUDA kernels of deformable attention against the CPU's: on a GPU, and emulated without one.

The emulation (``emulated_cuda/``) compiles the kernels as they stand for the CPU and runs every
CUDA thread as a coroutine. It shows that arithmetic, indexing and barriers are right, not speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from maskdino.ops.ms_deform_attn import ms_deform_attn_fused
from tests.ops.deform_attn_cases import Case

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
# Head sizes for each vector path of each dtype and for the general path; a level of several tiles;
# two heads side by side in a block; offsets whose x and y are not aligned as a pair.
CASES = [
    Case(shapes=((9, 17), (2, 3)), channels=32, heads=2, images=1, queries=19),
    Case(shapes=((5, 3), (1, 1)), channels=16, heads=1, points=3, queries=5),
    Case(shapes=((4, 4),), channels=64, heads=1, points=8, images=1),
    Case(shapes=((3, 4), (1, 2), (2, 1)), channels=71, heads=1, points=1, images=1),
    Case(shapes=((5, 2), (1, 4)), channels=128, heads=2, points=2, images=1),
    Case(shapes=((3, 2),), channels=32, heads=1, points=3, queries=4),
    Case(shapes=((9, 4), (2, 3)), channels=16, heads=2, images=1, queries=20),
]
Results = list[Tensor]


def run(operators: object, case: Case, dtype: torch.dtype, device: str = "cpu") -> Results:
    """Run all four operators on the same random inputs and return everything they return."""
    torch.manual_seed(0)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    value = case.value(dtype).to(device)
    textbook = [t.to(device) for t in (case.locations(arithmetic), case.weights(arithmetic))]
    width = case.heads * case.channels
    grad = torch.randn(case.images, case.queries, width).to(device, dtype)
    results = [operators.ms_deform_attn(value, case.flat_shapes, *textbook)]
    results += operators.ms_deform_attn_backward(grad, value, case.flat_shapes, *textbook)
    for size in (None, 2, 4):
        raw = case.offsets_and_logits(dtype, per_token=size is None).to(device)
        reference = None if size is None else case.reference(size, arithmetic).to(device)
        fused = (value, case.flat_shapes, raw, reference, case.points)
        grad = torch.randn(case.images, raw.shape[1], width).to(device, dtype)
        results.append(operators.ms_deform_attn_fused(*fused))
        results += operators.ms_deform_attn_fused_backward(grad, *fused, size is not None)
    return [t.cpu() for t in results]


def assert_same(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    """Compare with the largest expected number as unit."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        unit = b.double().abs().amax().clamp(min=1.0) if b.numel() else 1.0
        torch.testing.assert_close(
            a.double() / unit, b.double() / unit, rtol=0, atol=TOLERANCE[dtype]
        )


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    """Asks torch for deterministic algorithms during a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_emulated_kernels_compute_what_the_cpu_does(
    case: Case, dtype: torch.dtype, emulated: object
) -> None:
    assert_same(run(emulated, case, dtype), run(torch.ops.maskdino, case, dtype), dtype)


@pytest.mark.slow
def test_emulated_tiles_smaller_than_a_warp(emulated: object) -> None:
    """So many samples leave room for four queries of four lanes each: lanes beyond add nothing."""
    case = Case(shapes=((6, 4), (3, 2)), channels=16, heads=1, images=1, points=320)
    torch.manual_seed(0)
    value, raw = case.value(torch.float32), case.offsets_and_logits(torch.float32, per_token=True)
    fused = (value, case.flat_shapes, raw, None, case.points)
    grad = torch.randn(1, case.tokens, case.channels)
    results, expected = (
        [
            operators.ms_deform_attn_fused(*fused),
            *operators.ms_deform_attn_fused_backward(grad, *fused, False),
        ]
        for operators in (emulated, torch.ops.maskdino)
    )
    assert_same(results, expected, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("deterministic_algorithms")
def test_emulated_fixed_point_sums(dtype: torch.dtype, emulated: object) -> None:
    results = run(emulated, CASES[1], dtype)
    assert_same(results, run(torch.ops.maskdino, CASES[1], dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_emulated_kernels_stay_inside_the_maps(bad: float, emulated: object) -> None:
    case = Case(shapes=((3, 4),), channels=32, heads=1, images=1)
    locations, weights = case.locations(torch.float32), case.weights(torch.float32)
    locations[:, ::2, :, :, 0] = bad
    weights[:, 1, :, :, 0] = float("nan")
    inputs = (case.value(torch.float32), case.flat_shapes, locations, weights)
    output = emulated.ms_deform_attn(*inputs)
    assert output[0, ::2].isfinite().all() and output.isnan()[0, 1].any()
    grads = emulated.ms_deform_attn_backward(torch.ones_like(output), *inputs)
    assert grads[1].shape == locations.shape and grads[1][:, ::2].isfinite().all()


@pytest.mark.slow
def test_emulated_kernels_read_only_what_a_sample_touches(emulated: object) -> None:
    """A corner outside reads its neighbor: no pixel may spoil samples that do not touch it."""
    case = Case(shapes=((3, 4), (2, 1)), channels=32, heads=2, queries=40, points=1)
    value = case.value(torch.float32)
    value[:, [0, 6, 11, 12]] = float("nan")
    locations = 2 * case.locations(torch.float32) - 0.5
    inputs = (value, case.flat_shapes, locations, case.weights(torch.float32))
    output, expected = (ops.ms_deform_attn(*inputs) for ops in (emulated, torch.ops.maskdino))
    assert 0.1 < output.isnan().float().mean() < 0.9
    assert torch.equal(output.isnan(), expected.isnan())
    grads, expected_grads = (
        ops.ms_deform_attn_backward(torch.ones_like(output), *inputs)
        for ops in (emulated, torch.ops.maskdino)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad.isnan(), expected_grad.isnan())
    assert grads[1].isnan().any() and not grads[0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("cuda_library")
def test_gpu_computes_what_the_cpu_does(case: Case, dtype: torch.dtype) -> None:
    results = run(torch.ops.maskdino, case, dtype, "cuda")
    assert_same(results, run(torch.ops.maskdino, case, dtype), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
def test_gpu_operators_wait_for_nothing() -> None:
    case = Case(channels=32)
    value = case.value(torch.float32).cuda().requires_grad_()
    raw = case.offsets_and_logits(torch.float32, per_token=True).cuda().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = ms_deform_attn_fused(value, case.shapes, raw, None, case.points, "compiled")
        output.backward(torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_algorithms")
@pytest.mark.usefixtures("cuda_library")
def test_gpu_gives_the_same_bits_when_asked() -> None:
    case = Case(shapes=((64, 64), (32, 32)), channels=32, queries=500)
    first, second = (run(torch.ops.maskdino, case, torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same(first, run(torch.ops.maskdino, case, torch.float32), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
def test_gpu_graph_capture() -> None:
    case = Case(channels=32)
    value = case.value(torch.float32).cuda()
    raw = case.offsets_and_logits(torch.float32, per_token=True).cuda()
    arguments = (value, case.flat_shapes, raw, None, case.points)
    expected = torch.ops.maskdino.ms_deform_attn_fused(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.maskdino.ms_deform_attn_fused(*arguments)
    graph.replay()
    assert torch.equal(output, expected)
