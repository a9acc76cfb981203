"""Fused steps of inference against float64: PyTorch's on a CPU, CUDA emulated, and a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops import _library

TYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATORS = ("add_norm", "predict_boxes")
# Of normed rows; those of multiples of 4 channels, up to 1024, have kernels.
SHAPES = (
    *((2, 5, 1), (1, 1, 7), (2, 3, 33), (3, 4, 256), (2, 0, 8), (130, 70)),
    *((5, 1, 4), (2, 3, 132), (2, 3, 124), (1, 2, 512), (1, 2, 1000), (1, 5, 1024), (1, 2, 1028)),
)


@pytest.fixture
def compiled() -> object:
    for name in OPERATORS:
        if not _library.has(name):
            pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino


def check_add_norm(operators: object, device: str = "cpu") -> None:
    """Rows of any width, and positions for each image or for all, in both types."""
    for number, (shape, dtype) in enumerate((shape, dtype) for shape in SHAPES for dtype in TYPES):
        x, update = torch.randn(shape) * 3 + 100, torch.randn(shape).to(dtype)
        if shape == (2, 3, 132):  # begins between packs
            update = torch.cat([update.new_ones(1), update.flatten()])[1:].view(shape)
        weight, bias = torch.randn(2, shape[-1])
        turn = number // len(TYPES) + number % len(TYPES)  # so that each type meets each kind
        place = (shape, shape[1:], None)[turn % 3]
        position = (
            None if place is None else torch.randn(place).to((dtype, torch.float32)[turn % 2])
        )
        args = x, update, weight, bias, 1e-5, number % 4 < 2, position
        on_device = (a.to(device) if isinstance(a, Tensor) else a for a in args)
        normed, rounded, placed = operators.add_norm(*on_device)
        exact = F.layer_norm(
            x.double() + update.double(), shape[-1:], weight.double(), bias.double()
        )
        assert normed.dtype == torch.float32 and normed.shape == x.shape
        torch.testing.assert_close(normed.cpu().double(), exact, atol=5e-5, rtol=1e-5)
        assert rounded.dtype == placed.dtype == dtype
        assert torch.equal(rounded, normed.to(dtype) if number % 4 < 2 else rounded[:0])
        if position is None:
            assert placed.numel() == 0
        else:
            assert torch.equal(placed, (normed + position.to(device)).to(dtype))


def check_predict_boxes(operators: object, device: str = "cpu") -> None:
    """Also at borders: logits without bound, and what is not a number stays that."""
    most = -math.log(1e-5)
    for dtype in TYPES:
        for rows, width, channels in ((0, 8, 4), (1, 1, 2), (5, 33, 6), (3, 256, 128), (2, 0, 4)):
            hidden, weight = torch.randn(2, rows, width), torch.randn(4, width)
            bias, logits = torch.randn(4), torch.randn(2, rows, 4) * 4
            logits[:, :1, :3] = torch.tensor([100.0, -100.0, math.nan])
            rates, phases = torch.rand(2, channels) * 2 * math.pi
            args = (x.to(device) for x in (hidden, weight, bias, logits, rates, phases))
            boxes, bounded, sines = operators.predict_boxes(*args, most, dtype)
            total = F.linear(hidden.double(), weight.double(), bias.double()) + logits.double()
            exact = total.sigmoid()
            torch.testing.assert_close(
                boxes.cpu().double(), exact, atol=1e-5, rtol=0, equal_nan=True
            )
            torch.testing.assert_close(
                bounded.cpu().double(), total.clamp(-most, most), atol=3e-5, rtol=0, equal_nan=True
            )
            in_order = exact[..., [1, 0, 2, 3], None]
            expected = (phases.double() + in_order * rates.double()).sin().flatten(-2)
            assert sines.dtype == dtype and sines.shape == (2, rows, 4 * channels)
            atol = 5e-5 + torch.finfo(dtype).eps / 2
            torch.testing.assert_close(
                sines.cpu().double(), expected, atol=atol, rtol=0, equal_nan=True
            )


CHECKS = [check_add_norm, check_predict_boxes]


@pytest.mark.parametrize("check", CHECKS)
def test_cpu(compiled: object, check: object) -> None:
    check(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_emulated_kernels(emulated: object, check: object) -> None:
    check(emulated)


@pytest.mark.slow
def test_bad_input_is_one_line(emulated: object) -> None:
    x, row = torch.randn(2, 3, 8), torch.ones(8)
    with pytest.raises(TypeError, match="expected float32"):
        emulated.add_norm(x.half(), x, row, row, 1e-5, True, None)
    with pytest.raises(ValueError, match="cannot add"):
        emulated.add_norm(x, x[:1], row, row, 1e-5, True, None)
    with pytest.raises(ValueError, match="cannot add positions"):
        emulated.add_norm(x, x, row, row, 1e-5, True, torch.randn(2, 8))
    with pytest.raises(ValueError, match="expected shape"):
        emulated.add_norm(x, x, row[1:], row, 1e-5, True, None)
    boxes, layer = torch.randn(2, 3, 4), (torch.ones(4, 8), torch.ones(4))
    for wrong in ((x, *layer, x), (x[:1], *layer, boxes), (x, layer[0].T, layer[1], boxes)):
        with pytest.raises(ValueError, match="anchor logits|expected shape"):
            emulated.predict_boxes(*wrong, row, row, 1.0, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_gpu(compiled: object, check: object) -> None:
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    check(compiled, "cuda")
