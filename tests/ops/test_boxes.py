"""Boxes against loops over single boxes and pixels."""

import math

import pytest
import torch
from torch import Tensor

from maskdino.ops.boxes import (
    bounded_logits,
    cxcywh_to_xyxy,
    generalized_iou,
    inverse_sigmoid,
    masks_to_boxes,
    xyxy_to_cxcywh,
)


def random_boxes(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Corner boxes in the unit square with sides of at least 0.05."""
    low = torch.rand(number, 2, dtype=dtype) * 0.6
    return torch.cat([low, low + 0.05 + torch.rand(number, 2, dtype=dtype) * 0.35], dim=1)


def slow_giou(a: list[float], b: list[float]) -> float:
    """Generalized IoU of two corner boxes, from its definition."""
    area_a, area_b = ((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b))
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = width * height if width > 0 and height > 0 else 0.0
    union = area_a + area_b - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


def test_formats_are_inverse() -> None:
    boxes = random_boxes(20)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    expected = torch.tensor([[0.3, 0.4, 0.2, 0.4]])
    torch.testing.assert_close(xyxy_to_cxcywh(torch.tensor([[0.2, 0.2, 0.4, 0.6]])), expected)


def test_giou_of_all_pairs() -> None:
    a, b = random_boxes(9), random_boxes(7)
    expected = torch.tensor([[slow_giou(x, y) for y in b.tolist()] for x in a.tolist()])
    found = generalized_iou(a[:, None], b)
    torch.testing.assert_close(found, expected.double(), atol=1e-3, rtol=0)
    # The epsilon under the fractions is all that differs: it vanishes for large boxes.
    expected = torch.tensor(
        [[slow_giou(x, y) for y in (100 * b).tolist()] for x in (100 * a).tolist()]
    )
    found = generalized_iou(100 * a[:, None], 100 * b)
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=0)


def test_giou_of_special_pairs() -> None:
    box = torch.tensor([0.2, 0.2, 0.6, 0.6])
    assert generalized_iou(box, box).item() == pytest.approx(1, abs=1e-4)
    far = torch.tensor([[0.0, 0.0, 1e-3, 1e-3], [1 - 1e-3, 1 - 1e-3, 1.0, 1.0]])
    assert generalized_iou(far[0], far[1]).item() == pytest.approx(-1, abs=1e-4)
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    value = generalized_iou(point, point)
    value.backward()
    assert value.isfinite() and point.grad.isfinite().all()
    assert generalized_iou(torch.zeros(0, 1, 4), torch.zeros(3, 4)).shape == (0, 3)


def test_giou_gradient() -> None:
    a, b = random_boxes(4).requires_grad_(), random_boxes(4).requires_grad_()
    assert torch.autograd.gradcheck(generalized_iou, (a, b))


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.01, 0.5, 0.9, 1.0, -3.0, 5e7, math.inf])
def test_inverse_sigmoid(value: float) -> None:
    clamped = min(max(value, 0.0), 1.0)
    expected = math.log(max(clamped, 1e-5) / max(1 - clamped, 1e-5))
    found = inverse_sigmoid(torch.tensor(value, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, abs=1e-9)


def slow_box(mask: Tensor, inclusive: bool) -> list[float]:
    """Box of one mask, pixel by pixel."""
    height, width = mask.shape
    pixels = [(x, y) for y in range(height) for x in range(width) if mask[y, x]]
    if not pixels:
        return [1e8, 1e8, 0, 0] if inclusive else [0, 0, 0, 0]
    xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
    more = 0 if inclusive else 1
    return [min(xs), min(ys), max(xs) + more, max(ys) + more]


def test_bounded_logits_are_those_of_probabilities() -> None:
    logits = torch.cat([torch.linspace(-20, 20, 101), torch.tensor([math.inf, -math.inf])]).double()
    expected = inverse_sigmoid(logits.sigmoid())
    torch.testing.assert_close(bounded_logits(logits), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("inclusive", [True, False])
def test_masks_to_boxes(inclusive: bool) -> None:
    masks = torch.rand(2, 6, 7, 9) < 0.08
    masks[0, 0] = False  # empty
    masks[0, 1] = False
    masks[0, 1, 6, 8] = True  # one pixel, in the last corner
    masks[1, 0] = True  # all
    expected = [[slow_box(mask, inclusive) for mask in image] for image in masks]
    found = masks_to_boxes(masks, inclusive)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float32))
    assert masks_to_boxes(masks[:, :0], inclusive).shape == (2, 0, 4)
