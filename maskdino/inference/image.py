"""An image on its way through the network: as it is read, and as its result is told.

Shape key: H, W pixels of an image; h, w as the network reads it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdino.categories import Categories
from maskdino.inference.options import PredictorOptions
from maskdino.system.errors import NotFiniteError
from maskdino.visualization.images import ImageSource, load_image, network_image
from maskdino.visualization.results import ImageResult


@dataclass(frozen=True)
class PreparedImage:
    """An image as the network reads it.

    Attributes:
        number: its place among those that were given.
        name: its path, or "image NUMBER".
        source: its path, or (H, W, 3).
        size: (H, W).
        tensor: (3, h, w) uint8.
        canvas: (height, width) of what the network pads it to.
    """

    number: int
    name: str
    source: ImageSource
    size: tuple[int, int]
    tensor: Tensor
    canvas: tuple[int, int]

    @staticmethod
    def read(
        number: int, source: ImageSource, channel_order: str, options: PredictorOptions
    ) -> PreparedImage:
        """Reads and resizes.

        Raises:
            ImageError: it is no image; names it.
        """
        image = load_image(source, channel_order)
        height, width = image.shape[:2]
        size, canvas = options.sizes_of((height, width))
        is_file = isinstance(source, str | os.PathLike)
        return PreparedImage(
            number,
            str(source) if is_file else f"image {number}",
            source if is_file else image,
            (height, width),
            network_image(image, size, options.image_format),
            canvas,
        )

    def result(self, found: dict, categories: Categories) -> ImageResult:
        """What `postprocess` found in it, compact.

        Raises:
            FloatingPointError: boxes are not finite.
        """
        parts: dict = {}
        if "instance" in found:
            objects = found["instance"]
            if not objects.pred_boxes.tensor.isfinite().all():
                raise NotFiniteError(
                    "the model predicts boxes that are not finite; see its weights"
                )
            objects.pred_boxes.clip(objects.image_size)
            order = objects.scores.argsort(descending=True, stable=True)
            names = {"scores": "scores", "class_ids": "pred_classes", "features": "features"}
            parts = {
                name: objects.get(field)[order].numpy()
                for name, field in names.items()
                if objects.has(field)
            }
            parts["boxes"] = objects.pred_boxes.tensor[order].numpy()
            if objects.has("pred_rles"):
                parts["rles"] = tuple(objects.pred_rles[i] for i in order.tolist())
        if "panoptic" in found:
            ids, segments = found["panoptic"]
            parts |= {"panoptic_ids": ids.numpy(), "segments": tuple(segments)}
        if "semantic" in found:
            labels = found["semantic"]
            if labels.ndim == 3:  # scores of classes; 255 means "ignored" in maps of 8 bits
                parts["class_scores"] = labels.half().cpu().numpy()
                labels = labels.argmax(0).to(torch.uint8 if len(labels) <= 255 else torch.int32)
            parts["label_map"] = labels.cpu().numpy()
        return ImageResult(self.name, self.size, categories, source=self.source, **parts)
