"""Each loss beside its pairwise cost (appendix B.1; matching: section 3.6).

Shape key: Q queries, K classes, N objects, M matched pairs, P points; `...` leading dimensions.

Sums over points are not rounded to half by autocast: thousands of terms cancel in them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops.boxes import cxcywh_to_xyxy, generalized_iou

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
LOG_EPS = 1e-8  # inside the logarithms of the class cost


def focal_loss(class_logits: Tensor, is_target: Tensor) -> Tensor:
    """Sigmoid focal loss of each logit: (..., K) logits and 0/1 targets to (..., K)."""
    probability = class_logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(class_logits, is_target, reduction="none")
    missing = probability + is_target - 2 * probability * is_target  # 1 - probability of the truth
    alpha = FOCAL_ALPHA * is_target + (1 - FOCAL_ALPHA) * (1 - is_target)
    return alpha * cross_entropy * missing**FOCAL_GAMMA


def focal_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """What calling a query by an object's label saves: positive minus negative focal term. (Q, K),
    (N,) to (Q, N).
    """
    probability = class_logits.sigmoid()[:, labels]
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + LOG_EPS).log()
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + LOG_EPS).log()
    return positive - negative


def l1_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """Sum of the four absolute differences: boxes (M, 4) cxcywh to (M,)."""
    return (boxes - gt_boxes).abs().sum(-1)


def l1_cost(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """`l1_loss` of all pairs: (Q, 4), (N, 4) to (Q, N)."""
    return torch.cdist(boxes, gt_boxes, p=1)


def giou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """1 - generalised IoU of boxes (..., 4) cxcywh, with broadcasting, to (...)."""
    return 1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt_boxes))


def giou_cost(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """`giou_loss` of all pairs: (Q, 4), (N, 4) to (Q, N)."""
    return giou_loss(boxes[:, None], gt_boxes)


def mask_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over points: (M, P) logits and labels in [0, 1] to (M,)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def mask_bce_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """`mask_bce_loss` of all pairs, as `softplus(x) - x t`: (Q, P), (N, P) to (Q, N)."""
    total = F.softplus(logits).sum(-1, keepdim=True) - _sums_of_products(logits, labels)
    return total / logits.shape[-1]


def mask_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice loss over points, smoothed by 1: (M, P) logits and labels in [0, 1] to (M,)."""
    probability = logits.sigmoid()
    overlap = (probability * labels).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + labels.sum(-1) + 1)


def mask_dice_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """`mask_dice_loss` of all pairs: (Q, P), (N, P) to (Q, N)."""
    probability = logits.sigmoid()
    total = probability.sum(-1, keepdim=True) + labels.sum(-1)
    return 1 - (2 * _sums_of_products(probability, labels) + 1) / (total + 1)


def _sums_of_products(values: Tensor, labels: Tensor) -> Tensor:
    """(Q, P), (N, P) to (Q, N), in the dtype of the values even under autocast."""
    with torch.autocast(values.device.type, enabled=False):
        return values @ labels.t()
