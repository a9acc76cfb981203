"""The compiled samples of packed masks against the PyTorch form: CPU, CUDA emulated, and a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maskdino.ops import _library
from maskdino.ops.points import sample_packed_masks
from maskdino.structures import PackedMasks
from tests.ops.test_points import border_points

Operator = Callable[[Tensor, int, Tensor, Tensor], Tensor]
SIZES = [(1, 1), (5, 8), (7, 13), (3, 17), (64, 300)]


@pytest.fixture
def compiled() -> Operator:
    if not _library.has("sample_packed_masks"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino.sample_packed_masks


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """The PyTorch form."""
    monkeypatch.setenv("MASKDINO_OP", "reference")
    return lambda bits, width, index, points: sample_packed_masks(
        PackedMasks(bits, (bits.shape[1], width)), index, points
    )


def drawn(size: tuple[int, int], shared: bool) -> tuple[Tensor, int, Tensor, Tensor]:
    """Masks, and points of which some lie outside; dense tensors and others."""
    masks = PackedMasks.from_bool(torch.rand(4, *size) < 0.5)
    index = torch.tensor([2, 9, 0, 9, 0, 9, 3, 9, 1])[::2]
    points = torch.stack([border_points(300) for _ in range(1 if shared else 5)])
    points[:, 5:50] = points[:, 5:50] * 3 - 1
    return masks.bits, size[1], index, points.transpose(0, 1).contiguous().transpose(0, 1)


def check(operator: Operator, reference: Operator, device: str = "cpu") -> None:
    for size in SIZES:
        for shared in (False, True):
            bits, width, index, points = drawn(size, shared)
            found = operator(bits.to(device), width, index.to(device), points.to(device))
            assert found.shape == (5, 300) and found.dtype == torch.float32
            expected = reference(bits, width, index, points)
            torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)
    for rows, number in ((0, 7), (3, 0), (0, 0)):
        points = torch.rand(rows, number, 2, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        assert operator(bits.to(device), width, index, points).shape == (rows, number)


def test_cpu(compiled: Operator, reference: Operator) -> None:
    check(compiled, reference)


@pytest.mark.slow
def test_emulated_kernel(emulated: object, reference: Operator) -> None:
    check(emulated.sample_packed_masks, reference)


@pytest.mark.gpu
def test_gpu(compiled: Operator, reference: Operator) -> None:
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    check(compiled, reference, "cuda")


@pytest.mark.gpu
def test_many_rows_on_a_gpu(compiled: Operator) -> None:
    """More than a grid has along one axis."""
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    bits, width, _, _ = drawn((7, 13), shared=False)
    index, points = torch.randint(0, 4, (70000,)), torch.rand(70000, 3, 2)
    found = compiled(bits.cuda(), width, index.cuda(), points.cuda()).cpu()
    torch.testing.assert_close(found, compiled(bits, width, index, points), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("compiled")
def test_it_is_what_python_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKDINO_OP", raising=False)
    bits, width, index, points = drawn((7, 13), shared=False)
    masks = PackedMasks(bits, (7, 13))
    with torch.profiler.profile() as profile:
        sample_packed_masks(masks, index, points)
        sample_packed_masks(masks, index, points.double())
    names = [event.name for event in profile.events()]
    assert names.count("maskdino::sample_packed_masks") == 1
    assert names.count("aten::floor") == 2  # float64 is for the PyTorch form


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_no_point_reads_beyond_the_masks(compiled: Operator, value: float) -> None:
    bits, width, index, points = drawn((7, 13), shared=False)
    points[:, ::2, 0], points[:, 1::2, 1] = value, value
    found = compiled(bits, width, index, points)
    assert (found.isnan() | (found == 0)).all()


def test_shapes_are_known_without_data(compiled: Operator) -> None:
    for shared in (False, True):
        torch.library.opcheck(compiled, drawn((5, 8), shared))


def test_bad_calls(compiled: Operator) -> None:
    bits, width, index, points = drawn((7, 13), shared=False)
    with pytest.raises(IndexError, match="index 4 is none of the 4 masks"):
        compiled(bits, width, index + 1, points)
    with pytest.raises(ValueError, match="for a width of 17"):
        compiled(bits, 17, index, points)
    with pytest.raises(ValueError, match=r"points \(M or 1, P, 2\)"):
        compiled(bits, width, index, points[:3])
    for bad in ((bits.int(), index, points), (bits, index.int(), points), (bits, index, bits)):
        with pytest.raises(TypeError, match="must be"):
            compiled(bad[0], width, *bad[1:])
