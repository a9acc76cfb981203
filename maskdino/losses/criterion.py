"""The training losses: matching, deep supervision, denoising (sections 3.5, 3.6, appendix B).

Shape key: O outputs, B images, Q queries, K class logits, C channels, N objects of the batch,
M matched pairs, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor, nn

from maskdino.losses.functional import focal_loss, giou_loss, l1_loss, mask_bce_loss, mask_dice_loss
from maskdino.losses.matcher import HybridMatcher
from maskdino.ops.points import PointSampler, mask_logits_at_points, sample_packed_masks
from maskdino.structures import Denoising, Matches, Predictions, Targets

BOX_TERMS = ("loss_l1", "loss_giou")
MASK_TERMS = ("loss_mask_bce", "loss_mask_dice")


class Criterion(nn.Module):
    """Weighted losses of all outputs.

    The result names a loss `<term><suffix>`: terms are loss_class, loss_l1, loss_giou,
    loss_mask_bce and loss_mask_dice; the suffix tells the output (none: last layer; `_layer2`;
    `_initial`: queries before the first layer; `_proposal`: the encoder's prediction), with
    `_denoising` in front for noised queries.
    """

    @configurable
    def __init__(
        self,
        *,
        matcher: HybridMatcher,
        points: PointSampler,
        weights: dict[str, float],
        cross_entropy: bool,
        no_object_weight: float,
        decouple_stuff_boxes: bool,
    ) -> None:
        """`weights` maps terms to weights; a term of weight 0 is not computed."""
        super().__init__()
        self.matcher, self.points = matcher, points
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self.cross_entropy, self.no_object_weight = cross_entropy, no_object_weight
        self.decouple_stuff_boxes = decouple_stuff_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node, masks = cfg.MODEL.MASK_DINO.LOSS, cfg.MODEL.MASK_DINO.MASK_ON
        if node.CLASSIFICATION not in ("focal", "cross_entropy"):
            raise ValueError(
                f"MODEL.MASK_DINO.LOSS.CLASSIFICATION is {node.CLASSIFICATION!r}; it must be "
                '"focal" or "cross_entropy"'
            )
        return {
            "matcher": HybridMatcher(cfg),
            "points": PointSampler(node.NUM_POINTS, node.OVERSAMPLE_RATIO, node.IMPORTANCE_RATIO),
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
        }

    def forward(
        self,
        predictions: Predictions,
        suffixes: Sequence[str],
        pixel_embedding: Tensor | None,
        targets: Targets,
        denoised: tuple[Denoising, Predictions, Sequence[str]] | None = None,
    ) -> dict[str, Tensor]:
        """Computes all losses.

        Args:
            predictions: of O outputs, to be matched.
            suffixes: the O names of these outputs.
            pixel_embedding: (B, C, H, W), or None without a mask branch.
            targets: the objects.
            denoised: what was noised, the predictions for it, and the names of its outputs.

        Returns:
            Weighted scalar losses.
        """
        pending = self.matcher.start(predictions, pixel_embedding, targets, self.points)
        normalizer = self._mean_objects(targets)
        losses = {}
        if denoised is not None:
            # Their pairs are known: these losses are computed while threads solve the matching.
            denoising, noised, names = denoised
            pairs = denoising_matches(denoising, targets, len(names))
            terms = self._terms(
                noised,
                pixel_embedding,
                targets,
                pairs,
                normalizer * denoising.num_groups,
                denoising.with_masks,
            )
            losses.update(self._weighted(terms, [f"_denoising{name}" for name in names]))
        terms = self._terms(
            predictions, pixel_embedding, targets, pending.result(), normalizer, True
        )
        losses.update(self._weighted(terms, suffixes))
        return losses

    def _weighted(self, terms: dict[str, Tensor], suffixes: Sequence[str]) -> dict[str, Tensor]:
        return {
            f"{term}{suffix}": loss
            for term, values in terms.items()
            for suffix, loss in zip(suffixes, (values * self.weights[term]).unbind(), strict=True)
        }

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
        with_masks: bool,
    ) -> dict[str, Tensor]:
        """Unweighted terms, each (O,)."""
        terms = {}
        if "loss_class" in self.weights:
            classify = self._cross_entropy if self.cross_entropy else self._focal
            terms["loss_class"] = classify(
                predictions.class_logits.float(), targets, matches, normalizer
            )
        if any(term in self.weights for term in BOX_TERMS):
            terms.update(self._boxes(predictions.boxes.float(), targets, matches, normalizer))
        if with_masks and any(term in self.weights for term in MASK_TERMS):
            terms.update(
                self._masks(
                    predictions.mask_embeddings, pixel_embedding, targets, matches, normalizer
                )
            )
        return terms

    def _computed(
        self, losses: dict[str, Callable[[Tensor, Tensor], Tensor]], found: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """The losses (M,) of matched pairs, without those of weight 0."""
        return {term: loss(found, wanted) for term, loss in losses.items() if term in self.weights}

    def _focal(
        self, logits: Tensor, targets: Targets, matches: Matches, normalizer: float | Tensor
    ) -> Tensor:
        is_target, one = torch.zeros_like(logits), logits.new_ones(())
        labels = targets.labels[matches.target]
        # The number 1 would be copied to the device, and the host would wait.
        is_target[matches.output, matches.image, matches.query, labels] = one
        return focal_loss(logits, is_target).sum((1, 2, 3)) / normalizer

    def _cross_entropy(
        self, logits: Tensor, targets: Targets, matches: Matches, _: float | Tensor
    ) -> Tensor:
        """Softmax cross-entropy; unmatched queries are of the last class, "no object"."""
        no_object = logits.shape[-1] - 1
        labels = torch.full(logits.shape[:-1], no_object, dtype=torch.int64, device=logits.device)
        labels[matches.output, matches.image, matches.query] = targets.labels[matches.target]
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(
            labels
        )
        weight = torch.where(labels == no_object, self.no_object_weight, 1.0)
        return (loss * weight).sum((1, 2)) / weight.sum((1, 2))

    def _boxes(
        self, boxes: Tensor, targets: Targets, matches: Matches, normalizer: float | Tensor
    ) -> dict[str, Tensor]:
        matched = boxes[matches.output, matches.image, matches.query]  # (M, 4)
        wanted = targets.boxes[matches.target]
        counts = targets.is_thing[matches.target] if self.decouple_stuff_boxes else 1.0
        losses = self._computed({"loss_l1": l1_loss, "loss_giou": giou_loss}, matched, wanted)
        return {
            term: _sum_by_output(loss * counts, matches.output, boxes.shape[0]) / normalizer
            for term, loss in losses.items()
        }

    def _masks(
        self,
        embeddings: Tensor,
        pixel_embedding: Tensor,
        targets: Targets,
        matches: Matches,
        normalizer: float | Tensor,
    ) -> dict[str, Tensor]:
        """Mask losses at points (`ops.points` makes the masks of an image a few at a time)."""
        matched = embeddings[matches.output, matches.image, matches.query]  # (M, C), image by image
        logits, labels = [], []
        for of_image, pixels, target in zip(
            matched.split(matches.pairs_per_image),
            pixel_embedding,
            matches.target.split(matches.pairs_per_image),
            strict=True,
        ):
            found, points = mask_logits_at_points(of_image, pixels, self.points.uncertain)
            logits.append(found)
            labels.append(sample_packed_masks(targets.masks, target, points))
        logits, labels = torch.cat(logits), torch.cat(labels)  # (M, P)
        counts = targets.has_mask[matches.target]
        terms = {"loss_mask_bce": mask_bce_loss, "loss_mask_dice": mask_dice_loss}
        losses = self._computed(terms, logits, labels)
        return {
            term: _sum_by_output(loss * counts, matches.output, embeddings.shape[0]) / normalizer
            for term, loss in losses.items()
        }


def denoising_matches(denoising: Denoising, targets: Targets, num_outputs: int) -> Matches:
    """The pairs of noised queries and their objects, in all outputs: known without matching."""
    pairs = []
    for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
        output, group, slot = np.indices((num_outputs, denoising.num_groups, count)).reshape(3, -1)
        query = group * denoising.slots_per_group + slot
        pairs.append(np.stack([output, np.full_like(output, image), query, first + slot]))
    return Matches.from_numpy(pairs, targets.boxes.device)


def _sum_by_output(losses: Tensor, output: Tensor, num_outputs: int) -> Tensor:
    return losses.new_zeros(num_outputs).index_add(0, output, losses)
