"""Each loss beside its cost in matching (appendix B.1; matching: section 3.6).

Box losses broadcast, so that they are their own pairwise costs.

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
    missing = (probability - is_target).abs()  # 1 - probability of the truth
    alpha = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * is_target
    return alpha * cross_entropy * missing**FOCAL_GAMMA


def focal_cost(label_logits: Tensor) -> Tensor:
    """Focal classification cost: the focal term of the label as target minus that as no target.

    Args:
        label_logits: (...), the class logits of queries at the labels of objects.

    Returns:
        (...).
    """
    probability = label_logits.sigmoid()
    missing = 1 - probability
    minus_positive = FOCAL_ALPHA * missing**FOCAL_GAMMA * (probability + LOG_EPS).log()
    minus_negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * (missing + LOG_EPS).log()
    return minus_negative - minus_positive


def l1_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """Sum of the absolute differences of boxes (..., 4) cxcywh, with broadcasting, to (...)."""
    return (boxes - gt_boxes).abs().sum(-1)


def giou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """1 - generalized IoU of boxes (..., 4) cxcywh, with broadcasting, to (...)."""
    return 1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(gt_boxes))


def mask_bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over points: (M, P) logits and labels in [0, 1] to (M,)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def mask_bce_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """`mask_bce_loss` of all pairs: (..., Q, P), (..., N, P) to (..., Q, N)."""
    # Of one point: softplus(x) - x t.
    total = F.softplus(logits).sum(-1, keepdim=True) - _sums_of_products(logits, labels)
    return total / logits.shape[-1]


def mask_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice loss over points, smoothed by 1: (M, P) logits and labels in [0, 1] to (M,)."""
    probability = logits.sigmoid()
    overlap = (probability * labels).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + labels.sum(-1) + 1)


def mask_dice_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """`mask_dice_loss` of all pairs: (..., Q, P), (..., N, P) to (..., Q, N)."""
    probability = logits.sigmoid()
    total = probability.sum(-1, keepdim=True) + labels.sum(-1)[..., None, :]
    return 1 - (2 * _sums_of_products(probability, labels) + 1) / (total + 1)


def _sums_of_products(values: Tensor, labels: Tensor) -> Tensor:
    """(..., Q, P), (..., N, P) to (..., Q, N), in the values' dtype even under autocast."""
    with torch.autocast(values.device.type, enabled=False):
        return values @ labels.mT
