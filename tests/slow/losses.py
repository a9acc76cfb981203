"""The losses of the released models in slow loops, one matched pair at a time.

Shape key: N objects of an image, Q queries, P points; H, W pixels of the padded canvas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.slow.mask_dino import Noised, Prediction, bilinear

Pairs = list[tuple[int, int]]  # (query, object)


class Target(NamedTuple):
    """Objects of one image: classes, (N, 4) boxes, (N, H, W) masks."""

    labels: list[int]
    boxes: Tensor
    masks: Tensor


class Decoded(NamedTuple):
    """What the model said of one image in training."""

    predictions: list[Prediction]
    proposal: Prediction | None


def giou(box: Tensor, other: Tensor) -> Tensor:
    """Generalised intersection over union of boxes (..., 4)."""
    low, high = box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2
    other_low = other[..., :2] - other[..., 2:] / 2
    other_high = other[..., :2] + other[..., 2:] / 2

    def area(from_: Tensor, to: Tensor) -> Tensor:
        return (to - from_).clamp(min=0).prod(-1)

    overlap = area(torch.max(low, other_low), torch.min(high, other_high))
    hull = area(torch.min(low, other_low), torch.max(high, other_high))
    union = area(low, high) + area(other_low, other_high) - overlap
    return overlap / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def mask_bce(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over points (..., P) of the binary cross-entropy."""
    truth = truth.expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)


def dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice loss over points (..., P)."""
    probability = logits.sigmoid()
    both = (probability * truth).sum(-1)
    return 1 - (2 * both + 1) / (probability.sum(-1) + truth.sum(-1) + 1)


def focal(logits: Tensor, truth: Tensor) -> Tensor:
    """Focal loss of each logit, alpha 0.25 and gamma 2."""
    p = logits.sigmoid()
    positive = -0.25 * (1 - p) ** 2 * F.logsigmoid(logits)
    negative = -0.75 * p**2 * F.logsigmoid(-logits)
    return torch.where(truth, positive, negative)


def focal_cost(logits: Tensor) -> Tensor:
    """What a query pays for the class of these logits: positive minus negative part."""
    p = logits.sigmoid()
    positive = -0.25 * (1 - p) ** 2 * torch.log(p + 1e-8)
    return positive + 0.75 * p**2 * torch.log(1 - p + 1e-8)


class SlowCriterion:
    """All losses of a batch on one device.

    Args:
        config: nested mapping with released keys.
        targets: of each image.
        points: (P, 2), (x, y) in [0, 1]; every draw of points gives these.
        is_thing: of each class.
    """

    def __init__(
        self, config: dict, targets: list[Target], points: Tensor, is_thing: list[bool]
    ) -> None:
        self.options = config["MODEL"]["MaskDINO"]
        self.num_classes = config["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"]
        self.targets, self.points, self.is_thing = targets, points, is_thing
        self.truths = [bilinear(target.masks, points) for target in targets]  # (N, P) each
        self.num_objects = max(1, sum(len(target.labels) for target in targets))

    def noised(self) -> list[Noised] | None:
        """The denoising queries of each image: a group has a slot for every object.

        Where the released code has no answer, this project has: at least one group, and in a batch
        without objects one empty slot.
        """
        if self.options["DN"] == "no":
            return None
        most = max(len(target.labels) for target in self.targets)
        slots = max(1, most)
        groups = max(1, self.options["DN_NUM"] // slots) if most else 1
        queries = []
        for target in self.targets:
            objects = list(zip(target.labels, target.boxes, strict=True))
            queries.append(Noised(objects + [None] * (slots - len(objects)), groups))
        return queries

    def losses(self, images: list[Decoded], noised: list[Noised] | None) -> dict[str, Tensor]:
        """Weighted losses under released names."""
        losses = {}
        start = noised[0].number if noised else 0
        last = len(images[0].predictions) - 1
        for i in range(last + 1):
            if i < last and not self.options["DEEP_SUPERVISION"]:
                continue
            suffix = "" if i == last else f"_{i}"
            output = [image.predictions[i] for image in images]
            losses |= self.matched([x.of(slice(start, None)) for x in output], suffix)
            # Learned queries are their own initial prediction, without denoising queries.
            learned_initial = (
                i == 0 and self.options["INITIAL_PRED"] and not self.options["TWO_STAGE"]
            )
            if noised and not learned_initial:
                losses |= self.denoised([x.of(slice(start)) for x in output], noised, suffix)
        if images[0].proposal is not None:
            losses |= self.matched([image.proposal for image in images], "_interm")
        return losses

    def matched(self, output: list[Prediction], suffix: str) -> dict[str, Tensor]:
        """Losses of one output (a prediction for each image), matched on its own."""
        pairs = [self.match(prediction, image) for image, prediction in enumerate(output)]
        losses = self.class_loss(output, pairs, self.num_objects)
        losses |= self.box_losses(output, pairs, self.num_objects)
        losses |= self.mask_losses(output, pairs, self.num_objects)
        return {name + suffix: loss for name, loss in losses.items()}

    def denoised(
        self, output: list[Prediction], noised: list[Noised], suffix: str
    ) -> dict[str, Tensor]:
        """Losses of denoising queries, which know their objects."""
        slots, groups = len(noised[0].slots), noised[0].groups
        pairs = [
            [(group * slots + i, i) for group in range(groups) for i in range(len(target.labels))]
            for target in self.targets
        ]
        number = self.num_objects * groups
        losses = self.class_loss(output, pairs, number) | self.box_losses(output, pairs, number)
        if self.options["DN"] != "standard":
            losses |= self.mask_losses(output, pairs, number)
        return {f"{name}_dn{suffix}": loss for name, loss in losses.items()}

    @torch.no_grad()
    def match(self, prediction: Prediction, image: int) -> Pairs:
        """The cheapest assignment of an image's objects to queries."""
        target, truth = self.targets[image], self.truths[image]
        at_points = bilinear(prediction.mask_logits, self.points)
        weight = {
            term: self.options[f"COST_{term}_WEIGHT"]
            for term in ("CLASS", "BOX", "GIOU", "MASK", "DICE")
        }
        columns = []
        for i, label in enumerate(target.labels):
            box = target.boxes[i]
            columns.append(
                weight["CLASS"] * focal_cost(prediction.class_logits[:, label])
                + weight["BOX"] * (prediction.boxes - box).abs().sum(-1)
                - weight["GIOU"] * giou(prediction.boxes, box)
                + weight["MASK"] * mask_bce(at_points, truth[i])
                + weight["DICE"] * dice(at_points, truth[i])
            )
        if not columns:
            return []
        return list(zip(*linear_sum_assignment(torch.stack(columns, dim=1)), strict=True))

    def class_loss(
        self, output: list[Prediction], pairs: list[Pairs], number: int
    ) -> dict[str, Tensor]:
        """Focal loss, or cross-entropy with "no object" as the last class."""
        logits = torch.cat([prediction.class_logits for prediction in output])
        labels = []
        for prediction, target, matched in zip(output, self.targets, pairs, strict=True):
            label_of = {query: target.labels[i] for query, i in matched}
            labels += [
                label_of.get(query, self.num_classes)
                for query in range(len(prediction.class_logits))
            ]
        labels = torch.tensor(labels)
        if self.options["SEMANTIC_CE_LOSS"]:
            weights = torch.ones(self.num_classes + 1)
            weights[-1] = self.options["NO_OBJECT_WEIGHT"]
            loss = F.cross_entropy(logits, labels, weights)
        else:
            truth = labels[:, None] == torch.arange(self.num_classes)
            loss = focal(logits, truth).sum() / number
        return {"loss_ce": self.options["CLASS_WEIGHT"] * loss}

    def box_losses(
        self, output: list[Prediction], pairs: list[Pairs], number: int
    ) -> dict[str, Tensor]:
        """L1 and GIoU; with decoupled boxes, stuff has none."""
        l1 = giou_loss = sum(prediction.boxes.sum() * 0 for prediction in output)
        for prediction, target, matched in zip(output, self.targets, pairs, strict=True):
            for query, i in matched:
                if self.options["PANO_BOX_LOSS"] and not self.is_thing[target.labels[i]]:
                    continue
                box, truth = prediction.boxes[query], target.boxes[i]
                l1 = l1 + (box - truth).abs().sum()
                giou_loss = giou_loss + 1 - giou(box, truth)
        return {
            "loss_bbox": self.options["BOX_WEIGHT"] * l1 / number,
            "loss_giou": self.options["GIOU_WEIGHT"] * giou_loss / number,
        }

    def mask_losses(
        self, output: list[Prediction], pairs: list[Pairs], number: int
    ) -> dict[str, Tensor]:
        """Binary cross-entropy and dice at the points."""
        bce = dice_loss = sum(prediction.mask_logits.sum() * 0 for prediction in output)
        for prediction, truth, matched in zip(output, self.truths, pairs, strict=True):
            for query, i in matched:
                at_points = bilinear(prediction.mask_logits[query][None], self.points)[0]
                bce = bce + mask_bce(at_points, truth[i])
                dice_loss = dice_loss + dice(at_points, truth[i])
        return {
            "loss_mask": self.options["MASK_WEIGHT"] * bce / number,
            "loss_dice": self.options["DICE_WEIGHT"] * dice_loss / number,
        }
