"""Hybrid matching (section 3.6): assigns objects to queries by class, box and mask costs.

Shape key: O outputs, B images, Q queries, N objects of the batch, n objects of an image, P points,
C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from maskdino.losses.assignment import PendingMatches
from maskdino.losses.functional import (
    focal_cost,
    giou_loss,
    l1_loss,
    mask_bce_cost,
    mask_dice_cost,
    position_factor,
)
from maskdino.ops.points import (
    PointSampler,
    items_at_once,
    joined,
    sample_maps,
    sample_packed_masks,
)
from maskdino.structures import Matches, PackedMasks, Predictions, Targets, of_mask_branch

ELEMENTS_AT_ONCE = 1 << 25  # features and mask logits at points (128 MiB of float32)


@dataclass(frozen=True)
class CostWeights:
    """Weights of the terms of the matching cost; a term of weight 0 is not computed."""

    class_weight: float
    l1_weight: float
    giou_weight: float
    mask_bce_weight: float
    mask_dice_weight: float

    @property
    def boxes(self) -> bool:
        """Whether boxes are compared."""
        return self.l1_weight != 0 or self.giou_weight != 0

    @property
    def masks(self) -> bool:
        """Whether masks are compared."""
        return self.mask_bce_weight != 0 or self.mask_dice_weight != 0


class HybridMatcher:
    """Matches the queries of all outputs and images with objects, in one pass."""

    @configurable
    def __init__(
        self,
        *,
        weights: CostWeights,
        decouple_stuff_boxes: bool,
        points: PointSampler,
        position_modulated: bool = False,
    ) -> None:
        """Keeps the options.

        Args:
            weights: of the terms of the cost.
            decouple_stuff_boxes: the box cost of stuff is the mean box cost of the image's things.
            points: draws the points at which masks are compared, anew for each output and image;
                the queries of one share them.
            position_modulated: in the class cost, the probability of a query that does not fit the
                object's box counts less (`functional.position_factor`); that of stuff whose box
                cost is decoupled counts in full.
        """
        self.weights, self.decouple_stuff_boxes, self.points = weights, decouple_stuff_boxes, points
        self.position_modulated = position_modulated

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.MATCHER.

        Raises:
            ValueError: if MATCHER.POSITION_MODULATED is on, but boxes are not learned.
        """
        node, loss = cfg.MODEL.MASK_DINO.MATCHER, cfg.MODEL.MASK_DINO.LOSS
        if node.POSITION_MODULATED:
            check_boxes_are_learned(loss, "MATCHER.POSITION_MODULATED")
        masks = cfg.MODEL.MASK_DINO.MASK_ON
        weights = CostWeights(
            class_weight=node.CLASS_WEIGHT,
            l1_weight=node.L1_WEIGHT,
            giou_weight=node.GIOU_WEIGHT,
            mask_bce_weight=node.MASK_BCE_WEIGHT if masks else 0.0,
            mask_dice_weight=node.MASK_DICE_WEIGHT if masks else 0.0,
        )
        return {
            "weights": weights,
            "decouple_stuff_boxes": node.DECOUPLE_STUFF_BOXES,
            "points": PointSampler(loss.NUM_POINTS, loss.OVERSAMPLE_RATIO, loss.IMPORTANCE_RATIO),
            "position_modulated": node.POSITION_MODULATED,
        }

    def __call__(
        self, predictions: Predictions, pixel_embedding: Tensor | None, targets: Targets
    ) -> Matches:
        """Finds, for each output and image, the pairs whose costs have the smallest sum.

        A query and an object of its image are paired at most once; of Q queries and n objects,
        min(Q, n) are. There is no gradient. A cost that is not finite counts as very large and is
        named in the log with its image, so that a broken query is left alone while others are
        there; nothing is raised, as the losses, which are not finite then either, end the training.

        Args:
            predictions: of O outputs, (O, B, Q, ...).
            pixel_embedding: (B, C, H, W), or None without a mask branch.
            targets: the N objects of the B images.

        Returns:
            M pairs, image by image: M is the sum of O * min(Q, n) over images.
        """
        return self.start(predictions, pixel_embedding, targets).result()

    @torch.no_grad()
    def start(
        self, predictions: Predictions, pixel_embedding: Tensor | None, targets: Targets
    ) -> PendingMatches:
        """As a call, but threads solve while the caller goes on; `result()` waits for them."""
        image = torch.cat(
            [targets.labels.new_full((count,), i) for i, count in enumerate(targets.counts)]
        )  # (N,) of each object
        outputs, _, queries, _ = predictions.boxes.shape
        # A pair holds what is known of its query, and corners of boxes: a few objects at a time.
        at_once = items_at_once(8 * outputs * queries, image.device)
        few = [slice(i, i + at_once) for i in range(0, max(1, len(targets)), at_once)]
        if self.weights.class_weight:
            parts = [self._class_cost(predictions, targets, image, part) for part in few]
            costs = joined(parts, dim=2)
        else:
            costs = targets.boxes.new_zeros(outputs, queries, len(targets))
        if self.weights.boxes:
            parts = [self._box_cost(predictions, targets, image, part) for part in few]
            costs += self._with_stuff(joined(parts, dim=2), targets, image)
        if self.weights.masks:
            costs += self._mask_cost(predictions, pixel_embedding, targets)
        return PendingMatches(costs, targets)

    def _class_cost(
        self, predictions: Predictions, targets: Targets, image: Tensor, part: slice
    ) -> Tensor:
        """(O, Q, n): of giving some of the objects to a query of their image (N,)."""
        logits = predictions.class_logits[:, image[part], :, targets.labels[part]]  # (n, O, Q)
        logits, factor = logits.float().permute(1, 2, 0), None
        if self.position_modulated:
            boxes = _boxes_of_pairs(predictions, image[part])
            factor = position_factor(boxes, targets.boxes[part])
            if self.decouple_stuff_boxes:
                factor = torch.where(targets.is_thing[part], factor, 1.0)
        return self.weights.class_weight * focal_cost(logits, factor)

    def _box_cost(
        self, predictions: Predictions, targets: Targets, image: Tensor, part: slice
    ) -> Tensor:
        """(O, Q, n), likewise."""
        terms = ((self.weights.l1_weight, l1_loss), (self.weights.giou_weight, giou_loss))
        return _weighted_sum(terms, _boxes_of_pairs(predictions, image[part]), targets.boxes[part])

    def _with_stuff(self, cost: Tensor, targets: Targets, image: Tensor) -> Tensor:
        """Where it is decoupled, the box cost (O, Q, N) of stuff becomes that of the mean thing."""
        if not self.decouple_stuff_boxes:
            return cost
        of_things = cost.new_zeros(len(cost), len(targets.counts))  # (O, B)
        of_things = of_things.index_add(1, image, (cost * targets.is_thing).mean(1))
        things = cost.new_zeros(len(targets.counts))
        things = things.index_add(0, image, targets.is_thing.to(cost.dtype))
        mean_over_things = (of_things / things.clamp(min=1))[:, image]  # (O, N)
        return torch.where(targets.is_thing, cost, mean_over_things[:, None])

    def _mask_cost(
        self, predictions: Predictions, pixel_embedding: Tensor | None, targets: Targets
    ) -> Tensor:
        embeddings, pixel_embedding = of_mask_branch(predictions.mask_embeddings, pixel_embedding)
        outputs, _, queries, _ = embeddings.shape
        costs = []
        for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
            objects = targets.masks[first : first + count]
            costs.append(
                self._mask_cost_of_image(embeddings[:, image], pixel_embedding[image], objects)
                if count
                else targets.boxes.new_zeros(outputs, queries, 0)
            )
        return joined(costs, dim=2).mul_(targets.has_mask)

    def _mask_cost_of_image(
        self, embeddings: Tensor, pixel_embedding: Tensor, masks: PackedMasks
    ) -> Tensor:
        """Samples the pixel embedding, then multiplies: the same, and no mask map is made."""
        outputs, queries, channels = embeddings.shape
        places = self.points.sample_uniform(outputs, pixel_embedding.device)  # (O, P, 2)
        index = torch.arange(len(masks), device=pixel_embedding.device)
        labels = sample_packed_masks(masks, index, places.reshape(1, -1, 2))
        labels = labels.unflatten(1, (outputs, -1)).transpose(0, 1)  # (O, n, P)
        terms = (
            (self.weights.mask_bce_weight, mask_bce_cost),
            (self.weights.mask_dice_weight, mask_dice_cost),
        )
        pixel_embedding, costs = pixel_embedding[None].float(), []
        numbers = (queries + channels) * places.shape[1]
        at_once = min(items_at_once(numbers, places.device), max(1, ELEMENTS_AT_ONCE // numbers))
        for begin in range(0, outputs, at_once):
            few = slice(begin, begin + at_once)
            logits = _logits_at(embeddings[few], pixel_embedding, places[few])
            costs.append(_weighted_sum(terms, logits, labels[few]))
        return joined(costs)


def check_boxes_are_learned(loss: CfgNode, key: str) -> None:
    """Refuses a key below MODEL.MASK_DINO that compares boxes where they have no loss.

    Raises:
        ValueError: if they have none.
    """
    if loss.L1_WEIGHT == loss.GIOU_WEIGHT == 0:
        raise ValueError(
            f"MODEL.MASK_DINO.{key} compares boxes, but they are not learned: LOSS.L1_WEIGHT and "
            "LOSS.GIOU_WEIGHT are 0"
        )


def _boxes_of_pairs(predictions: Predictions, image: Tensor) -> Tensor:
    """(O, Q, N, 4), with the images (N,) of the objects."""
    return predictions.boxes[:, image].transpose(1, 2).float()


def _weighted_sum(
    terms: Iterable[tuple[float, Callable[[Tensor, Tensor], Tensor]]], found: Tensor, wanted: Tensor
) -> Tensor:
    """Sum of the terms, at least one of whose weights is not 0; the others are not computed."""
    first, *others = (weight * term(found, wanted) for weight, term in terms if weight)
    return sum(others, first)


def _logits_at(embeddings: Tensor, pixel_embedding: Tensor, points: Tensor) -> Tensor:
    """Logits (o, Q, P) of an image's queries (o, Q, C) at the points (o, P, 2) of each output."""
    features = sample_maps(pixel_embedding, points.reshape(1, -1, 2))[0]  # (C, o * P)
    features = features.to(embeddings.dtype).unflatten(1, (len(points), -1)).transpose(0, 1)
    return torch.bmm(embeddings, features).float()
