"""Maps of the classes of all pixels of a large image, made while its slices are read.

Maps that would fill the memory lie in a temporary file, of which only the part that is written at
the time is in memory.

Shape key: H, W pixels of the image; h, w of a slice; K classes.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import numpy as np

from maskdino.inference.parts import Slice, Window
from maskdino.ops.runs import release
from maskdino.system.errors import WriteError
from maskdino.visualization.results import ImageResult

IN_MEMORY = 1 << 28  # bytes of a map that is not worth a file
NEGLIGIBLE = 0.01  # share of the best score in a window; classes that are below everywhere drop out
ROWS_AT_ONCE = 256
MOST_SCORES = 1 << 31  # bytes of the scores of all classes of all pixels


class LargeMap:
    """An array (H, W), in memory or, where it is large, in a temporary file that ends with it.

    Attributes:
        array: zeros at first.
    """

    def __init__(self, size: tuple[int, int], dtype: np.dtype | type) -> None:
        """Makes the array.

        Raises:
            WriteError: there is no room for the file.
        """
        needed = math.prod(size) * np.dtype(dtype).itemsize
        if needed <= IN_MEMORY:
            self.array: np.ndarray = np.zeros(size, dtype)
            return
        try:
            with tempfile.TemporaryFile() as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk ends the process, later
                    os.posix_fallocate(file.fileno(), 0, needed)
                file.truncate(needed)
                mapped = mmap.mmap(file.fileno(), needed)
        except OSError as error:
            raise WriteError(
                f"a map of {needed / 1e6:.0f} MB has no room in {tempfile.gettempdir()}: {error}; "
                "the variable TMPDIR names another folder"
            ) from error
        self.array = np.frombuffer(mapped, dtype).reshape(size)

    def let_go(self) -> None:
        """Gives the memory of what was written in a file back to the system."""
        release(self.array)

    def strips(self) -> Iterator[np.ndarray]:
        """Views (h, W) of rows, one after the other."""
        for top in range(0, len(self.array), ROWS_AT_ONCE):
            yield self.array[top : top + ROWS_AT_ONCE]
            self.let_go()

    def seen(self, most: int) -> np.ndarray:
        """(most + 1,) bool: which of the numbers 0 to `most` the map holds."""
        seen = np.zeros(most + 1, bool)
        for strip in self.strips():
            seen[strip.ravel()] = True
        return seen

    def renumber(self, numbers: np.ndarray) -> None:
        """Puts `numbers[i]` in the place of each i."""
        for strip in self.strips():
            strip[:] = numbers[strip]


class ClassMap:
    """The label map of the task "semantic": of each pixel the class with the largest sum of scores.

    Scores of a slice weigh the more the farther a pixel is from its edges. The edges of all slices
    divide the image into windows, and sums are kept of those alone that a later slice sees again.
    """

    def __init__(
        self, size: tuple[int, int], slices: Sequence[Slice], first: ImageResult, scores: bool
    ) -> None:
        """Begins with nothing.

        Args:
            size: (H, W).
            slices: all of the image.
            first: result of the first slice.
            scores: keep the scores of all classes, too (`MeanScores`, also for errors).
        """
        assert first.label_map is not None
        self.size, self.slices, self.map = size, slices, LargeMap(size, first.label_map.dtype)
        self.scores: MeanScores | None = None
        if scores and first.class_scores is not None:
            self.scores = MeanScores(size, slices, len(first.class_scores))
        rows, columns = {(s.top, s.bottom) for s in slices}, {(s.left, s.right) for s in slices}
        self._rows, self._columns = _intervals(rows), _intervals(columns)
        self._left = {  # slices that are to come, of each window
            Window(top, left, bottom, right): _covering(rows, top) * _covering(columns, left)
            for (top, bottom), (left, right) in product(self._rows, self._columns)
        }
        self.sums: dict[Window, dict[int, np.ndarray]] = {}

    def add(self, place: int, result: ImageResult) -> None:
        """Takes the result of slice number `place`; all come in order.

        Without scores of classes, at least 0, that of the class of a pixel is 1.
        """
        labels, scores, own = result.label_map, result.class_scores, self.slices[place]
        assert labels is not None
        if self.scores is not None and scores is not None:
            self.scores.add(place, scores)
        rows = [x for x in self._rows if own.top <= x[0] < own.bottom]
        columns = [x for x in self._columns if own.left <= x[0] < own.right]
        for (top, bottom), (left, right) in product(rows, columns):
            window = Window(top, left, bottom, right)
            inside = window.inside(own)
            alone = window not in self.sums
            self._left[window] -= 1
            if alone and not self._left[window]:
                self._write(window, labels[inside])
                continue
            sums = self.sums.setdefault(window, {})
            weight = _weight(own, window)
            for label, plane in _planes(labels[inside], scores, inside):
                sums[label] = sums.get(label, 0) + weight * plane
            if not self._left[window]:
                self._write(window, _best(self.sums.pop(window), self.map.array.dtype))
        self.map.let_go()

    def fields(self) -> dict:
        """Fields of the result of the whole image."""
        scores = None if self.scores is None else self.scores.mean()
        return {"label_map": self.map.array, "class_scores": scores}

    def _write(self, window: Window, labels: np.ndarray) -> None:
        self.map.array[window.inside(Window(0, 0, *self.size))] = labels


class MeanScores:
    """Scores of all classes of each pixel: means over slices, weighted as in `ClassMap`."""

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice], number: int) -> None:
        """Makes the arrays.

        Args:
            size: (H, W).
            slices: of which scores come.
            number: K.

        Raises:
            ValueError: it would be too much.
        """
        needed = 4 * number * math.prod(size)
        if needed > MOST_SCORES:
            raise ValueError(
                f"the scores of {number} classes of {size[1]} x {size[0]} pixels need "
                f"{needed / 1e9:.1f} GB, more than {MOST_SCORES / 1e9:.1f}; without class_scores, "
                "only the best class of each pixel is kept"
            )
        self.slices = slices
        self._sums = np.zeros((number, *size), np.float32)
        self._weights = np.zeros(size, np.float32)

    def add(self, place: int, scores: np.ndarray) -> None:
        """Takes scores (K, h, w) of slice number `place`."""
        own = self.slices[place]
        rows, columns = own.inside(Window(0, 0, *self._weights.shape))
        weight = _weight(own, own)
        self._weights[rows, columns] += weight
        for plane, part in zip(self._sums, scores, strict=True):
            plane[rows, columns] += weight * part

    def mean(self) -> np.ndarray:
        """(K, H, W) float16; ends the sums."""
        self._sums /= self._weights
        return self._sums.astype(np.float16)


def _weight(own: Slice, window: Window) -> np.ndarray:
    """(h, w) float32: how much a slice counts in a window inside it."""
    return np.minimum(own.depth(window), 1 << 15).astype(np.float32) + 1


def _intervals(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces into which the ends of some intervals cut their union."""
    return list(pairwise(sorted({end for span in spans for end in span})))


def _covering(spans: set[tuple[int, int]], begin: int) -> int:
    return sum(low <= begin < high for low, high in spans)


def _planes(
    labels: np.ndarray, scores: np.ndarray | None, inside: tuple[slice, slice]
) -> Iterator[tuple[int, np.ndarray]]:
    """Scores (h, w) of each class that matters in a window."""
    if scores is None:
        for label in np.unique(labels).tolist():
            yield label, labels == label
        return
    rows, columns = inside
    part = scores[:, rows, columns]
    best = part.reshape(len(part), -1).max(1)
    for label in np.flatnonzero(best >= NEGLIGIBLE * best.max()).tolist():
        yield label, part[label]


def _best(sums: dict[int, np.ndarray], dtype: np.dtype) -> np.ndarray:
    """(h, w): the class with the largest sum."""
    classes = sorted(sums)
    best, labels = sums[classes[0]], np.full(sums[classes[0]].shape, classes[0], dtype)
    for label in classes[1:]:
        better = sums[label] > best
        labels[better] = label
        best = np.where(better, sums[label], best)
    return labels
