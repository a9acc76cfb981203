"""Each loss beside its cost in matching (appendix B.1; matching: section 3.6).

Box losses broadcast, so that they are their own pairwise costs.

Shape key: Q queries, K classes, N objects, M matched pairs, P points; `...` leading dimensions.

Sums over points are not rounded to half by autocast: thousands of terms cancel in them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops.boxes import cxcywh_to_xyxy, generalized_iou, iou

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
LOG_EPS = 1e-8  # inside the logarithms of the class cost
# A squared IoU below this is not raised to 1: the box hardly touches its object.
LEAST_SQUARED_IOU = 1e-8
# In which a GPU adds the products of points. Few queries and objects with many points are one long
# sum for few of its processors; in groups they are many short ones (390 us; 93 with their copy).
POINT_GROUPS = 16


def focal_loss(
    class_logits: Tensor, is_target: Tensor, asked_probs: Tensor | None = None
) -> Tensor:
    """Sigmoid focal loss of each logit.

    Args:
        class_logits: (..., K).
        is_target: (..., K), 1 for the class of a matched query, else 0.
        asked_probs: (..., K) in [0, 1], the probability asked for, 0 where `is_target` is. With
            `position_targets` of the matched queries, this is the position-supervised loss of
            stable matching, |f_1(s) - p|^gamma BCE(p, f_1(s)) (equation 3 of arXiv 2304.04742).
            None: `is_target` itself.

    Returns:
        (..., K).
    """
    asked_probs = is_target if asked_probs is None else asked_probs
    probability = class_logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(class_logits, asked_probs, reduction="none")
    missing = (probability - asked_probs).abs()  # of a 0/1 target: 1 - probability of the truth
    alpha = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * is_target
    return alpha * cross_entropy * missing**FOCAL_GAMMA


@torch.no_grad()
def position_targets(
    boxes: Tensor,
    gt_boxes: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    learned: Tensor | None = None,
) -> Tensor:
    """f_1(s) = Phi(s^2) of stable matching (section 2.2 of arXiv 2304.04742), without a gradient.

    s is the IoU of a pair. Phi scales the pairs of a training example, one image in one output, so
    that the best has 1: of the paper's two scales that for models of 300 queries.

    Args:
        boxes: (O, B, Q, 4) cxcywh.
        gt_boxes: (M, 4) cxcywh, of the pairs' objects.
        place: output, image and query of the pairs, (M,) each; no query is in two pairs.
        learned: (M,) bool, whether a pair's box is learned; if not, it takes no part and has 1.
            None: all are.

    Returns:
        (M,) in [0, 1].
    """
    squared = iou(cxcywh_to_xyxy(boxes[place]), cxcywh_to_xyxy(gt_boxes)) ** 2
    if learned is not None:
        squared = squared * learned
    of_queries = squared.new_zeros(boxes.shape[:3]).index_put(place, squared)
    best = of_queries.amax(2).clamp(min=LEAST_SQUARED_IOU)  # (O, B)
    scaled = squared / best[place[:2]]
    return scaled if learned is None else torch.where(learned, scaled, 1.0)


def position_factor(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """f_2(s') = s'^0.5 of stable matching, with s' = (GIoU + 1) / 2 (section 2.3, 2304.04742).

    Args:
        boxes: (..., 4) cxcywh.
        gt_boxes: likewise, with broadcasting.

    Returns:
        (...) in [0, 1].
    """
    return (1 - giou_loss(boxes, gt_boxes) / 2).sqrt()


def focal_cost(label_logits: Tensor, factor: Tensor | None = None) -> Tensor:
    """Focal classification cost: the focal term of the label as target minus that as no target.

    Args:
        label_logits: (...), the class logits of queries at the labels of objects.
        factor: (...) in [0, 1], multiplies the probabilities; `position_factor` gives the
            position-modulated cost of stable matching (equation 4 of arXiv 2304.04742).

    Returns:
        (...).
    """
    probability = label_logits.sigmoid()
    if factor is not None:
        probability = probability * factor
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
    overlap = _sums_of_products(probability, labels)
    return 1 - torch.rsub(overlap, 1, alpha=-2) / (total + 1)  # 2 x + 1 in one launch


def _sums_of_products(values: Tensor, labels: Tensor) -> Tensor:
    """(..., Q, P), (..., N, P) to (..., Q, N), in the values' dtype even under autocast."""
    with torch.autocast(values.device.type, enabled=False):
        groups = math.gcd(values.shape[-1], POINT_GROUPS) if values.is_cuda else 1
        if groups == 1:
            return values @ labels.mT
        values, labels = (x.unflatten(-1, (groups, -1)).movedim(-2, 0) for x in (values, labels))
        return (values @ labels.mT).sum(0)
