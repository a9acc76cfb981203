"""Boxes: formats, generalized IoU, logits, boxes of masks."""

import math

import torch
from torch import Tensor

from maskdino.ops.constants import constant_of_shape

# Added to areas that divide, as in the released models; boxes are parts of the canvas.
AREA_EPS = 1e-6
LOGIT_EPS = 1e-5  # the least of x and of 1 - x of which logits are taken
LARGEST_LOGIT = -math.log(LOGIT_EPS)
EMPTY_MASK_COORDINATE = 1e8  # upper left corner that "mask2box" gives an empty mask


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) center and size to corners."""
    center, size = boxes.chunk(2, dim=-1)
    half = size / 2
    return torch.cat([center - half, center + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners to center and size."""
    low, high = boxes.chunk(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def pixels_inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Whose centers lie in a box: (..., 4) xyxy in pixels to (..., height, width) bool."""
    low, high = boxes.unsqueeze(-1).chunk(2, dim=-2)  # (..., 2, 1)
    rows, columns = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    in_x = (low[..., 0, :] <= columns) & (columns <= high[..., 0, :])
    in_y = (low[..., 1, :] <= rows) & (rows <= high[..., 1, :])
    return in_y.unsqueeze(-1) & in_x.unsqueeze(-2)


def generalized_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Generalized IoU of corner boxes, element by element.

    Args:
        boxes_a: (..., 4) xyxy.
        boxes_b: likewise; leading dimensions broadcast, so that `a[:, None], b` gives all pairs.

    Returns:
        (...) in [-1, 1].
    """
    boxes_a, boxes_b = torch.broadcast_tensors(boxes_a, boxes_b)
    # In two views each: a gradient is then joined once, not filled up with zeros for every use.
    low_a, high_a = boxes_a.chunk(2, dim=-1)
    low_b, high_b = boxes_b.chunk(2, dim=-1)
    low = [torch.maximum(low_a, low_b), torch.minimum(low_a, low_b), low_a, low_b]
    high = [torch.minimum(high_a, high_b), torch.maximum(high_a, high_b), high_a, high_b]
    intersection, hull, area_a, area_b = _area(torch.stack(low), torch.stack(high))
    union = area_a + area_b - intersection
    return intersection / (union + AREA_EPS) - (hull - union) / (hull + AREA_EPS)


def iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """IoU of corner boxes (..., 4) xyxy, to (...) in [0, 1]; 0 of two boxes without area.

    Exact for boxes of a pixel too, as no epsilon is added to areas.
    """
    low_a, high_a = boxes_a.chunk(2, dim=-1)
    low_b, high_b = boxes_b.chunk(2, dim=-1)
    intersection = _area(torch.maximum(low_a, low_b), torch.minimum(high_a, high_b))
    union = _area(low_a, high_a) + _area(low_b, high_b) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def inverse_sigmoid(probabilities: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """Logits of values, clamped to [0, 1] first; both x and 1 - x count as at least `eps`."""
    # 1.0: of a whole number the ONNX exporter would make a tensor, which it then cannot clamp with.
    return torch.log(probabilities.clamp(eps, 1.0) / (1 - probabilities).clamp(eps, 1.0))


def bounded_logits(logits: Tensor) -> Tensor:
    """`inverse_sigmoid(logits.sigmoid())`, without the rounding of values close to 1."""
    return logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


def masks_to_boxes(masks: Tensor, inclusive: bool) -> Tensor:
    """Boxes around the foreground of masks.

    Args:
        masks: (..., H, W) bool.
        inclusive: True ("mask2box"): corners are the first and the last foreground pixel's index,
            and an empty mask gives (1e8, 1e8, 0, 0). False ("bitmask"): the last index + 1, and
            zeros for an empty mask.

    Returns:
        (..., 4) float32 xyxy, in pixels.
    """
    reach, start, direction, nothing = _sides(*masks.shape[-2:], inclusive, masks.device)
    occupied = torch.cat([masks.any(dim=-2), masks.any(dim=-1)], dim=-1)  # columns, rows
    farthest = (occupied[..., None, :] * reach).amax(-1)  # (..., 4)
    corners = torch.addcmul(start, direction, farthest)
    return torch.where(farthest[..., :1] > 0, corners, nothing)


@constant_of_shape
def _sides(
    height: int, width: int, inclusive: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How sides of boxes x0, y0, x1, y1 follow from the farthest cells, seen from other borders.

    Returns:
        (4, W + H) the distance of each column or row, beginning with 1, and 0 where a side does not
        depend on it; where sides begin, and in which direction they go, (4,) each; and the box of
        an empty mask (4,).
    """
    # Types are named and numbers filled in: the sizes of exported programs are variable integers.
    x, y = (
        torch.arange(1, size + 1, dtype=torch.float32, device=device) for size in (width, height)
    )
    zeros, one = (torch.zeros_like(x), torch.zeros_like(y)), torch.ones(1, device=device)
    reach = torch.stack(
        [
            torch.cat([x.flip(0), zeros[1]]),
            torch.cat([zeros[0], y.flip(0)]),
            torch.cat([x, zeros[1]]),
            torch.cat([zeros[0], y]),
        ]
    )
    last = -one if inclusive else one - one
    sides = [torch.full((1,), side, dtype=torch.float32, device=device) for side in (width, height)]
    start = torch.cat([*sides, last, last])
    direction = torch.cat([-one, -one, one, one])
    low = one * (EMPTY_MASK_COORDINATE if inclusive else 0.0)
    return reach, start, direction, torch.cat([low, low, one - one, one - one])
