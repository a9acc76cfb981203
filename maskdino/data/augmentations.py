"""Users' augmentations, by name: detectron2's, or whatever maps an image and a label map together.

Shape key: H, W pixels before; h, w pixels after; N boxes; P points.

Albumentations' ``Compose`` is of the second kind. It is called once for each image, with a map of
where each pixel comes from in place of a mask; masks, label maps and boxes follow that map. So all
that it does to masks works, and Albumentations itself is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from maskdino.data.reading import DataError
from maskdino.integration.extensions import AUGMENTATION_REGISTRY

# Called with image=(H, W, 3) uint8 RGB and mask=(H, W, 2) float32; gives a dict of both.
Compose = Callable[..., dict[str, Any]]


def own_augmentations(cfg: CfgNode) -> list[T.Augmentation | T.Transform]:
    """Builds the augmentations that INPUT.AUGMENTATIONS names, in their order.

    Each name is that of a function in AUGMENTATION_REGISTRY. It takes the configuration and returns
    one of these, or a list of them: an augmentation or a transform of detectron2, or an
    Albumentations ``Compose``.

    Raises:
        ValueError: a name is not registered.
        TypeError: a function returned something else.
    """
    return [
        _adapt(item, name, cfg.INPUT.FORMAT)
        for name in cfg.INPUT.AUGMENTATIONS
        for item in _as_list(AUGMENTATION_REGISTRY.find(name)(cfg))
    ]


def _as_list(items: object) -> Sequence[object]:
    return items if isinstance(items, list | tuple) else [items]


def _adapt(item: object, name: str, image_format: str) -> T.Augmentation | T.Transform:
    if isinstance(item, T.Augmentation | T.Transform):
        return item
    if callable(item):
        return PixelAugmentation(item, image_format)
    raise TypeError(
        f"{name} of INPUT.AUGMENTATIONS returned {item!r}; return augmentations or transforms of "
        "detectron2, or an Albumentations Compose"
    )


class PixelAugmentation(T.Augmentation):
    """An augmentation that takes an image and a mask by keyword, such as Albumentations' Compose.

    Args:
        compose: see `Compose`. Interpolation of masks must be "nearest", as is usual.
        image_format: "RGB" or "BGR", of the images that come and go; `compose` sees RGB.
    """

    def __init__(self, compose: Compose, image_format: str) -> None:
        super().__init__()
        self.compose = compose
        self.is_bgr = image_format == "BGR"

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Runs the augmentation on an image, (H, W, 3) uint8, and keeps what it did.

        Raises:
            DataError: the result is no image of bytes, or the map was blended.
        """
        # Newer Albumentations has random numbers of its own: tie them to NumPy's, which tell what
        # a position of the stream looks like.
        if hasattr(self.compose, "set_random_seed"):
            self.compose.set_random_seed(int(np.random.randint(2**31)))
        sources = np.indices(image.shape[:2]).transpose(1, 2, 0).astype(np.float32) + 1
        rgb = np.ascontiguousarray(image[..., ::-1]) if self.is_bgr else image.copy()
        result = self.compose(image=rgb, mask=sources.copy())
        changed, found = np.asarray(result["image"]), np.asarray(result["mask"])
        if changed.dtype != np.uint8 or changed.ndim != 3 or changed.shape[2] != 3:
            raise DataError(
                f"an augmentation turned an image of bytes into {changed.dtype} of shape "
                f"{changed.shape}: leave normalization and tensors to the model"
            )
        changed = np.ascontiguousarray(changed[..., ::-1]) if self.is_bgr else changed
        if changed.shape == image.shape and np.array_equal(found, sources):
            return ImageTransform(changed)
        whole = found.round().astype(np.int64) - 1
        if found.shape != (*changed.shape[:2], 2) or (whole + 1 != found).any():
            raise DataError(
                "an augmentation blends masks, or gives them another size than images: use nearest "
                "interpolation of masks"
            )
        return PixelTransform(changed, whole, image.shape[:2])


class ImageTransform(T.Transform):
    """What changes colors alone; takes the result, (H, W, 3) uint8."""

    def __init__(self, image: np.ndarray) -> None:
        super().__init__()
        self.image = image

    def apply_image(self, img: np.ndarray) -> np.ndarray:  # noqa: ARG002 - of detectron2
        """Gives the image that was made when the transform was drawn."""
        return self.image

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Leaves points where they are."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Leaves masks and label maps as they are."""
        return segmentation


class PixelTransform(ImageTransform):
    """What moves pixels, known by where each pixel of the result (h, w, 3) uint8 comes from.

    That is (h, w, 2) integers, row and column before, in (H, W); -1: it comes from nowhere.
    """

    def __init__(self, image: np.ndarray, sources: np.ndarray, size: tuple[int, int]) -> None:
        super().__init__(image)
        self.size = size
        self._rows, self._columns = sources[..., 0], sources[..., 1]
        self._empty = (sources < 0).any(axis=-1)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Moves a mask, label map or map of colors, (H, W, ...); 0 where nothing comes from."""
        moved = segmentation[self._rows, self._columns]
        moved[self._empty] = 0
        return moved

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """Moves boxes (N, 4) x0, y0, x1, y1 to what is around the pixels whose centers were inside.

        Those without any become zeros.
        """
        boxes = [self._move(row) for row in np.asarray(box, float)]
        return np.array(boxes, float).reshape(-1, 4)

    def _move(self, box: np.ndarray) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = box - 0.5  # of pixels, whose centers have whole numbers then
        inside = (self._columns >= x0) & (self._columns < x1) & ~self._empty
        inside &= (self._rows >= y0) & (self._rows < y1)
        left, top, width, height = cv2.boundingRect(inside.view(np.uint8))
        return left, top, left + width, top + height

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Raises NotImplementedError: polygons are drawn as masks before (`split_at_pixels`)."""
        raise NotImplementedError("points cannot follow an augmentation of pixels; masks can")


def split_at_pixels(
    transforms: T.TransformList, size: tuple[int, int]
) -> tuple[T.TransformList, tuple[int, int], T.TransformList | None]:
    """Splits the transforms of an image, (height, width) after all, where points cannot follow.

    Returns:
        The transforms that points can follow; (height, width) of the image after these; and the
        others, or None if there are none.
    """
    for index, transform in enumerate(transforms.transforms):
        if isinstance(transform, PixelTransform):
            before, after = transforms.transforms[:index], transforms.transforms[index:]
            return T.TransformList(before), transform.size, T.TransformList(after)
    return transforms, size, None
