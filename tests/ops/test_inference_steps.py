"""Fused steps of inference against float64: PyTorch's on a CPU, CUDA emulated, and a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from maskdino.ops import _library

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def compiled() -> object:
    if not _library.has("predict_boxes"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino


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


def test_cpu(compiled: object) -> None:
    check_predict_boxes(compiled)


@pytest.mark.slow
def test_emulated_kernels(emulated: object) -> None:
    check_predict_boxes(emulated)


@pytest.mark.slow
def test_bad_input_is_one_line(emulated: object) -> None:
    x, row = torch.randn(2, 3, 8), torch.ones(8)
    boxes, layer = torch.randn(2, 3, 4), (torch.ones(4, 8), torch.ones(4))
    for wrong in ((x, *layer, x), (x[:1], *layer, boxes), (x, layer[0].T, layer[1], boxes)):
        with pytest.raises(ValueError, match="anchor logits|expected shape"):
            emulated.predict_boxes(*wrong, row, row, 1.0, torch.float32)


@pytest.mark.gpu
def test_gpu(compiled: object) -> None:
    if not _library.serves("cuda"):
        pytest.skip(_library.why_not("cuda"))
    check_predict_boxes(compiled, "cuda")
