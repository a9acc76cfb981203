"""Run lengths of masks that are small beside their image, without an array of the image's size.

Runs are intervals [begin, end) of pixels that are counted column by column, as COCO counts them.

Shape key: H, W pixels of the image; h, w of a part of it; R runs.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

COLUMNS_AT_ONCE = 1 << 24  # pixels in columns of a map that are copied at one time
PIXELS_AT_ONCE = 1 << 18  # of these, whose runs are found at one time
ROWS_AT_ONCE = 256  # of a map in a file, which are in memory at one time


def runs_of(rle: dict) -> np.ndarray:
    """Begin and end (R, 2) int64 of each run of COCO's compressed form, in order; none is empty."""
    codes = np.frombuffer(rle["counts"], np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)  # of numbers, in digits of 5 bits, the lowest first
    if not len(ends):
        return np.zeros((0, 2), np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - begins + 1
    places = np.arange(len(codes)) - np.repeat(begins, digits)
    counts = np.add.reduceat((codes & 31) << 5 * places, begins)
    counts -= np.where(codes[ends] & 16, np.int64(1) << 5 * digits, 0)
    # From the fourth on they are differences to the number before the last.
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    edges = np.cumsum(counts)
    runs = np.stack([edges[: len(edges) // 2 * 2 : 2], edges[1::2]], 1)
    return runs[runs[:, 1] > runs[:, 0]]


def rle_of(runs: np.ndarray, size: tuple[int, int]) -> dict:
    """COCO's compressed form of runs (R, 2), which are in order and do not overlap.

    Args:
        runs: begin and end of each; the next may begin where one ends.
        size: (H, W).
    """
    text = _Text()
    text.add(runs)
    return text.rle(size)


class _Text:
    """Counts of COCO's compressed form, of runs that come in parts."""

    def __init__(self) -> None:
        self.text = bytearray()
        self._end = 0  # of what is written
        self._open = np.zeros(0, np.int64)  # end of the last run, at which the next may begin
        self._before = np.zeros(2, np.int64)  # the last two counts

    def add(self, runs: np.ndarray) -> None:
        """Takes runs (R, 2) that follow those before."""
        edges = np.concatenate([self._open, runs.ravel()])
        first = 1 - len(self._open)  # end of a run
        going_on = np.flatnonzero(edges[first:-1:2] == edges[first + 1 :: 2]) * 2 + first
        edges = np.delete(edges, np.concatenate([going_on, going_on + 1]))
        self._write(edges[:-1])
        self._open = edges[-1:]

    def rle(self, size: tuple[int, int]) -> dict:
        """All of an image (H, W)."""
        edges, pixels = self._open, size[0] * size[1]
        self._write(edges if len(edges) and edges[0] == pixels else np.append(edges, pixels))
        return {"size": list(size), "counts": bytes(self.text)}

    def _write(self, edges: np.ndarray) -> None:
        counts = np.diff(edges, prepend=self._end)
        known = np.concatenate([self._before, counts])
        if not self.text:
            known[2:3] = 0  # the first is not subtracted from the third
        self.text += _digits(counts - known[: len(counts)])
        self._before = known[-2:]
        self._end = int(edges[-1]) if len(edges) else self._end


def _digits(values: np.ndarray) -> bytes:
    """Whole numbers as COCO's text has them: digits of 5 bits, the lowest first."""
    if not len(values):
        return b""
    sizes = np.where(values < 0, ~values, values)[:, None]
    shifts = 5 * np.arange(1 + int(sizes.max()).bit_length() // 5)
    more = sizes >> (shifts + 4) > 0  # digits follow
    codes = (values[:, None] >> shifts & 31) + 32 * more + 48
    used = np.concatenate([np.ones_like(more[:, :1]), more[:, :-1]], 1)
    return codes.astype(np.uint8)[used].tobytes()


def encode_at(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> dict:
    """COCO's compressed form of a mask (h, w) bool whose (top, left) lies in an image (H, W)."""
    padded = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)
    padded[:, 1:-1] = mask.T
    columns, begins = np.nonzero(np.diff(padded) == 1)
    _, ends = np.nonzero(np.diff(padded) == -1)
    offsets = (corner[1] + columns) * size[0] + corner[0]
    return rle_of(np.stack([offsets + begins, offsets + ends], 1), size)


def crop_mask(rle: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """The part of a mask inside its bounding box, (h, w) bool, and that box's (top, left)."""
    runs, height = runs_of(rle), int(rle["size"][0])
    top, left, bottom, right = box_of(runs, height)
    return decode_part(runs, height, (top, bottom), (left, right)), (top, left)


def box_of(runs: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right (behind the last pixel) of runs (R, 2) in H rows; 0 of none."""
    if not len(runs):
        return 0, 0, 0, 0
    begins = runs[:, 0] % height
    ends = begins + runs[:, 1] - runs[:, 0]
    left, right = int(runs[0, 0]) // height, (int(runs[-1, 1]) - 1) // height + 1
    if ends.max() > height:  # on in the next column
        return 0, left, height, right
    return int(begins.min()), left, int(ends.max()), right


def decode_part(
    runs: np.ndarray, height: int, rows: tuple[int, int], columns: tuple[int, int]
) -> np.ndarray:
    """Part (h, w) bool of a mask in H rows.

    Args:
        runs: (R, 2), in order; none is empty.
        height: H.
        rows: first, and behind the last; runs inside the columns leave them nowhere.
        columns: first, and behind the last.
    """
    edges = columns[0] * height, columns[1] * height
    some = slice(
        np.searchsorted(runs[:, 1], edges[0], "right"), np.searchsorted(runs[:, 0], edges[1])
    )
    runs = runs[some].clip(*edges) - edges[0]
    # One run for each column that it goes through.
    first, last = runs[:, 0] // height, (runs[:, 1] - 1) // height
    number = last - first + 1
    which = np.repeat(np.arange(len(runs)), number)
    places = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number)
    begins = np.maximum(runs[which, 0] - places * height, 0) - rows[0]
    ends = np.minimum(runs[which, 1] - places * height, height) - rows[0]
    changes = np.zeros((columns[1] - columns[0], rows[1] - rows[0] + 1), np.int8)
    np.add.at(changes, (places, begins), 1)
    np.add.at(changes, (places, ends), -1)
    inside = np.cumsum(changes[:, :-1], 1, np.int8).view(bool)
    # PyTorch transposes in blocks: a large mask takes a third of NumPy's time.
    return torch.from_numpy(inside).T.contiguous().numpy()


def release(array: np.ndarray) -> None:
    """Pages of an array in a mapped file, as far as they were read or written, leave the memory."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


def encode_map(labels: np.ndarray) -> dict[int, dict]:
    """Where each number stands in a map (H, W) of integers, in COCO's compressed form.

    Little more is in memory than what is returned, also of a map in a file.
    """
    height, width = labels.shape
    at_once = max(1, COLUMNS_AT_ONCE // max(height, 1))
    found: dict[int, _Text] = defaultdict(_Text)
    for left in range(0, width, at_once):
        columns = np.empty((min(at_once, width - left), height), labels.dtype)
        for top in range(0, height, ROWS_AT_ONCE):
            part = labels[top : top + ROWS_AT_ONCE, left : left + at_once]
            columns[:, top : top + ROWS_AT_ONCE] = part.T
            release(labels)
        for begin in range(0, columns.size, PIXELS_AT_ONCE):
            values = columns.ravel()[begin : begin + PIXELS_AT_ONCE]
            for number, runs in _runs_of_values(values):
                found[number].add(runs + (left * height + begin))
    return {number: text.rle((height, width)) for number, text in sorted(found.items())}


def _runs_of_values(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each number of some, and its runs (R, 2)."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(values)]])
    numbers = values[edges[:-1]]
    order = np.argsort(numbers, kind="stable")
    seen, begins = np.unique(numbers[order], return_index=True)
    runs = np.stack([edges[:-1], edges[1:]], 1)[order]
    return zip(seen.tolist(), np.split(runs, begins[1:]), strict=True)
