"""The training losses: matching, deep supervision, denoising (sections 3.5, 3.6, appendix B).

Shape key: O outputs, B images, Q queries, K class logits, C channels, N objects of the batch,
M matched pairs, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor

from maskdino.losses.functional import (
    focal_loss,
    giou_loss,
    l1_loss,
    mask_bce_loss,
    mask_dice_loss,
    position_targets,
)
from maskdino.losses.matcher import HybridMatcher, check_boxes_are_learned
from maskdino.ops.points import (
    PointSampler,
    joined,
    mask_logits_at_points,
    sample_packed_masks,
)
from maskdino.ops.recompute import Recomputing, recomputed
from maskdino.structures import (
    DenoisedOutputs,
    Matches,
    Outputs,
    Predictions,
    Targets,
    of_mask_branch,
)

State = TypeVar("State")
PairLoss = Callable[[Tensor, Tensor], Tensor]

# A new loss is a function here and its weight in `Criterion.from_config`.
BOX_LOSSES: dict[str, PairLoss] = {  # boxes (M, 4) and those of their objects to (M,)
    "loss_l1": l1_loss,
    "loss_giou": giou_loss,
}
MASK_LOSSES: dict[str, PairLoss] = {  # logits (M, P) and labels in [0, 1] at points to (M,)
    "loss_mask_bce": mask_bce_loss,
    "loss_mask_dice": mask_dice_loss,
}
INITIAL, PROPOSAL, DENOISING = "_initial", "_proposal", "_denoising"  # parts of losses' names


class Criterion(Recomputing):
    """Weighted losses of all outputs.

    The result names a loss `<term><output>`: terms are loss_class, loss_l1, loss_giou,
    loss_mask_bce and loss_mask_dice; the output is nothing (last layer), `_layer2`, `_initial`
    (queries before the first layer) or `_proposal` (the encoder's prediction), with `_denoising` in
    front for noised queries.
    """

    @configurable
    def __init__(
        self,
        *,
        matcher: HybridMatcher,
        points: PointSampler,
        weights: Mapping[str, float],
        cross_entropy: bool,
        no_object_weight: float,
        decouple_stuff_boxes: bool,
        deep_supervision: bool,
        supervise_initial: bool,
        position_supervised: bool = False,
    ) -> None:
        """Keeps the options.

        Args:
            matcher: pairs queries with objects.
            points: draws the points at which the mask losses look.
            weights: of the terms; a term of weight 0 is not computed.
            cross_entropy: softmax cross-entropy instead of the focal loss.
            no_object_weight: weight of unmatched queries in the cross-entropy.
            decouple_stuff_boxes: stuff has no box losses (section 3.6).
            deep_supervision: losses for every decoder layer, not only for the last.
            supervise_initial: losses for the queries before the first layer too.
            position_supervised: the focal loss asks a matched query for the scaled IoU of its box
                instead of 1 (`functional.position_targets`), noised queries too; for stuff whose
                box has no loss still for 1.
        """
        super().__init__()
        self.matcher, self.points = matcher, points
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.cross_entropy, self.no_object_weight = cross_entropy, no_object_weight
        self.decouple_stuff_boxes = decouple_stuff_boxes
        self.deep_supervision, self.supervise_initial = deep_supervision, supervise_initial
        self.position_supervised = position_supervised

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.LOSS.

        Raises:
            ValueError: if LOSS.CLASSIFICATION is unknown, or LOSS.POSITION_SUPERVISED is on without
                the focal loss, or without learned boxes.
        """
        node, masks = cfg.MODEL.MASK_DINO.LOSS, cfg.MODEL.MASK_DINO.MASK_ON
        if node.CLASSIFICATION not in ("focal", "cross_entropy"):
            raise ValueError(
                f"MODEL.MASK_DINO.LOSS.CLASSIFICATION is {node.CLASSIFICATION!r}; it must be "
                '"focal" or "cross_entropy"'
            )
        if node.POSITION_SUPERVISED:
            check_boxes_are_learned(node, "LOSS.POSITION_SUPERVISED")
            if node.CLASSIFICATION != "focal":
                raise ValueError(
                    "MODEL.MASK_DINO.LOSS.POSITION_SUPERVISED is a form of the focal loss, but "
                    f"LOSS.CLASSIFICATION is {node.CLASSIFICATION!r}"
                )
        matcher = HybridMatcher(cfg)
        return {
            "matcher": matcher,
            "points": matcher.points,
            "weights": {
                "loss_class": node.CLASS_WEIGHT,
                "loss_l1": node.L1_WEIGHT,
                "loss_giou": node.GIOU_WEIGHT,
                "loss_mask_bce": node.MASK_BCE_WEIGHT if masks else 0.0,
                "loss_mask_dice": node.MASK_DICE_WEIGHT if masks else 0.0,
            },
            "cross_entropy": node.CLASSIFICATION == "cross_entropy",
            "no_object_weight": node.NO_OBJECT_WEIGHT,
            "decouple_stuff_boxes": node.DECOUPLE_STUFF_BOXES,
            "deep_supervision": node.DEEP_SUPERVISION,
            "supervise_initial": node.SUPERVISE_INITIAL,
            "position_supervised": node.POSITION_SUPERVISED,
        }

    def supervised(self, states: Sequence[State]) -> dict[str, State]:
        """Of states before the first layer and after each, those with losses, by their names."""
        names = (INITIAL, *(f"_layer{i}" for i in range(1, len(states) - 1)), "")
        first = 0 if self.supervise_initial else 1
        if not self.deep_supervision:
            first = len(states) - 1
        return dict(zip(names[first:], states[first:], strict=True))

    def forward(
        self,
        outputs: Outputs,
        proposals: Predictions | None,
        denoised: DenoisedOutputs | None,
        pixel_embedding: Tensor | None,
        targets: Targets,
    ) -> dict[str, Tensor]:
        """Computes all losses.

        Args:
            outputs: of the decoder, to be matched.
            proposals: predictions (B, Q, ...) of the selected tokens, to be matched too; None where
                queries are learned.
            denoised: outputs of noised queries; None without denoising.
            pixel_embedding: (B, C, H, W), or None without a mask branch.
            targets: the objects.

        Returns:
            Weighted scalar losses.
        """
        if proposals is not None:
            outputs = outputs.plus(proposals, PROPOSAL)
        elif denoised is not None:
            # As in the released models: beside learned queries, what noised ones predict before the
            # first layer is not supervised.
            denoised = replace(denoised, outputs=denoised.outputs.without(INITIAL))
        if pixel_embedding is not None:
            # Of channels-last maps points are read, and gradients added, at half the speed.
            pixel_embedding = pixel_embedding.contiguous()
        pending = self.matcher.start(outputs.predictions, pixel_embedding, targets)
        normalizer = self._mean_objects(targets)
        losses = {}
        if denoised is not None:
            # Their pairs are known: these losses are computed while threads solve the matching.
            noised, denoising = denoised.outputs, denoised.denoising
            terms = self._terms(
                noised.predictions,
                pixel_embedding,
                targets,
                denoising_matches(denoised, targets),
                normalizer * denoising.num_groups,
                with_masks=denoising.with_masks,
            )
            losses.update(self._weighted(terms, [DENOISING + name for name in noised.names]))
        terms = self._terms(
            outputs.predictions, pixel_embedding, targets, pending.result(), normalizer
        )
        return losses | self._weighted(terms, outputs.names)

    def _weighted(self, terms: dict[str, Tensor], suffixes: Sequence[str]) -> dict[str, Tensor]:
        if not terms:
            return {}
        names = [f"{term}{suffix}" for term in terms for suffix in suffixes]
        weighted = torch.stack([values * self.weights[term] for term, values in terms.items()])
        return dict(zip(names, weighted.flatten().unbind(), strict=True))

    def _mean_objects(self, targets: Targets) -> float:
        """Mean number of objects per process, at least 1."""
        if comm.get_world_size() == 1:
            return max(1.0, float(len(targets)))
        total = targets.boxes.new_full((1,), float(len(targets)))
        torch.distributed.all_reduce(total)
        return (total / comm.get_world_size()).clamp(min=1)

    def _terms(
        self,
        predictions: Predictions,
        pixel_embedding: Tensor | None,
        targets: Targets,
        matches: Matches,
        normalizer: float | Tensor,
        *,
        with_masks: bool = True,
    ) -> dict[str, Tensor]:
        """Unweighted terms, each (O,)."""
        terms = {}
        if "loss_class" in self.weights:
            classify = self._cross_entropy if self.cross_entropy else self._focal
            terms["loss_class"] = classify(predictions, targets, matches, normalizer)
        of_pairs: dict[str, Tensor] = {}
        if self.weights.keys() & BOX_LOSSES.keys():
            of_pairs |= self._boxes(predictions.boxes.float(), targets, matches)
        if with_masks and self.weights.keys() & MASK_LOSSES.keys():
            of_pairs |= self._masks(predictions, pixel_embedding, targets, matches)
        if of_pairs:
            losses = torch.stack(list(of_pairs.values()), dim=1)  # (M, terms)
            total = losses.new_zeros(len(predictions.boxes), len(of_pairs))
            total = total.index_add(0, matches.output, losses) / normalizer
            terms |= dict(zip(of_pairs, total.unbind(1), strict=True))
        return terms

    def _of_pairs(
        self, losses: dict[str, PairLoss], found: Tensor, wanted: Tensor, counts: Tensor | float
    ) -> dict[str, Tensor]:
        """The losses (M,) of those matched pairs that count, without terms of weight 0."""
        used = {term: loss for term, loss in losses.items() if term in self.weights}
        return {term: loss(found, wanted) * counts for term, loss in used.items()}

    def _focal(
        self,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        normalizer: float | Tensor,
    ) -> Tensor:
        logits = predictions.class_logits.float()
        is_target, one, asked_probs = torch.zeros_like(logits), logits.new_ones(()), None
        place = matches.output, matches.image, matches.query
        of_label = (*place, targets.labels[matches.target])
        # The number 1 would be copied to the device, and the host would wait.
        is_target[of_label] = one
        if self.position_supervised:
            learned = targets.is_thing[matches.target] if self.decouple_stuff_boxes else None
            boxes, wanted = predictions.boxes.float(), targets.boxes[matches.target]
            asked_probs = torch.zeros_like(logits)
            asked_probs[of_label] = position_targets(boxes, wanted, place, learned)
        return focal_loss(logits, is_target, asked_probs).sum((1, 2, 3)) / normalizer

    def _cross_entropy(
        self, predictions: Predictions, targets: Targets, matches: Matches, _: float | Tensor
    ) -> Tensor:
        """Softmax cross-entropy; unmatched queries are of the last class, "no object"."""
        logits = predictions.class_logits.float()
        no_object = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:-1], no_object, dtype=torch.int64, device=logits.device)
        labels[matches.output, matches.image, matches.query] = targets.labels[matches.target]
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(
            labels
        )
        weight = torch.where(labels == no_object, self.no_object_weight, 1.0)
        return (loss * weight).sum((1, 2)) / weight.sum((1, 2))

    def _boxes(self, boxes: Tensor, targets: Targets, matches: Matches) -> dict[str, Tensor]:
        matched = boxes[matches.output, matches.image, matches.query]  # (M, 4)
        wanted = targets.boxes[matches.target]
        counts = targets.is_thing[matches.target] if self.decouple_stuff_boxes else 1.0
        return self._of_pairs(BOX_LOSSES, matched, wanted, counts)

    def _masks(
        self,
        predictions: Predictions,
        pixel_embedding: Tensor | None,
        targets: Targets,
        matches: Matches,
    ) -> dict[str, Tensor]:
        """Mask losses at points (`ops.points` makes the masks of an image a few at a time)."""
        embeddings, pixel_embedding = of_mask_branch(predictions.mask_embeddings, pixel_embedding)
        matched = embeddings[matches.output, matches.image, matches.query]  # (M, C), image by image
        sampled = [
            mask_logits_at_points(of_image, pixels, self.points.sample_uncertain)
            for of_image, pixels in zip(
                matched.split(matches.pairs_per_image), pixel_embedding, strict=True
            )
        ]
        args = sampled, targets, matches
        return recomputed(self._at_points, *args, when=self.recomputes("all"))

    def _at_points(
        self, sampled: list[tuple[Tensor, Tensor]], targets: Targets, matches: Matches
    ) -> dict[str, Tensor]:
        """Mask losses of the logits and points of each image."""
        of_images = matches.target.split(matches.pairs_per_image)
        labels = [
            sample_packed_masks(targets.masks, target, points)
            for (_, points), target in zip(sampled, of_images, strict=True)
        ]
        logits = joined([of_image for of_image, _ in sampled])
        counts = targets.has_mask[matches.target]
        args = MASK_LOSSES, logits, joined(labels), counts
        # To read labels takes as long as all the rest together.
        return recomputed(self._of_pairs, *args, when=self.recomputes("cheap"))


def denoising_matches(denoised: DenoisedOutputs, targets: Targets) -> Matches:
    """The pairs of noised queries and their objects, in all outputs: known without matching."""
    denoising, num_outputs, pairs = denoised.denoising, len(denoised.outputs.names), []
    for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
        output, group, slot = np.indices((num_outputs, denoising.num_groups, count)).reshape(3, -1)
        query = group * denoising.slots_per_group + slot
        pairs.append(np.stack([output, np.full_like(output, image), query, first + slot]))
    return Matches.from_numpy(pairs, targets.boxes.device)
