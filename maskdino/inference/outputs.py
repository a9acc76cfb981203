"""What is made of the images that a user names: drawings, JSON files, one dataset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maskdino.inference.label_images import PanopticLabels, SemanticLabels
from maskdino.inference.labels import ClassThresholds, CocoLabels
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sources import json_beside
from maskdino.inference.tiles import TiledImage
from maskdino.visualization.images import ImageError, load_image
from maskdino.visualization.results import ImageResult


@dataclass(frozen=True)
class Wanted:
    """What is made of images besides drawings.

    Attributes:
        json: a JSON file beside each drawing.
        labels: where objects, segments or classes are collected, or None.
        thresholds: of classes, and `threshold` that of all others.
    """

    json: bool
    labels: CocoLabels | PanopticLabels | SemanticLabels | None
    thresholds: ClassThresholds
    threshold: float

    def read(self, path: Path, in_parts: bool) -> np.ndarray | TiledImage:
        """The image, or a reader of its parts.

        Raises:
            ImageError: it is none that can be read; names it.
        """
        if path.is_fifo() or path.is_char_device():
            raise ImageError(f"image {path} is no file, and can be read once only: write it to one")
        return TiledImage(path) if in_parts else load_image(path)

    def predict(
        self, predictor: MaskDINOPredictor, batch: list[tuple[Path, np.ndarray | TiledImage]]
    ) -> list[ImageResult]:
        """Results of images, without objects below the thresholds."""
        if predictor.options.slices is None:
            results = list(predictor.stream(x for _, x in batch if isinstance(x, np.ndarray)))
        else:
            results = [predictor.sliced(x, progress=True) for _, x in batch]
        return [
            self.thresholds.select(replace(result, name=str(path)), self.threshold)
            for (path, _), result in zip(batch, results, strict=True)
        ]

    def write(self, result: ImageResult, target: Path | None) -> None:
        """Writes all that is wanted."""
        if self.labels is not None:
            self.labels.add(Path(result.name), result)
        if target is None:
            return
        result.save(target)
        if self.json:
            result.save(json_beside(target))
