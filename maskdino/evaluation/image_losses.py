"""The loss of each image of a dataset: the largest are of wrong labels, or of hard images."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from maskdino.integration.extensions import MAPPER_REGISTRY
from maskdino.system.progress import Bar

SEED = 0  # of the points at which masks are compared: the same for each image


@dataclass(frozen=True)
class ImageLoss:
    """What a model's losses say of an image and its labels."""

    record: dict  # detectron2's dict of the image
    objects: int  # how many are labeled, crowds left out
    # Name -> weighted loss; those of boxes and masks, and the focal loss, are means over the
    # objects.
    terms: dict[str, float]

    @property
    def name(self) -> str:
        """Of the image's file."""
        return Path(self.record["file_name"]).name

    @property
    def total(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    @property
    def shares(self) -> dict[str, float]:
        """Part of the total that is a term's, in percent."""
        return {name: 100 * loss / (self.total or math.nan) for name, loss in self.terms.items()}


def image_losses(cfg: CfgNode, model: Any, dataset: str) -> list[ImageLoss]:
    """Computes the loss of each image by itself, those with the largest first.

    The model is a `maskdino.model.MaskDINO`. Its losses are those of training, of the decoder layer
    that is tested, by the same mapper, matcher and criterion, but without augmentation and noised
    queries, and at the same points for each image.

    Raises:
        DataError: an image or a label cannot be read, or the dataset has no labels.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (dataset,)  # of which some mappers ask the ignored label
    mapper = MAPPER_REGISTRY.find(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, is_train=False)
    gpus = [model.device] if model.device.type == "cuda" else []
    losses = []
    for record in Bar(DatasetCatalog.get(dataset), desc=f"losses of {dataset}", unit="image"):
        example = mapper(record)
        with torch.random.fork_rng(gpus):
            torch.manual_seed(SEED)
            terms = model.matched_losses([example])
        values = {name.removeprefix("loss_"): float(loss) for name, loss in terms.items()}
        losses.append(ImageLoss(record, len(example["instances"]), values))
    # What is not a number is looked at first.
    return sorted(losses, key=lambda loss: -math.inf if math.isnan(loss.total) else -loss.total)


def write_losses(path: Path, losses: Sequence[ImageLoss]) -> None:
    """Writes a CSV file: one line for each image, in the order given."""
    names = list(losses[0].terms) if losses else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "objects", "loss", *names])
        for loss in losses:
            numbers = (f"{value:.6g}" for value in (loss.total, *loss.terms.values()))
            writer.writerow([loss.record["file_name"], loss.objects, *numbers])
