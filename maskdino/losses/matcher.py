"""Hybrid matching (section 3.6): assigns objects to queries by class, box and mask costs.

Shape key: O outputs, B images, Q queries, N objects of the batch, n objects of an image, P points,
C channels.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskdino.losses.functional import focal_cost, giou_cost, l1_cost, mask_bce_cost, mask_dice_cost
from maskdino.ops.points import PointSampler, sample_maps, sample_packed_masks
from maskdino.structures import Matches, Predictions, Targets

logger = logging.getLogger(__name__)

IMPOSSIBLE = 1e6  # stands for a cost that is not finite
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
        costs = []
        for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
            if count:
                objects = slice(first, first + count)
                pixels = None if pixel_embedding is None else pixel_embedding[image]
                of_image = predictions.map(lambda x, image=image: x[:, image])
                costs.append(self._image_cost(of_image, pixels, targets, objects, points).flatten())
        device = predictions.class_logits.device
        flat = torch.cat(costs) if costs else torch.zeros(0, device=device)
        return PendingMatches(
            flat, targets, predictions.class_logits.shape[0], predictions.class_logits.shape[2]
        )

    def _image_cost(
        self,
        predictions: Predictions,
        pixels: Tensor | None,
        targets: Targets,
        objects: slice,
        points: PointSampler,
    ) -> Tensor:
        """Costs (O, Q, n) of one image."""
        weights = self.weights
        labels, gt_boxes = targets.labels[objects], targets.boxes[objects]
        costs = []
        for output, (logits, boxes) in enumerate(
            zip(predictions.class_logits.float(), predictions.boxes.float(), strict=True)
        ):
            cost = weights.class_weight * focal_cost(logits, labels)
            if weights.boxes:
                cost = cost + self._box_cost(boxes, gt_boxes, targets.is_thing[objects])
            if weights.masks:
                cost = cost + self._mask_cost(
                    predictions.mask_embeddings[output], pixels, targets, objects, points
                )
            costs.append(cost)
        return torch.stack(costs)

    def _box_cost(self, boxes: Tensor, gt_boxes: Tensor, is_thing: Tensor) -> Tensor:
        cost = self.weights.l1_weight * l1_cost(
            boxes, gt_boxes
        ) + self.weights.giou_weight * giou_cost(boxes, gt_boxes)
        if not self.decouple_stuff_boxes:
            return cost
        things = is_thing.sum() * cost.shape[0]
        mean_over_things = (cost * is_thing).sum() / things.clamp(min=1)
        return torch.where(is_thing, cost, mean_over_things)

    def _mask_cost(
        self,
        embeddings: Tensor,
        pixels: Tensor,
        targets: Targets,
        objects: slice,
        points: PointSampler,
    ) -> Tensor:
        """Samples the pixel embedding, then multiplies: the same, and no mask map is made."""
        places = points.uniform(1, pixels.device)  # (1, P, 2)
        features = sample_maps(pixels[None], places)[0].to(embeddings.dtype)  # (C, P)
        logits = (embeddings @ features).float()  # (Q, P)
        index = torch.arange(objects.start, objects.stop, device=pixels.device)
        labels = sample_packed_masks(targets.masks, index, places)  # (n, P)
        cost = self.weights.mask_bce_weight * mask_bce_cost(logits, labels)
        cost = cost + self.weights.mask_dice_weight * mask_dice_cost(logits, labels)
        return cost * targets.has_mask[objects]


class PendingMatches:
    """Costs on their way to the host, and assignments that threads work on."""

    def __init__(self, costs: Tensor, targets: Targets, num_outputs: int, num_queries: int) -> None:
        self._targets, self._num_outputs, self._num_queries = targets, num_outputs, num_queries
        self._device = costs.device
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
        costs, begin, pairs = self._costs.numpy(), 0, []
        for image, (first, count) in enumerate(
            zip(self._targets.offsets, self._targets.counts, strict=True)
        ):
            size = self._num_outputs * self._num_queries * count
            of_image = costs[begin : begin + size].reshape(
                self._num_outputs, self._num_queries, count
            )
            begin += size
            of_image = _finite(of_image, self._targets.names[image])
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
