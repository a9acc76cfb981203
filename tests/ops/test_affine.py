"""What follows a convolution against float64: PyTorch's on a CPU, CUDA emulated, and a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from maskdino.ops import _library

TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Odd channels and pixels; single ones, which are of both layouts; none.
SHAPES = ((2, 16, 3, 4), (1, 7, 5, 3), (3, 1, 4, 4), (2, 24, 1, 1), (0, 8, 2, 2), (2, 0, 3, 3))
# Threads load more than once, vectors or single numbers.
LARGE = ((1, 20, 232, 232), 0), ((1, 20, 232, 232), 1), ((1, 5, 257, 257), 1)
KINDS = tuple(itertools.product((True, False), repeat=3))  # scale, residual, ReLU


@pytest.fixture
def compiled() -> object:
    if not _library.has("affine"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: int) -> Tensor:
    """Contiguous, channels-last, neither, or contiguous from an odd address on."""
    x = torch.randn(shape)
    if layout == 1:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == 2:
        x = torch.randn(*shape[:3], 2 * shape[3])[..., ::2]
    return _odd(x.to(dtype)) if layout == 3 else x.to(dtype)


def _odd(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def cases() -> list[tuple]:
    """Each shape in each layout; types and kinds take turns."""
    found = []
    for number, (shape, layout) in enumerate(itertools.product(SHAPES, range(4))):
        for turn in range(3):
            kind = KINDS[(3 * number + turn) % len(KINDS)]
            found.append((shape, layout, TYPES[turn], kind, (number + turn) % 2 == 0))
    return found + [(*large, torch.float32, (True, True, True), True) for large in LARGE]


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Computed in float32, and rounded once."""
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.cpu().double(), exact, atol=2e-6, rtol=eps / 2 + 1e-6, equal_nan=True
    )


def check_affine(operators: object, device: str = "cpu") -> None:
    for shape, layout, dtype, (scaled, added, relu), half in cases():
        x, residual = drawn(shape, dtype, layout), drawn(shape, dtype, layout)
        x[:1, :1, :1, :1] = torch.nan
        scale, shift = torch.rand(2, shape[1]) + 0.5
        shift = shift.to(dtype) if half else shift
        args = (
            scale if scaled else None,
            shift,
            residual if added else None,
        )
        place = [None if a is None else a.to(device) for a in (x, *args)]
        if layout == 3:
            place[0] = _odd(place[0])
        y = operators.affine(*place, relu)
        torch.testing.assert_close(place[0].cpu(), x, rtol=0, atol=0, equal_nan=True)
        exact = x.double() * (scale.double() if scaled else torch.ones(shape[1])).view(-1, 1, 1)
        exact = exact + shift.double().view(-1, 1, 1) + (residual.double() if added else 0)
        exact = exact.relu() if relu else exact
        close(y, exact, dtype)
        last = place[0].is_contiguous(memory_format=torch.channels_last)
        expected = torch.channels_last if last else torch.contiguous_format
        assert y.is_contiguous(memory_format=expected)
        if layout != 2:
            assert operators.affine_(*place, relu) is None
            assert torch.equal(place[0].nan_to_num(), y.nan_to_num())


def check_backward(operators: object, device: str = "cpu") -> None:
    for shape, layout, dtype, (scaled, with_residual, relu), with_x in cases():
        output = drawn(shape, dtype, layout).relu() if relu else None
        grad = drawn(shape, dtype, layout if with_x else (layout + 1) % 4)
        scale = torch.rand(shape[1]) + 0.5 if scaled else None
        place = [None if a is None else a.to(device) for a in (grad, output, scale)]
        grad_x, grad_residual = operators.affine_backward(*place, with_x, with_residual)
        masked = grad.double() if output is None else grad.double() * (output > 0)
        factor = scale.double().view(-1, 1, 1) if scaled else 1
        for found, exact, asked in (
            (grad_x, masked * factor, with_x),
            (grad_residual, masked, with_residual),
        ):
            assert asked or found.numel() == 0
            if asked:
                close(found, exact, dtype)
                assert found.data_ptr() != place[0].data_ptr() or found.numel() == 0
                layout_of = place[0] if output is None else place[1]
                assert found.is_contiguous(memory_format=_library._layout(layout_of))


CHECKS = [check_affine, check_backward]


@pytest.mark.parametrize("check", CHECKS)
def test_cpu(compiled: object, check: object) -> None:
    check(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_emulated_kernels(emulated: object, check: object) -> None:
    check(emulated)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_gpu(compiled: object, check: object) -> None:
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    check(compiled, "cuda")


@pytest.mark.parametrize(("scaled", "added", "relu"), KINDS)
def test_gradients(compiled: object, scaled: bool, added: bool, relu: bool) -> None:
    """Those of numbers; and no more is kept than PyTorch's ReLU in place keeps."""
    x, residual = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    scale, shift = torch.rand(2, 3) + 0.5
    x, residual = x.requires_grad_(), residual.requires_grad_()
    scale, residual = scale if scaled else None, residual if added else None
    inputs = (x, residual) if added else (x,)
    assert torch.autograd.gradcheck(
        lambda x, residual=None: compiled.affine(x, scale, shift, residual, relu), inputs
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compiled.affine(x, scale, shift, residual, relu)
    assert sum(t.shape == y.shape for t in kept) == relu
    assert all(t.shape == y.shape or t is scale or t.numel() == 3 for t in kept)
    for frozen in inputs:  # the other one's gradient alone
        frozen.requires_grad_(False)
        if any(other.requires_grad for other in inputs):
            y = compiled.affine(x, scale, shift, residual, relu)
            (other,) = [other for other in inputs if other is not frozen]
            (found,) = torch.autograd.grad(y.sum(), other)
            mask = (y > 0).double() if relu else torch.ones_like(y)
            factor = scale.view(-1, 1, 1) if scaled and other is x else 1
            torch.testing.assert_close(found, mask * factor)
        frozen.requires_grad_()


def test_it_is_a_proper_operator(compiled: object) -> None:
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.rand(2, 8)
    torch.library.opcheck(compiled.affine.default, (x, scale, shift, x.detach(), True))
    torch.library.opcheck(compiled.affine.default, (x, None, shift, None, False))
    torch.library.opcheck(compiled.affine_.default, (x.detach(), None, shift, None, True))
    backward = compiled.affine_backward.default
    torch.library.opcheck(backward, (x.detach(), x.detach(), scale, True, False))


def check_bad_input(operators: object) -> None:
    x, row = torch.randn(2, 8, 3, 3), torch.ones(8)
    with pytest.raises(ValueError, match="expected a map"):
        operators.affine(x[0], None, row, None, True)
    with pytest.raises(ValueError, match="shift must have 8 numbers"):
        operators.affine(x, None, row[1:], None, True)
    with pytest.raises(TypeError, match="scale must be float32"):
        operators.affine(x.half(), row.half(), row, None, True)
    with pytest.raises(TypeError, match="residual must be"):
        operators.affine(x, row, row, x.half(), True)
    with pytest.raises(ValueError, match="residual must have shape"):
        operators.affine(x, row, row, x[:1], True)
    with pytest.raises(ValueError, match="in place"):
        operators.affine_(x[..., ::2], row, row, None, True)
    with pytest.raises(ValueError, match="output must have shape"):
        operators.affine_backward(x, x[:, :1], None, True, True)


def test_bad_input_is_one_line(compiled: object) -> None:
    check_bad_input(compiled)


@pytest.mark.slow
def test_bad_input_of_the_cuda_part(emulated: object) -> None:
    check_bad_input(emulated)


def test_a_result_that_was_changed_in_place_has_no_gradient(compiled: object) -> None:
    """It is what the backward pass reads."""
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    made = compiled.affine(x, torch.ones(2), torch.zeros(2), None, True).sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()
