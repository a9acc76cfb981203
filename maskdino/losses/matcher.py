"""Hybrid matching (section 3.6): assigns objects to queries by class, box and mask costs.

Shape key: O outputs, B images, Q queries, N objects of the batch, n objects of an image, P points,
C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskdino.losses.functional import (
    focal_cost,
    giou_loss,
    l1_loss,
    mask_bce_cost,
    mask_dice_cost,
)
from maskdino.ops.points import PointSampler, sample_maps, sample_packed_masks
from maskdino.structures import Matches, PackedMasks, Predictions, Targets

logger = logging.getLogger(__name__)

IMPOSSIBLE = 1e6  # stands for a cost that is not finite
ELEMENTS_AT_ONCE = 1 << 25  # features and mask logits at points (128 MiB of float32)
_waiters = ThreadPoolExecutor(max_workers=1, thread_name_prefix="matching")
# SciPy's solver releases the interpreter lock.
_solvers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="assignment")


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
        return self.l1_weight != 0 or self.giou_weight != 0

    @property
    def masks(self) -> bool:
        return self.mask_bce_weight != 0 or self.mask_dice_weight != 0


class HybridMatcher:
    """Matches all outputs and images in one pass."""

    @configurable
    def __init__(self, *, weights: CostWeights, decouple_stuff_boxes: bool) -> None:
        """`decouple_stuff_boxes`: the box cost of stuff is the mean box cost of the things."""
        self.weights = weights
        self.decouple_stuff_boxes = decouple_stuff_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.MASK_DINO.MATCHER
        masks = cfg.MODEL.MASK_DINO.MASK_ON
        weights = CostWeights(
            class_weight=node.CLASS_WEIGHT,
            l1_weight=node.L1_WEIGHT,
            giou_weight=node.GIOU_WEIGHT,
            mask_bce_weight=node.MASK_BCE_WEIGHT if masks else 0.0,
            mask_dice_weight=node.MASK_DICE_WEIGHT if masks else 0.0,
        )
        return {"weights": weights, "decouple_stuff_boxes": node.DECOUPLE_STUFF_BOXES}

    @torch.no_grad()
    def start(
        self,
        predictions: Predictions,
        pixel_embedding: Tensor | None,
        targets: Targets,
        points: PointSampler,
    ) -> PendingMatches:
        """Computes the costs and begins to solve; the caller may go on meanwhile.

        Args:
            predictions: of O outputs.
            pixel_embedding: (B, C, H, W), or None without a mask branch.
            targets: the objects.
            points: draws the points that the queries of one output and image share.
        """
        image = torch.cat(
            [targets.labels.new_full((count,), i) for i, count in enumerate(targets.counts)]
        )  # (N,) of each object
        if self.weights.class_weight:
            costs = self.weights.class_weight * self._class_cost(predictions, targets, image)
        else:
            outputs, _, queries, _ = predictions.boxes.shape
            costs = targets.boxes.new_zeros(outputs, queries, len(targets))
        if self.weights.boxes:
            costs = costs + self._box_cost(predictions, targets, image)
        if self.weights.masks:
            costs = costs + self._mask_cost(predictions, pixel_embedding, targets, points)
        return PendingMatches(costs, targets)

    def _class_cost(self, predictions: Predictions, targets: Targets, image: Tensor) -> Tensor:
        """(O, Q, N): of giving an object to a query of its image, as all costs here."""
        logits = predictions.class_logits[:, image, :, targets.labels]  # (N, O, Q)
        return focal_cost(logits.float()).permute(1, 2, 0)

    def _box_cost(self, predictions: Predictions, targets: Targets, image: Tensor) -> Tensor:
        boxes = predictions.boxes[:, image].transpose(1, 2).float()  # (O, Q, N, 4)
        terms = ((self.weights.l1_weight, l1_loss), (self.weights.giou_weight, giou_loss))
        cost = _weighted_sum(terms, boxes, targets.boxes)
        if not self.decouple_stuff_boxes:
            return cost
        of_things = cost.new_zeros(len(cost), len(targets.counts))  # (O, B)
        of_things = of_things.index_add(1, image, (cost * targets.is_thing).mean(1))
        things = cost.new_zeros(len(targets.counts))
        things = things.index_add(0, image, targets.is_thing.to(cost.dtype))
        mean_over_things = (of_things / things.clamp(min=1))[:, image]  # (O, N)
        return torch.where(targets.is_thing, cost, mean_over_things[:, None])

    def _mask_cost(
        self,
        predictions: Predictions,
        pixel_embedding: Tensor,
        targets: Targets,
        points: PointSampler,
    ) -> Tensor:
        outputs, _, queries, _ = predictions.mask_embeddings.shape
        costs = []
        for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
            objects = targets.masks[first : first + count]
            embeddings, pixels = predictions.mask_embeddings[:, image], pixel_embedding[image]
            costs.append(
                self._mask_cost_of_image(embeddings, pixels, objects, points)
                if count
                else targets.boxes.new_zeros(outputs, queries, 0)
            )
        return torch.cat(costs, dim=2) * targets.has_mask

    def _mask_cost_of_image(
        self, embeddings: Tensor, pixels: Tensor, masks: PackedMasks, points: PointSampler
    ) -> Tensor:
        """Samples the pixel embedding, then multiplies: the same, and no mask map is made."""
        outputs, queries, channels = embeddings.shape
        places = points.uniform(outputs, pixels.device)  # (O, P, 2)
        index = torch.arange(len(masks), device=pixels.device)
        labels = sample_packed_masks(masks, index, places.reshape(1, -1, 2))
        labels = labels.unflatten(1, (outputs, -1)).transpose(0, 1)  # (O, n, P)
        terms = (
            (self.weights.mask_bce_weight, mask_bce_cost),
            (self.weights.mask_dice_weight, mask_dice_cost),
        )
        pixels, costs = pixels[None].float(), []
        at_once = max(1, ELEMENTS_AT_ONCE // ((queries + channels) * places.shape[1]))
        for begin in range(0, outputs, at_once):
            few = slice(begin, begin + at_once)
            logits = _logits_at(embeddings[few], pixels, places[few])
            costs.append(_weighted_sum(terms, logits, labels[few]))
        return torch.cat(costs)


def _weighted_sum(
    terms: Iterable[tuple[float, Callable[[Tensor, Tensor], Tensor]]], found: Tensor, wanted: Tensor
) -> Tensor:
    """Sum of the terms, at least one of whose weights is not 0; the others are not computed."""
    first, *others = (weight * term(found, wanted) for weight, term in terms if weight)
    return sum(others, first)


def _logits_at(embeddings: Tensor, pixels: Tensor, points: Tensor) -> Tensor:
    """Mask logits of an image's queries (o, Q, C) at the points (o, P, 2) of each output.

    Returns:
        (o, Q, P) float32.
    """
    features = sample_maps(pixels, points.reshape(1, -1, 2))[0]  # (C, o * P)
    features = features.to(embeddings.dtype).unflatten(1, (len(points), -1)).transpose(0, 1)
    return torch.bmm(embeddings, features).float()


class PendingMatches:
    """Costs on their way to the host, and assignments that threads work on."""

    def __init__(self, costs: Tensor, targets: Targets) -> None:
        """`costs` (O, Q, N): of giving an object to a query of its image."""
        self._targets, self._device = targets, costs.device
        self._copied = None
        if costs.is_cuda:
            self._costs = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True)
            self._costs.copy_(costs, non_blocking=True)
            # Of the device that copies, which need not be the current one.
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(costs.device))
        else:
            self._costs = costs.cpu()
        self._pairs = _waiters.submit(self._solve)

    def result(self) -> Matches:
        """Waits for the assignments."""
        return Matches.from_numpy(self._pairs.result(), self._device)

    def _solve(self) -> list[np.ndarray]:
        """For each image (4, pairs): output, image, query and target of each pair."""
        if self._copied is not None:
            # Without it, a thread's first call of CUDA makes a context on the first GPU.
            with torch.cuda.device(self._device):
                self._copied.synchronize()
        costs, pairs = self._costs.numpy(), []
        for image, (first, count) in enumerate(
            zip(self._targets.offsets, self._targets.counts, strict=True)
        ):
            of_image = _finite(costs[..., first : first + count], self._targets.names[image])
            solved = _solvers.map(linear_sum_assignment, of_image)
            pairs.append(
                [_pairs(output, image, first, *found) for output, found in enumerate(solved)]
            )
        return [np.concatenate(of_image, axis=1) for of_image in pairs]


def _pairs(
    output: int, image: int, first: int, query: np.ndarray, target: np.ndarray
) -> np.ndarray:
    return np.stack(
        [np.full_like(query, output), np.full_like(query, image), query, target + first]
    )


def _finite(costs: np.ndarray, name: str) -> np.ndarray:
    if np.isfinite(costs).all():
        return costs
    bad = int((~np.isfinite(costs)).sum())
    logger.warning(
        "%d of %d matching costs of image %s are not finite; matched as impossible",
        bad,
        costs.size,
        name,
    )
    return np.nan_to_num(costs, nan=IMPOSSIBLE, posinf=IMPOSSIBLE, neginf=IMPOSSIBLE)
