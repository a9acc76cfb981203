"""Whether two forms of a model see the same objects in the same images.

In half precision all values differ a little. What counts is the result: which objects are found,
and where.

Shape key: B images, N objects of one of them, P pixels of its masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskdino.export.postprocess import results
from maskdino.model import MaskDINO
from maskdino.ops.boxes import iou
from maskdino.structures import Predictions
from maskdino.system.words import counted

LEAST_SCORE = 0.3  # of objects that count
LEEWAY = 0.05  # an object may have so much less in the other form
LEAST_IOU = 0.9
LEAST_SHARE = 0.95  # of the objects that must be the same


@dataclass(frozen=True)
class Objects:
    """What is seen in one image: objects, segments, or the regions of classes.

    Attributes:
        labels: (N,).
        scores: (N,).
        shapes: masks (N, P) bool, or without them boxes (N, 4) x0, y0, x1, y1.
    """

    labels: Tensor
    scores: Tensor
    shapes: Tensor

    def least(self, score: float) -> Objects:
        """Those with at least this score."""
        chosen = self.scores >= score
        return Objects(self.labels[chosen], self.scores[chosen], self.shapes[chosen])


@dataclass(frozen=True)
class Agreement:
    """How many objects two forms of a model share, over all images so far.

    Attributes:
        expected: objects that the first one sees.
        same: those of them that the second one sees: the same class, IoU of 0.9 and more.
        new: objects of the second one that the first one does not see.
    """

    expected: int = 0
    same: int = 0
    new: int = 0

    @property
    def share(self) -> float:
        """Objects that are the same, as a share of the objects of both forms."""
        return self.same / max(self.expected + self.new, 1)

    def __str__(self) -> str:
        return (
            f"{self.same} of {counted(self.expected, 'object')} are the same (class, and IoU "
            f"{LEAST_IOU} and more), {self.new} new"
        )

    def and_of(self, expected: Objects, found: Objects) -> Agreement:
        """The agreement with the objects of one more image counted in."""
        ours, theirs = expected.least(LEAST_SCORE), found.least(LEAST_SCORE)
        new = len(theirs.labels) - _pairs(theirs, expected.least(LEAST_SCORE - LEEWAY))
        same = _pairs(ours, found.least(LEAST_SCORE - LEEWAY))
        return Agreement(self.expected + len(ours.labels), self.same + same, self.new + new)


def _pairs(some: Objects, others: Objects) -> int:
    """How many of some objects have a partner among others, each of which has one at most."""
    if some.shapes.dtype == torch.bool:
        ours, theirs = (objects.shapes.float() for objects in (some, others))
        common = ours @ theirs.T
        overlap = common / (ours.sum(1)[:, None] + theirs.sum(1) - common).clamp(min=1)
    else:
        overlap = iou(some.shapes[:, None], others.shapes)
    equal = (overlap >= LEAST_IOU) & (some.labels[:, None] == others.labels)
    rows, columns = linear_sum_assignment(equal.numpy(), maximize=True)
    return int(equal[rows, columns].sum())


def objects_of(
    model: MaskDINO, outputs: str, arguments: list[Tensor], found: Mapping[str, Tensor]
) -> list[Objects]:
    """The objects in what a program gave for a batch.

    Args:
        model: says how predictions become results.
        outputs: of the program, as of `maskdino.export.trace.ExportOptions`.
        arguments: of the program: (B, 3, height, width), and the sizes of the images.
        found: its outputs.
    """
    values: Mapping[str, Any] = {name: value.cpu() for name, value in found.items()}
    if outputs == "predictions":
        outputs, values = _results(model, arguments[0], values)
    if outputs == "instance":
        shapes = values["masks"].flatten(2) if "masks" in values else values["boxes"]
        return [
            Objects(*image)
            for image in zip(values["labels"], values["scores"], shapes, strict=True)
        ]
    if outputs == "panoptic":
        numbers = 1 + torch.arange(values["segment_labels"].shape[1])
        return [
            Objects(labels, scores, numbers[:, None] == ids.flatten())
            for labels, scores, ids in zip(
                *(values[f"segment_{name}"] for name in ("labels", "scores", "ids")), strict=True
            )
        ]
    regions = []
    for image in values["class_maps"].argmax(1).flatten(1):
        labels = image.unique()
        regions.append(Objects(labels, torch.ones(len(labels)), labels[:, None] == image))
    return regions


def _results(
    model: MaskDINO, images: Tensor, values: Mapping[str, Tensor]
) -> tuple[str, Mapping[str, Tensor]]:
    """The results of the first task that a model does, out of its predictions."""
    predictions = Predictions(
        values["class_logits"], values["boxes"], values.get("mask_embeddings")
    )
    pixels, options = values.get("pixel_embedding"), model.inference
    canvas = (images.shape[2], images.shape[3])
    size = canvas if pixels is None else (pixels.shape[2], pixels.shape[3])
    sizes = torch.tensor([canvas] * len(images))
    task, is_thing = options.tasks[0], model.is_thing.cpu()
    return task, results(task, predictions, pixels, sizes, canvas, size, options, is_thing)
