"""Semantic segmentation with test-time augmentation: several sizes, each also mirrored.

Shape key: K classes, H, W pixels of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from torch import Tensor, nn

from maskdino.data.reading import read_image


class AugmentedSemanticModel(nn.Module):
    """Gives the mean of a model's `sem_seg` over versions of an image.

    Every version is made from the file, so that none is resized twice.
    """

    @configurable
    def __init__(
        self,
        model: nn.Module,
        *,
        min_sizes: Sequence[int],
        max_size: int,
        flip: bool,
        image_format: str,
    ) -> None:
        """Takes the settings of TEST.AUG, and a model that predicts `sem_seg`.

        Sizes are pixels: shortest edges, at least one (ValueError), and the limit of the longest.
        """
        super().__init__()
        if not min_sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty; it must name at least one size")
        self.model = model
        self.resizes = [T.ResizeShortestEdge(size, max_size) for size in min_sizes]
        self.flips = (False, True) if flip else (False,)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Reads TEST.AUG and INPUT.FORMAT; ValueError unless the model is semantic alone."""
        test = cfg.MODEL.MASK_DINO.TEST
        if not test.SEMANTIC_ON or test.INSTANCE_ON or test.PANOPTIC_ON:
            raise ValueError(
                "TEST.AUG.ENABLED averages semantic maps, but MODEL.MASK_DINO.TEST has "
                f"SEMANTIC_ON {test.SEMANTIC_ON}, INSTANCE_ON {test.INSTANCE_ON}, PANOPTIC_ON "
                f"{test.PANOPTIC_ON}; set them to True, False, False or switch TEST.AUG off"
            )
        return {
            "model": model,
            "min_sizes": cfg.TEST.AUG.MIN_SIZES,
            "max_size": cfg.TEST.AUG.MAX_SIZE,
            "flip": cfg.TEST.AUG.FLIP,
            "image_format": cfg.INPUT.FORMAT,
        }

    def forward(self, batched_inputs: list[dict]) -> list[dict[str, Tensor]]:
        """Predicts.

        Args:
            batched_inputs: detectron2's dicts with `file_name`; `height` and `width` of the output,
                if they differ from the file's. An `image` in them is not used.

        Returns:
            One dict for each image, with `sem_seg` (K, H, W) float32.

        Raises:
            DataError: a file cannot be read.
        """
        return [{"sem_seg": self._mean_scores(inputs)} for inputs in batched_inputs]

    @torch.no_grad()
    def _mean_scores(self, inputs: dict) -> Tensor:
        image = read_image(inputs["file_name"], self.image_format)
        height, width = (
            int(inputs.get(key, size))
            for key, size in zip(("height", "width"), image.shape[:2], strict=True)
        )
        total: Tensor | None = None
        number = 0
        for version, flipped in self._versions(image):
            example = {"image": version, "height": height, "width": width}
            scores = self.model([example])[0]["sem_seg"]
            scores = scores.flip(-1) if flipped else scores
            total = scores if total is None else total.add_(scores)
            number += 1
        assert total is not None  # the constructor refuses to have no size
        return total / number

    def _versions(self, image: np.ndarray) -> Iterator[tuple[Tensor, bool]]:
        """Each version, (C, h, w) uint8, and whether it is mirrored."""
        for resize in self.resizes:
            resized = resize.get_transform(image).apply_image(image)
            pixels = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
            for flipped in self.flips:
                yield (pixels.flip(-1) if flipped else pixels), flipped
