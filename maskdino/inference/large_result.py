"""The result of an image that is too large to be drawn as it is.

Shape key: H, W pixels of the image; f the whole factor by which it is scaled down.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from PIL import Image

from maskdino.inference.tiles import TiledImage
from maskdino.ops.masks import RunMask
from maskdino.ops.runs import encode_at, release
from maskdino.visualization.results import ImageResult

LONGEST_DRAWN = 6000  # pixels of the longer edge of a drawing
ROWS_AT_ONCE = 256  # of a map
PIXELS_AT_ONCE = 1 << 24  # of the image that are read for it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LargeResult(ImageResult):
    """A result that is drawn scaled down, if an edge of its image is longer than LONGEST_DRAWN.

    Attributes:
        tiled: the image, of which parts are read.
    """

    tiled: TiledImage = field(kw_only=True)

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, all of it."""
        return self.tiled.part(*(slice(0, edge) for edge in self.size))

    def draw(self, task: str | None = None, **drawing: Any) -> np.ndarray:
        """Draws on the image, see `ImageResult.draw`; (H / f, W / f, 3) uint8 RGB, rounded up."""
        factor = self._factor(LONGEST_DRAWN)
        if factor > 1:
            logger.warning("%s is drawn at 1/%d of its size", self.name, factor)
        # Scores are not drawn, and a copy of them may be large.
        return replace(self, class_scores=None).scaled_down(LONGEST_DRAWN).draw(task, **drawing)

    def scaled_down(self, longest: int) -> ImageResult:
        """The result at 1/f of the image's size, at which both edges are at most `longest` pixels.

        Masks hold the small pixels of which they cover half, maps what is in their middle.
        """
        factor = self._factor(longest)
        size = -(-self.size[0] // factor), -(-self.size[1] // factor)
        rows, columns = (
            np.minimum(np.arange(n) * factor + factor // 2, whole - 1)
            for n, whole in zip(size, self.size, strict=True)
        )
        plain = ImageResult(**{x.name: getattr(self, x.name) for x in fields(ImageResult)})
        parts: dict[str, Any] = {
            name: None if (whole := getattr(self, name)) is None else _taken(whole, rows, columns)
            for name in ("panoptic_ids", "label_map")
        }
        if self.class_scores is not None:
            parts["class_scores"] = self.class_scores[:, rows[:, None], columns]
        if self.boxes is not None:
            parts["boxes"] = self.boxes / np.float32(factor)
        if self.rles is not None:
            parts["rles"] = tuple(_smaller(rle, factor, size) for rle in self.rles)
        return replace(plain, size=size, source=_read_smaller(self.tiled, factor, size), **parts)

    def _factor(self, longest: int) -> int:
        return max(1, -(-max(self.size) // longest))


def _taken(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some rows and columns of a map that may lie in a file."""
    taken = np.empty((len(rows), len(columns)), array.dtype)
    for i, row in enumerate(rows.tolist()):
        taken[i] = array[row, columns]
        if i % ROWS_AT_ONCE == 0:
            release(array)
    release(array)
    return taken


def _read_smaller(image: TiledImage, factor: int, size: tuple[int, int]) -> np.ndarray:
    """The image (H, W) at 1/f of its size, read in strips of rows; (H / f, W / f, 3) uint8."""
    small = np.empty((*size, 3), np.uint8)
    height, width = image.size
    at_once = max(1, PIXELS_AT_ONCE // (factor * width))  # rows of the small image
    for top in range(0, size[0], at_once):
        bottom = min(size[0], top + at_once)
        strip = image.part(slice(top * factor, min(bottom * factor, height)), slice(0, width))
        small[top:bottom] = np.asarray(Image.fromarray(strip).reduce(factor))
    return small


def _smaller(rle: dict, factor: int, size: tuple[int, int]) -> dict:
    """A mask at 1/f of its size, with a pixel at least."""
    if factor == 1:
        return rle
    mask = RunMask.of(rle)
    # The small pixels that it touches, and how much of them lies beyond its bounding box.
    top, left = mask.top // factor, mask.left // factor
    bottom, right = -(-mask.bottom // factor), -(-mask.right // factor)
    beyond = mask.top - top * factor, bottom * factor - mask.bottom
    share = np.zeros((bottom - top, right - left), np.uint8)
    for begin, end in mask.strips(left * factor, factor):
        first, last = begin // factor, -(-end // factor)
        beside = begin - first * factor, last * factor - end
        padded = np.pad(mask.columns(begin, end), (beyond, beside))
        small = Image.fromarray(padded.view(np.uint8) * 255).reduce(factor)
        share[:, first - left : last - left] = np.asarray(small)
    return encode_at(share >= min(128, share.max(initial=0)), (top, left), size)
