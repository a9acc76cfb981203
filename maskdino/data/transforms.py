"""Augmentations: what detectron2 has is used, what it lacks is here.

All randomness is that of NumPy's, and detectron2's of Python's, global generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from maskdino.data.augmentations import own_augmentations

PADDING = 128.0  # gray, about the mean of photographs
FLIPS = ("none", "horizontal", "vertical", "both", "dihedral")


class LargeScaleJitter(T.Augmentation):
    """Resizes by a random factor, then crops or pads to a fixed size.

    Crops are random; padding is at the right and at the bottom. A factor of 1 makes the image just
    fit into `size`, or into `fit`. Horizontal and vertical position of the crop are independent,
    and no side shrinks below one pixel (detectron2's ResizeScale and FixedSizeCrop differ in both).
    """

    def __init__(
        self,
        size: Sequence[int],
        min_scale: float,
        max_scale: float,
        fit: Sequence[int] | None = None,
    ) -> None:
        """Checks the arguments.

        Args:
            size: (height, width) of the result, in pixels.
            min_scale: smallest factor.
            max_scale: largest factor.
            fit: (height, width) that a factor of 1 fits the image into; None: `size`.

        Raises:
            ValueError: the size is not two positive numbers, or not 0 < min_scale <= max_scale.
        """
        super().__init__()
        if len(size) != 2 or min(size) < 1 or not 0 < min_scale <= max_scale:
            raise ValueError(
                f"large-scale jitter cannot have size {size} and scales {min_scale} to {max_scale}"
            )
        self.size = tuple(size)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.fit = self.size if fit is None else tuple(fit)

    def get_transform(self, image: np.ndarray) -> T.TransformList:
        """Draws factor and crop for an image (H, W, C)."""
        height, width = image.shape[:2]
        target_height, target_width = self.size
        scale = np.random.uniform(self.min_scale, self.max_scale)
        scale *= min(self.fit[0] / height, self.fit[1] / width)
        new_height, new_width = max(round(height * scale), 1), max(round(width * scale), 1)
        crop_height, crop_width = min(new_height, target_height), min(new_width, target_width)
        top = np.random.randint(new_height - crop_height + 1)
        left = np.random.randint(new_width - crop_width + 1)
        pad_right, pad_bottom = target_width - crop_width, target_height - crop_height
        return T.TransformList(
            [
                T.ResizeTransform(height, width, new_height, new_width),
                T.CropTransform(left, top, crop_width, crop_height, new_width, new_height),
                T.PadTransform(
                    0, 0, pad_right, pad_bottom, crop_width, crop_height, pad_value=PADDING
                ),
            ]
        )


class Always(T.Augmentation):
    """The same transform for every image.

    Detectron2 makes a class inside a function for this, which cannot be sent to a process: where
    data workers are started anew (macOS, Windows, several processes on a CPU), training would end.
    """

    def __init__(self, transform: T.Transform) -> None:
        """Takes the transform."""
        super().__init__()
        self.transform = transform

    def get_transform(self) -> T.Transform:
        """Gives the transform; nothing is drawn."""
        return self.transform


class TransposeTransform(T.Transform):
    """Swaps rows and columns; together with both flips it gives all turns by 90 degrees."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, ...) to (W, H, ...)."""
        return np.swapaxes(img, 0, 1)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) of x, y to y, x."""
        return coords[:, ::-1]

    def inverse(self) -> TransposeTransform:
        """Itself."""
        return self


def build_flips(name: str) -> list[T.Augmentation]:
    """Flips by the value of INPUT.RANDOM_FLIP, each with probability 1/2.

    "dihedral" is both, and turns by 90 degrees: microscopes and satellites have no upside.

    Raises:
        ValueError: another name.
    """
    if name not in FLIPS:
        raise ValueError(f"INPUT.RANDOM_FLIP is {name!r}; it must be one of {', '.join(FLIPS)}")
    flips: list[T.Augmentation] = []
    if name in ("horizontal", "both", "dihedral"):
        flips.append(T.RandomFlip(horizontal=True, vertical=False))
    if name in ("vertical", "both", "dihedral"):
        flips.append(T.RandomFlip(horizontal=False, vertical=True))
    if name == "dihedral":
        flips.append(T.RandomApply(Always(TransposeTransform()), prob=0.5))
    return flips


def build_augmentations(
    cfg: CfgNode, is_train: bool, ignored_category: int | None = None
) -> list[T.Augmentation | T.Transform]:
    """Augmentations of a configuration.

    Args:
        cfg: reads cfg.INPUT.
        is_train: False gives the resizing of the test set.
        ignored_category: the value to be ignored in the semantic map that the mapper gives to the
            augmentations (for INPUT.CROP.SINGLE_CATEGORY_MAX_AREA); None if it gives none.
    """
    config = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge(config.MIN_SIZE_TEST, config.MAX_SIZE_TEST, "choice")]
    own = own_augmentations(cfg)
    augmentations: list[T.Augmentation | T.Transform] = [*build_flips(config.RANDOM_FLIP)]
    if config.COLOR_AUG_SSD:
        augmentations.append(_color_jitter(config.FORMAT))
    if config.LSJ.ENABLED:
        return [
            *augmentations,
            LargeScaleJitter(config.LSJ.SIZE, config.LSJ.MIN_SCALE, config.LSJ.MAX_SCALE),
            *own,
        ]
    augmentations.append(
        T.ResizeShortestEdge(
            config.MIN_SIZE_TRAIN, config.MAX_SIZE_TRAIN, config.MIN_SIZE_TRAIN_SAMPLING
        )
    )
    if config.CROP.ENABLED:
        max_area = config.CROP.SINGLE_CATEGORY_MAX_AREA if ignored_category is not None else 1.0
        augmentations.append(
            T.RandomCrop(config.CROP.TYPE, config.CROP.SIZE)
            if max_area >= 1
            else T.RandomCrop_CategoryAreaConstraint(
                config.CROP.TYPE, config.CROP.SIZE, max_area, ignored_category
            )
        )
    return [*augmentations, *own]


def _color_jitter(image_format: str) -> T.Transform:
    """SSD's photometric distortion, which draws anew for each image."""
    # Detectron2 installs this project with itself; only where asked for, as it registers heads.
    from detectron2.projects.point_rend import ColorAugSSDTransform

    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.COLOR_AUG_SSD needs INPUT.FORMAT RGB or BGR, not {image_format}")
    return ColorAugSSDTransform(image_format)
