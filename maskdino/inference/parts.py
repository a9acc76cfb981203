"""Slices of an image, and the parts of objects that they see.

Shape key: H, W pixels of the image; S edge of a slice; h, w pixels of a window; N parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from maskdino.ops.runs import encode_at

EDGE = 3  # pixels from a cut edge within which an object counts as cut: masks are that rough
FAR = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Window:
    """A rectangle of the image: rows top to bottom - 1, columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.bottom - self.top, self.right - self.left

    def common(self, other: Window) -> Window | None:
        """The rectangle that both have, or None."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Window(top, left, bottom, right) if top < bottom and left < right else None

    def inside(self, around: Window) -> tuple[slice, slice]:
        """Index of this rectangle in the array of another one around it."""
        return (
            slice(self.top - around.top, self.bottom - around.top),
            slice(self.left - around.left, self.right - around.left),
        )


@dataclass(frozen=True)
class Slice(Window):
    """A part of the image that is predicted by itself.

    Attributes:
        cut: whether the image goes on beyond the top, left, bottom and right edge.
        owned: the pixels that no other slice sees farther from its edges.
    """

    cut: tuple[bool, bool, bool, bool]
    owned: Window

    def edges_near(self, extent: Window) -> frozenset[int]:
        """Which of the four edges cut an object with this extent."""
        distances = (
            extent.top - self.top,
            extent.left - self.left,
            self.bottom - extent.bottom,
            self.right - extent.right,
        )
        return frozenset(i for i, d in enumerate(distances) if self.cut[i] and d < EDGE)

    def depth(self, window: Window) -> np.ndarray:
        """(h, w): pixels to the nearest cut edge, of each pixel of a window inside the slice."""
        rows, columns = np.arange(window.top, window.bottom), np.arange(window.left, window.right)
        distances = (
            rows[:, None] - self.top,
            columns[None] - self.left,
            self.bottom - 1 - rows[:, None],
            self.right - 1 - columns[None],
        )
        depth = np.full(window.shape, FAR)
        for distance, cut in zip(distances, self.cut, strict=True):
            if cut:
                np.minimum(depth, distance, out=depth)
        return depth


def slices_of(size: tuple[int, int], edge: int, overlap: float) -> list[Slice]:
    """Slices that cover an image, row by row; all of one size, as far as the image allows.

    Args:
        size: (H, W).
        edge: S.
        overlap: least share of a slice that the next one sees again.
    """
    down, along = (_intervals(length, edge, overlap) for length in size)
    return [
        Slice(
            top,
            left,
            bottom,
            right,
            cut=(top > 0, left > 0, bottom < size[0], right < size[1]),
            owned=Window(own_top, own_left, own_bottom, own_right),
        )
        for top, bottom, own_top, own_bottom in down
        for left, right, own_left, own_right in along
    ]


def _intervals(length: int, edge: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Begin and end of each interval, and of what it owns: up to the middle of the overlaps."""
    edge = min(edge, length)
    step = max(1, int(edge * (1 - overlap)))
    number = 1 + -(-(length - edge) // step)
    begins = [round(i * (length - edge) / max(number - 1, 1)) for i in range(number)]
    middles = [(a + edge + b) // 2 for a, b in zip(begins, begins[1:], strict=False)]
    owned = zip([0, *middles], [*middles, length], strict=True)
    return [(begin, begin + edge, *own) for begin, own in zip(begins, owned, strict=True)]


def neighbors_of(slices: Sequence[Slice]) -> list[list[int]]:
    """For each slice the numbers of those that overlap it."""
    edges = np.array([(s.top, s.left, s.bottom, s.right) for s in slices])
    return [
        [j for j in np.flatnonzero(touching(edges, own)).tolist() if j != i]
        for i, own in enumerate(edges)
    ]


def touching(edges: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(N,) bool: which rectangles (N, 4) share a pixel with one (4,)."""
    before, behind = edges[:, :2] < own[2:], edges[:, 2:] > own[:2]
    return np.asarray((before & behind).all(1))


@dataclass(frozen=True)
class Part:
    """What one slice sees of an object.

    Attributes:
        place: number of the slice.
        label: class number.
        score: in [0, 1].
        box: (4,) float32 x0, y0, x1, y1 in pixels of the image, as predicted.
        extent: of the mask, in the image.
        packed: the mask inside `extent`, eight pixels in a byte.
        cut: whether an edge of the slice cuts it.
        features: (C,) of the object, or None.
    """

    place: int
    label: int
    score: float
    box: np.ndarray
    extent: Window
    packed: np.ndarray
    cut: bool
    features: np.ndarray | None = field(default=None, repr=False)

    def mask(self, window: Window | None = None) -> np.ndarray:
        """(h, w) bool, inside a window inside the extent; None: inside the extent."""
        height, width = self.extent.shape
        mask = np.unpackbits(self.packed, count=height * width).reshape(height, width).view(bool)
        return mask if window is None else mask[window.inside(self.extent)]

    def rle(self, size: tuple[int, int]) -> dict:
        """The mask in an image (H, W), in COCO's compressed form."""
        return encode_at(self.mask(), (self.extent.top, self.extent.left), size)
