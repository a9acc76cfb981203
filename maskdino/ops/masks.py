"""Masks of which parts are made when they are wanted: an array of all pixels may be too large.

Shape key: H, W pixels of the image; h, w of a mask's bounding box; R runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from maskdino.ops.runs import box_of, decode_part, release, runs_of

PIXELS_AT_ONCE = 1 << 20  # of a mask that are made at one time
VALUES_AT_ONCE = 1 << 18  # of a map whose runs are found at one time


@dataclass(frozen=True)
class Mask(ABC):
    """A mask inside its bounding box: rows top to bottom - 1, columns left to right - 1.

    Attributes:
        area: its pixels.
    """

    top: int
    left: int
    bottom: int
    right: int
    area: int

    @abstractmethod
    def columns(self, left: int, right: int) -> np.ndarray:
        """Columns left to right - 1 of the image, (h, w) bool, rows of the bounding box."""

    def strips(self, begin: int | None = None, unit: int = 1) -> Iterator[tuple[int, int]]:
        """Left and right of strips that cover the bounding box, each of a bounded number of pixels.

        Args:
            begin: left of the first, at most that of the bounding box; None: that.
            unit: strips are a multiple of it wide, up to the right of the bounding box.
        """
        begin = self.left if begin is None else begin
        width = unit * max(1, PIXELS_AT_ONCE // (unit * max(1, self.bottom - self.top)))
        for left in range(begin, self.right, width):
            yield max(left, self.left), min(left + width, self.right)


@dataclass(frozen=True)
class RunMask(Mask):
    """A mask of run lengths.

    Attributes:
        runs: (R, 2), see `maskdino.ops.runs`.
        height: H.
    """

    runs: np.ndarray = field(repr=False)
    height: int

    @staticmethod
    def of(rle: dict) -> RunMask:
        """From COCO's compressed form."""
        runs, height = runs_of(rle), int(rle["size"][0])
        return RunMask(*box_of(runs, height), int((runs[:, 1] - runs[:, 0]).sum()), runs, height)

    def columns(self, left: int, right: int) -> np.ndarray:
        """See `Mask.columns`."""
        return decode_part(self.runs, self.height, (self.top, self.bottom), (left, right))


@dataclass(frozen=True)
class MapMask(Mask):
    """Where a number stands in a map.

    Attributes:
        labels: (H, W) integers.
        number: among them.
    """

    labels: np.ndarray = field(repr=False)
    number: int

    def columns(self, left: int, right: int) -> np.ndarray:
        """See `Mask.columns`."""
        return self.labels[self.top : self.bottom, left:right] == self.number


def masks_of_map(labels: np.ndarray) -> dict[int, MapMask]:
    """Each number of a map (H, W), and where it stands; the map is read once, in bands of rows."""
    at_once = max(1, VALUES_AT_ONCE // max(labels.shape[1], 1))
    found: dict[int, tuple[int, ...]] = {}
    for top in range(0, len(labels), at_once):
        for number, box in _boxes_of_values(labels[top : top + at_once], top):
            known = found.get(number, box[:4] + (0,))
            low, high = map(min, known[:2], box), map(max, known[2:4], box[2:])
            found[number] = *low, *high, known[4] + box[4]
        release(labels)
    return {
        number: MapMask(top, left, bottom, right, area, labels, number)
        for number, (top, left, bottom, right, area) in sorted(found.items())
    }


def _boxes_of_values(values: np.ndarray, top: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each number of some rows (h, W): its top, left, bottom, right and pixels."""
    changed = np.ones(values.shape, bool)
    changed[:, 1:] = values[:, 1:] != values[:, :-1]
    begins = np.flatnonzero(changed)
    rows, lefts = np.divmod(begins, values.shape[1])
    lengths = np.diff(begins, append=values.size)
    numbers = values.ravel()[begins]
    order = np.argsort(numbers, kind="stable")  # rows stay in order
    seen, first = np.unique(numbers[order], return_index=True)
    rows, lefts, lengths = top + rows[order], lefts[order], lengths[order]
    columns = (
        rows[first],
        np.minimum.reduceat(lefts, first),
        rows[np.append(first[1:], len(rows)) - 1] + 1,
        np.maximum.reduceat(lefts + lengths, first),
        np.add.reduceat(lengths, first),
    )
    return zip(seen.tolist(), zip(*(x.tolist() for x in columns), strict=True), strict=True)
