"""LayerNorm of sums against float64, with gradients: on a CPU, CUDA emulated, and on a GPU.

Shape key: C channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops import _library

TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of normed rows; those of multiples of 4 channels, up to 1024, have kernels.
SHAPES = (
    *((2, 5, 1), (1, 1, 7), (2, 3, 33), (3, 4, 256), (2, 0, 8), (130, 70)),
    *((5, 1, 4), (2, 3, 132), (2, 3, 124), (1, 2, 512), (1, 2, 1000), (1, 5, 1024), (1, 2, 1028)),
)
LONG = (1, 4300, 4)  # so that a warp of the backward pass goes through several rows
BETWEEN_PACKS = (2, 3, 132)  # tensors that begin where packs may not


@pytest.fixture
def compiled() -> Any:
    if not _library.has("add_norm_train"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino


def inputs(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> tuple[Any, ...]:
    """Arguments of the operators; positions of each image, or of all, in both types, or none."""
    # Far from zero; where rows are short, some have hardly a deviation.
    x, update = torch.randn(shape) * 3 + min(shape[-1], 100), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1])
    turn = number // len(TYPES) + number % len(TYPES)  # so that each type meets each kind
    place = (shape, shape[1:], None)[turn % 3]
    position = None if place is None else torch.randn(place).to((dtype, torch.float32)[turn % 2])
    return x, update, weight, bias, 1e-5, number % 4 < 2, position


def moved(values: tuple[Any, ...], device: str) -> list[Any]:
    """On a device; what has the shape for it begins between packs."""
    found = []
    for value in values:
        x = value.to(device) if isinstance(value, Tensor) else value
        if isinstance(x, Tensor) and x.shape == BETWEEN_PACKS:
            x = torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)
        found.append(x)
    return found


def calls() -> list[tuple[Any, ...]]:
    pairs = [(shape, dtype) for shape in SHAPES for dtype in TYPES]
    return [inputs(shape, dtype, number) for number, (shape, dtype) in enumerate(pairs)]


def variance_of(rows: Tensor) -> Tensor:
    return (rows - rows.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)


def check_outputs(operators: Any, device: str) -> None:
    for args in calls():
        x, update, weight, bias, eps, wanted, position = args
        *found, total, mean, rstd = operators.add_norm_train(*moved(args, device))
        for one, other in zip(operators.add_norm(*moved(args, device)), found, strict=True):
            assert torch.equal(one, other)
        normed, rounded, placed = found
        exact = x.double() + update.double()
        expected = F.layer_norm(exact, x.shape[-1:], weight.double(), bias.double(), eps)
        assert normed.dtype == torch.float32 and normed.shape == x.shape
        torch.testing.assert_close(normed.cpu().double(), expected, atol=5e-5, rtol=1e-5)
        assert rounded.dtype == placed.dtype == update.dtype
        assert torch.equal(rounded, normed.to(update.dtype) if wanted else rounded[:0])
        if position is None:
            assert placed.numel() == 0
        else:
            assert torch.equal(placed, (normed + position.to(device)).to(update.dtype))
        assert torch.equal(total, x.to(device) + update.to(device))
        assert mean.shape == rstd.shape == (*x.shape[:-1], 1)
        expected_mean = exact.mean(-1, keepdim=True)
        deviation = (variance_of(exact) + eps).sqrt()
        torch.testing.assert_close(mean.cpu().double(), expected_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(rstd.cpu().double(), 1 / deviation, atol=0, rtol=1e-4)


def check_gradients(operators: Any, device: str) -> None:
    """Of each set of outputs that may be read; those of weight and bias, wanted or not."""
    for number, args in enumerate([*calls(), inputs(LONG, torch.float16, 0)]):
        x, update, weight, bias, eps, *_ = args
        exact = (x.double() + update.double()).requires_grad_()
        leaves = [exact, weight.double().requires_grad_(), bias.double().requires_grad_()]
        normed = F.layer_norm(exact, x.shape[-1:], *leaves[1:], eps)
        mean, rstd = exact.mean(-1, keepdim=True), variance_of(exact) + eps
        kept = (exact, mean, rstd.rsqrt(), weight)
        grads = [torch.randn(x.shape).to(d) for d in (torch.float32, update.dtype, update.dtype)]
        read = number % 7 + 1  # bits
        given = [grad if read >> i & 1 else None for i, grad in enumerate(grads)]
        total = sum(grad.double() for grad in given if grad is not None)
        expected = torch.autograd.grad(normed, leaves, total)
        wanted = number % 5 < 4
        tensors = [*given, *(k.detach().float() for k in kept)]
        found = operators.add_norm_backward(*moved((*tensors, update.dtype, wanted), device))
        of_sum, of_update, *of_weights = (f.cpu() for f in found)
        scale = max(1.0, float(rstd.detach().rsqrt().amax())) if x.numel() else 1.0
        torch.testing.assert_close(
            of_sum.double(), expected[0], atol=2e-4 * scale, rtol=1e-4, msg=str(x.shape)
        )
        assert of_update.dtype == update.dtype
        half = update.dtype != torch.float32
        assert torch.equal(of_update, of_sum.to(update.dtype) if half else of_update[:0])
        for one, other in zip(of_weights, expected[1:], strict=True):
            if wanted:
                atol = 1e-4 * max(scale, float(other.abs().max()))
                torch.testing.assert_close(one.double(), other, atol=atol, rtol=1e-4)
            else:
                assert one.numel() == 0


def by_torch(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    _: bool,
    position: Tensor | None,
) -> list[Tensor]:
    """What PyTorch makes of the sum."""
    normed = F.layer_norm(x + update, x.shape[-1:], weight, bias, eps)
    placed = normed if position is None else normed + position
    return [normed, normed.to(update.dtype), placed.to(update.dtype)]


def check_autograd(operators: Any, device: str) -> None:
    """As PyTorch's, whatever is read and whatever is learned."""
    for number, (shape, dtype) in enumerate(
        [((2, 6, 32), dtype) for dtype in TYPES] * 4
        + [((2, 6, 7), TYPES[2]), ((1, 3, 8), TYPES[2])]
    ):
        x, update, weight, bias, eps, _, position = inputs(shape, dtype, number)
        args = moved((x / 100, update, weight, bias, eps, True, position), device)
        learned = [a for a in args if isinstance(a, Tensor)]
        if number % 5 == 4:
            del learned[2:]  # weights are frozen, the position is known
        found_of, expected_of = [], []
        for leaf in learned:
            leaf.requires_grad_()
        outputs = operators.add_norm_train(*args)
        assert not any(o.requires_grad for o in outputs[3:])
        for function, kept in ((list(outputs[:3]), found_of), (by_torch(*args), expected_of)):
            torch.manual_seed(number)
            grads = [torch.randn(shape).to(f.dtype).to(device) for f in function]
            read = [i for i in range(3) if number % 6 != i and (i < 2 or position is not None)]
            kept += torch.autograd.grad(
                [function[i] for i in read],
                learned,
                [grads[i] for i in read],
                allow_unused=True,
            )
        for one, other in zip(found_of, expected_of, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                eps_of = torch.finfo(one.dtype).eps
                torch.testing.assert_close(one, other, atol=max(2e-5, 4 * eps_of), rtol=4 * eps_of)


CHECKS = [check_outputs, check_gradients]


@pytest.mark.parametrize("check", [*CHECKS, check_autograd])
def test_cpu(compiled: Any, check: Any) -> None:
    check(compiled, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_emulated_kernels(emulated: Any, check: Any) -> None:
    check(emulated, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("check", [*CHECKS, check_autograd])
def test_gpu(compiled: Any, check: Any) -> None:
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    check(compiled, "cuda")


@pytest.mark.parametrize("dtype", TYPES[::2])
def test_registration(compiled: Any, dtype: torch.dtype) -> None:
    """Shapes without data, gradients, and what tracing asks for."""
    for number, position in enumerate((None, (3, 8), (2, 3, 8))):
        args = inputs((2, 3, 8), dtype, 0)[:5]
        leaves = [a.requires_grad_() if isinstance(a, Tensor) else a for a in args]
        place = None if position is None else torch.randn(position).requires_grad_()
        torch.library.opcheck(compiled.add_norm_train.default, (*leaves, number > 0, place))
    plain = [x.detach() if isinstance(x, Tensor) else x for x in (*leaves, True, place)]
    torch.library.opcheck(compiled.add_norm.default, tuple(plain))
    *_, total, mean, rstd = compiled.add_norm_train(*plain)
    torch.library.opcheck(
        compiled.add_norm_backward.default,
        (total, None, total.to(dtype), total, mean, rstd, plain[2], dtype, True),
    )


@pytest.mark.slow
def test_bad_input_is_one_line(emulated: Any) -> None:
    x, row = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(TypeError, match="expected float32"):
        emulated.add_norm(x.half(), x, row, row, 1e-5, True, None)
    with pytest.raises(ValueError, match="cannot add"):
        emulated.add_norm(x, x[:1], row, row, 1e-5, True, None)
    with pytest.raises(ValueError, match="cannot add positions"):
        emulated.add_norm(x, x, row, row, 1e-5, True, torch.randn(2, 8))
    with pytest.raises(ValueError, match="expected shape"):
        emulated.add_norm_train(x, x, row[1:], row, 1e-5, True, None)
    *_, total, mean, rstd = emulated.add_norm_train(x, x, row, row, 1e-5, True, None)
    kept = total, mean, rstd, row, torch.float16, True
    with pytest.raises(TypeError, match="gradient of Half, got Float"):
        emulated.add_norm_backward(None, x, None, *kept)
    with pytest.raises(ValueError, match="gradient of shape"):
        emulated.add_norm_backward(x[:1], None, None, *kept)
