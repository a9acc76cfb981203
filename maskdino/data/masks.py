"""From annotations to packed masks: polygons and RLE, compressed or not, through one path.

Every mask is cropped to the surroundings of its object (or is that of the whole image); its box and
its bits are read from there. Polygons are transformed as coordinates, and pycocotools draws them on
the crop alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T

from maskdino.data.annotation_checks import MAX_COORDINATE
from maskdino.data.augmentations import split_at_pixels
from maskdino.data.reading import DataError
from maskdino.ops.rle import encode_segmentation
from maskdino.structures import PackedMasks


@dataclass(frozen=True)
class CroppedMask:
    """The part of a mask that may hold foreground."""

    mask: np.ndarray  # (height, width) uint8 or bool; what is not 0 is foreground
    top: int = 0  # position in the image, in pixels
    left: int = 0  # a multiple of 8, as masks are packed in bytes

    @staticmethod
    def around(mask: np.ndarray) -> CroppedMask:
        """Copies what surrounds the foreground of a mask of the whole image.

        So the masks of many objects of a large image never exist at one time.
        """
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return CroppedMask(mask[:0, :0].copy())
        top, left = int(rows[0]), int(columns[0]) // 8 * 8
        return CroppedMask(mask[top : rows[-1] + 1, left : columns[-1] + 1].copy(), top, left)

    def box(self) -> tuple[int, int, int, int] | None:
        """Gives (x0, y0, x1, y1) around the foreground, in pixels of the image; None if empty.

        x1 and y1 are those of the last column and row, plus 1.
        """
        columns = np.flatnonzero(self.mask.any(axis=0))
        rows = np.flatnonzero(self.mask.any(axis=1))
        if not len(columns):
            return None
        x0, x1 = int(columns[0]) + self.left, int(columns[-1]) + self.left + 1
        return x0, int(rows[0]) + self.top, x1, int(rows[-1]) + self.top + 1

    def whole(self, size: tuple[int, int]) -> np.ndarray:
        """Gives the mask of the whole image (height, width)."""
        (height, width), (rows, columns) = size, self.mask.shape
        bottom, right = height - self.top - rows, width - self.left - columns
        return np.pad(self.mask, ((self.top, bottom), (self.left, right)))


def pack(cropped: Sequence[CroppedMask | None], size: tuple[int, int]) -> PackedMasks:
    """Packs N masks of an image (height, width); None gives a mask without foreground."""
    # NumPy's zeros are the operating system's: only bytes with foreground are ever touched.
    bits = np.zeros((len(cropped), size[0], (size[1] + 7) // 8), np.uint8)
    for row, part in zip(bits, cropped, strict=True):
        if part is not None:
            packed = np.packbits(part.mask, axis=1)
            rows = slice(part.top, part.top + len(packed))
            row[rows, part.left // 8 : part.left // 8 + packed.shape[1]] = packed
    return PackedMasks(torch.from_numpy(bits), size)


def transform_mask(
    segmentation: list | dict,
    transforms: T.TransformList,
    before: tuple[int, int],
    after: tuple[int, int],
) -> CroppedMask | None:
    """Transforms a mask with its image.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...] or RLE {"size": [H, W], "counts": list, str
            or bytes}.
        transforms: what was done to the image.
        before: (height, width) of the image before the transforms.
        after: (height, width) afterwards.

    Returns:
        The mask; None if no part of it is left. Polygons of fewer than 3 points have no area, and
        draw nothing.

    Raises:
        DataError: the annotation is malformed, or RLE of another size than the image.
    """
    if isinstance(segmentation, dict):
        return CroppedMask.around(transforms.apply_segmentation(_decode(segmentation, before)))
    polygons = [_points(polygon) for polygon in segmentation]
    transforms, size, of_pixels = split_at_pixels(transforms, after)
    drawn = draw_polygons(
        [transforms.apply_coords(points) for points in polygons if len(points) >= 3], size
    )
    if drawn is None or of_pixels is None:
        return drawn
    return CroppedMask.around(of_pixels.apply_segmentation(drawn.whole(size)))


def draw_polygons(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> CroppedMask | None:
    """Draws the union of polygons (P, 2) on an image (height, width), which cuts them off."""
    if not polygons:
        return None
    points = np.concatenate(polygons)
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 1, (size[1], size[0]))
    left = left // 8 * 8
    if right <= left or bottom <= top:
        return None
    local = [(polygon - (left, top)).ravel() for polygon in polygons]
    rle = mask_util.merge(mask_util.frPyObjects(local, int(bottom - top), int(right - left)))
    return CroppedMask(mask_util.decode(rle), int(top), int(left))


def _points(polygon: Sequence[float]) -> np.ndarray:
    """(P, 2) float64, a copy."""
    points = np.array(polygon, dtype=np.float64)
    if points.ndim != 1 or points.size % 2:
        raise DataError(
            f"a polygon must be a flat list x, y, x, y, ... of numbers; "
            f"this one has shape {points.shape}"
        )
    if not np.all(np.abs(points) < MAX_COORDINATE):
        raise DataError(
            f"a polygon has coordinates that are not finite or beyond {MAX_COORDINATE:g} pixels: "
            f"{points}"
        )
    return points.reshape(-1, 2)


def _decode(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8."""
    if tuple(rle.get("size", ())) != size or "counts" not in rle:
        raise DataError(f"an RLE mask has (height, width) {rle.get('size')}, but its image {size}")
    counts = rle["counts"]
    if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
        raise DataError(f"the counts of an RLE mask of {size} pixels add up to {sum(counts)}")
    try:
        return mask_util.decode(encode_segmentation(rle, size))
    except ValueError as error:
        raise DataError(f"an RLE mask cannot be decoded: {error}") from error
