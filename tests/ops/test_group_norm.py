"""Group norm of maps against float64: PyTorch's on a CPU, CUDA emulated, and a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops import _library

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
EPS = 1e-5
# Images, channels, groups, height, width: with vectors and without, several parts and slices, a
# last slice that is not full, more channels in a group than a block has threads.
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 16, 2, 5, 7),
    (1, 72, 9, 3, 4),
    (2, 24, 3, 2, 33),
    (1, 2, 2, 64, 70),
    (3, 6, 3, 2, 5),
    (1, 300, 1, 2, 2),
    (0, 8, 2, 3, 3),
    (2, 8, 2, 0, 3),
)
LARGE = ((2, 256, 32, 50, 68), (1, 96, 32, 31, 41))  # for a GPU: many parts and slices


@pytest.fixture
def compiled() -> object:
    if not _library.has("group_norm"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Maps far from zero: squares that are not taken around the mean would be lost."""
    images, channels, _, height, width = shape
    x = torch.randn(images, channels, height, width) + torch.randn(channels, 1, 1) + 100
    return x.to(dtype).contiguous(memory_format=layout)


def expected_norm(
    x: Tensor, shift: Tensor | None, groups: int, weight: Tensor, bias: Tensor
) -> Tensor:
    """In float64."""
    x = x.double() if shift is None else x.double() + shift.double()[:, None, None]
    if x.numel() == 0:
        return x
    if x[0, 0].numel() * (x.shape[1] // groups) == 1:  # which PyTorch refuses to norm
        return torch.zeros_like(x) + bias.double()[:, None, None]
    return F.group_norm(x, groups, weight.double(), bias.double(), EPS)


def check_group_norm(operators: Any, device: str = "cpu") -> None:
    """All shapes in both layouts, and on a GPU in all types; all else in turn."""
    shapes = SHAPES if device == "cpu" else SHAPES + LARGE
    calls = [(*c, d) for c in itertools.product(shapes, LAYOUTS) for d in TYPES]
    for turn, (shape, layout, dtype) in enumerate(calls):
        if device == "cpu" and turn // len(TYPES) % len(TYPES) != turn % len(TYPES):
            continue
        x, groups = drawn(shape, dtype, layout), shape[2]
        weight, bias = torch.randn(2, shape[1])
        shift = (None, torch.randn(shape[1]), torch.randn(shape[1]).to(dtype))[turn // 2 % 3]
        relu, result = turn % 4 < 2, (dtype, torch.float32)[turn % 5 % 2]
        args = [None if a is None else a.to(device) for a in (x, shift, weight, bias)]
        found, kept = operators.group_norm(*args, groups, EPS, relu, None, result)
        exact = expected_norm(x, shift, groups, weight, bias)
        assert found.dtype == result
        if x.numel() > 0 and shape[1] // groups <= 256:  # wider ones are normed in planes
            assert found.is_contiguous(memory_format=layout)
        close(found, exact.relu() if relu else exact, weight, kept)
        check_kept(kept, x if shift is None else x + shift[:, None, None].double(), groups)


def close(found: Tensor, exact: Tensor, weight: Tensor, kept: Tensor) -> None:
    """As if the mean, some 100, were rounded to float32, and the result to its type."""
    if found.numel() == 0:
        return
    atol = 5e-6 * float(weight.abs().max() * kept[..., 1].max())
    rtol = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.cpu().double(), exact, atol=atol, rtol=rtol)


def check_kept(kept: Tensor, shifted: Tensor, groups: int) -> None:
    if shifted.numel() == 0:
        return
    rows = shifted.double().reshape(shifted.shape[0], groups, -1)
    variance, mean = torch.var_mean(rows, dim=2, correction=0)
    exact = torch.stack([mean, (variance + EPS).rsqrt()], dim=-1)
    torch.testing.assert_close(kept.cpu().double(), exact, atol=0, rtol=5e-6)


def check_coarse(operators: Any, device: str = "cpu") -> None:
    """A coarser map of any type, layout and place in memory is resized and added."""
    sizes = ((6, 8), (3, 4)), ((7, 5), (3, 3)), ((4, 4), (4, 4)), ((2, 9), (5, 1))
    calls = itertools.product(sizes, TYPES, ((16, 2), (6, 2)))
    for turn, ((size, coarse_size), dtype, (channels, groups)) in enumerate(calls):
        layout, other = LAYOUTS[turn % 2], LAYOUTS[turn // 2 % 2]
        x = drawn((2, channels, groups, *size), dtype, layout)
        weight, bias = torch.randn(2, channels)
        cells = coarse_size[0] * coarse_size[1]
        tokens = torch.randn(2, cells + 3, channels)[:, :cells]  # those of a level among others
        tokens = tokens.to((torch.float32, dtype)[turn % 4 == 0])
        coarse = tokens.transpose(1, 2).unflatten(2, coarse_size)
        if other == torch.contiguous_format:
            coarse = coarse.contiguous()
        args = [a.to(device) for a in (weight, bias)]
        found, kept = operators.group_norm(
            x.to(device), None, *args, groups, EPS, False, on(coarse, device), dtype
        )
        resized = F.interpolate(coarse.double(), size, mode="bilinear")
        exact = expected_norm(x, None, groups, weight, bias) + resized
        assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
        close(found, exact, weight, kept)


def on(coarse: Tensor, device: str) -> Tensor:
    """On a device, with strides as they are."""
    if device == "cpu":
        return coarse
    storage = torch.empty(coarse.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    moved = storage.view(coarse.dtype).as_strided(coarse.shape, coarse.stride())
    return moved.copy_(coarse)


def check_odd_numbers(operators: Any, device: str = "cpu") -> None:
    """What is not a number spoils its group alone; places in memory that no vector is read from."""
    for layout in LAYOUTS:
        x = drawn((2, 16, 4, 3, 3), torch.float32, layout)
        x[1, 5, 1, 1] = torch.nan
        row = torch.ones(16, device=device)
        found, _ = operators.group_norm(
            x.to(device), None, row, row, 4, EPS, True, None, torch.float32
        )
        spoiled = torch.zeros(2, 16, 3, 3, dtype=torch.bool)
        spoiled[1, 4:8] = True
        assert torch.equal(found.isnan().cpu(), spoiled)
        far = torch.zeros(1 + x.numel(), device=device)[1:].as_strided(x.shape, x.stride())
        again = operators.group_norm(far.copy_(x), None, row, row, 4, EPS, True, None, x.dtype)[0]
        torch.testing.assert_close(again, found, equal_nan=True)
    constant = torch.full((1, 8, 4, 4), 1e4, device=device)
    row = torch.ones(8, device=device)
    found, _ = operators.group_norm(constant, None, row, 2 * row, 2, EPS, False, None, x.dtype)
    assert torch.equal(found, torch.full_like(found, 2))


def check_backward(operators: Any, device: str = "cpu") -> None:
    """Gradients of all shapes in both layouts, by gradients of both types, and through ReLU."""
    shapes = SHAPES if device == "cpu" else SHAPES + LARGE
    calls = [(*c, d) for c in itertools.product(shapes, LAYOUTS) for d in TYPES]
    for turn, (shape, layout, dtype) in enumerate(calls):
        if device == "cpu" and turn // len(TYPES) % len(TYPES) != turn % len(TYPES):
            continue
        x, groups = drawn(shape, dtype, layout), shape[2]
        if x.numel() == 0 or x[0, 0].numel() * (shape[1] // groups) == 1:
            continue
        relu, kind = turn % 4 < 2, (dtype, torch.float32)[turn % 5 % 2]
        grad = torch.randn(x.shape).to(kind).contiguous(memory_format=LAYOUTS[turn // 7 % 2])
        inputs = [x, *torch.randn(2, shape[1])]
        exact = [a.double().requires_grad_() for a in inputs]
        made = F.group_norm(exact[0], groups, *exact[1:], EPS)
        unsure = (made.abs() < 1e-4).cpu() if relu else torch.zeros(x.shape, dtype=torch.bool)
        grad = grad.masked_fill(unsure, 0)  # on which side of ReLU rounding decides
        (made.relu() if relu else made).backward(grad.double())
        args = [a.to(device) for a in inputs]
        kept = operators.group_norm(args[0], None, *args[1:], groups, EPS, relu, None, dtype)[1]
        found = operators.group_norm_backward(grad.to(device), *args, kept, relu)
        assert [a.dtype for a in found] == [dtype, torch.float32, torch.float32]
        if shape[1] // groups <= 256:
            assert found[0].is_contiguous(memory_format=layout)
        for own, expected in zip(found, exact, strict=True):
            bound = 3e-5 * float(expected.grad.abs().max())
            rtol = torch.finfo(own.dtype).eps
            torch.testing.assert_close(own.cpu().double(), expected.grad, atol=bound, rtol=rtol)


def check_resize_backward(operators: Any, device: str = "cpu") -> None:
    """Enlarged, as large, made smaller; with vectors and without."""
    sizes = (
        ((6, 8), (3, 4)),
        ((7, 5), (3, 3)),
        ((4, 4), (4, 4)),
        ((2, 9), (5, 1)),
        ((1, 30), (1, 4)),
    )
    calls = itertools.product(sizes, TYPES, (16, 6), LAYOUTS)
    for (size, coarse_size), dtype, channels, layout in calls:
        coarse = torch.zeros(2, channels, *coarse_size, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=layout)
        F.interpolate(coarse, size, mode="bilinear").backward(grad.double())
        found = operators.resize_backward(grad.to(device), *coarse_size)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), coarse.grad, atol=1e-5, rtol=1e-5)


CHECKS = [check_group_norm, check_coarse, check_odd_numbers, check_backward, check_resize_backward]


@pytest.mark.parametrize("relu", [False, True])
def test_autograd(compiled: Any, relu: bool) -> None:
    """Gradients reach all inputs, in their types; the second result has none."""
    x = torch.randn(2, 8, 4, 6).to(torch.bfloat16).requires_grad_()
    weight, bias = torch.randn(2, 8).unbind()
    weight.requires_grad_()
    bias.requires_grad_()
    coarse = None if relu else torch.randn(2, 8, 2, 3).half().requires_grad_()
    normed, kept = compiled.group_norm(x, None, weight, bias, 2, EPS, relu, coarse, torch.float32)
    assert not kept.requires_grad
    grad = torch.randn(x.shape)
    normed.backward(grad)
    exact = [None if a is None else a.detach().double() for a in (x, weight, bias, coarse)]
    exact = [None if a is None else a.requires_grad_() for a in exact]
    made = F.group_norm(exact[0], 2, *exact[1:3], EPS)
    made = (
        made.relu() if coarse is None else made + F.interpolate(exact[3], (4, 6), mode="bilinear")
    )
    made.backward(grad.double())
    for own, expected in zip((x, weight, bias, coarse), exact, strict=True):
        if own is not None:
            assert own.grad.dtype == own.dtype
            rtol = 2 * torch.finfo(own.dtype).eps
            torch.testing.assert_close(own.grad.double(), expected.grad, atol=1e-5, rtol=rtol)
    with pytest.raises(NotImplementedError, match="shift"):
        compiled.group_norm(x, bias, weight, bias, 2, EPS, relu, None, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_sound(compiled: Any, layout: torch.memory_format) -> None:
    """Schema, shapes without data, and autograd are what PyTorch expects."""
    x = torch.randn(2, 8, 3, 4).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    coarse = torch.randn(2, 8, 2, 2, requires_grad=True)
    args = x, None, weight, bias, 2, EPS, False, coarse, torch.float32
    torch.library.opcheck(compiled.group_norm.default, args)
    grad, kept = torch.randn(2, 8, 3, 4), torch.rand(2, 2, 2)
    args = grad, x.detach(), weight.detach(), bias.detach(), kept, True
    torch.library.opcheck(compiled.group_norm_backward.default, args)
    torch.library.opcheck(compiled.resize_backward.default, (grad, 2, 2))


@pytest.mark.parametrize("check", CHECKS)
def test_cpu(compiled: object, check: Any) -> None:
    check(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_emulated_kernels(emulated: object, check: Any) -> None:
    check(emulated)


@pytest.mark.slow
def test_bad_input_is_one_line(emulated: Any) -> None:
    x, row = torch.randn(2, 8, 3, 3), torch.ones(8)

    def refused(error: type, words: str, **changes: object) -> None:
        call = {"x": x, "shift": None, "weight": row, "bias": row, "groups": 2, "eps": EPS}
        call |= {"relu": False, "coarse": None, "dtype": torch.float32}
        with pytest.raises(error, match=words):
            emulated.group_norm(**call | changes)

    refused(ValueError, "must be .N, C, H, W.", x=x[0])
    refused(TypeError, "x must be", x=x.double())
    refused(ValueError, "3 groups of 8 channels", groups=3)
    refused(ValueError, "0 groups", groups=0)
    refused(TypeError, "weight must be float32", weight=row.half())
    refused(ValueError, "bias must have shape", bias=row[1:])
    refused(TypeError, "shift must be", shift=row.half())
    refused(ValueError, "shift must have shape", shift=row[1:])
    refused(ValueError, "cannot resize", coarse=x[:1])
    refused(ValueError, "or ReLU", coarse=x, relu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_gpu(compiled: object, check: Any) -> None:
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    check(compiled, "cuda")
