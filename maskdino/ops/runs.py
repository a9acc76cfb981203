"""Run lengths of masks that are small beside their image, without an array of the image's size.

Runs are intervals [begin, end) of pixels that are counted column by column, as COCO counts them.

Shape key: H, W pixels of the image; h, w of a part of it; R runs.
"""

from __future__ import annotations

import mmap
from collections import defaultdict

import numpy as np
import torch
from pycocotools import mask as mask_utils

PIXELS_AT_ONCE = 1 << 22  # of a map whose runs are found at one time


def runs_of(rle: dict) -> np.ndarray:
    """Begin and end (R, 2) int64 of each run of COCO's compressed form."""
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
    return np.stack([edges[: len(edges) // 2 * 2 : 2], edges[1::2]], 1)


def rle_of(runs: np.ndarray, size: tuple[int, int]) -> dict:
    """COCO's compressed form of runs (R, 2), which are in order and do not overlap.

    Args:
        runs: begin and end of each; the next may begin where one ends.
        size: (H, W).
    """
    edges = runs.ravel()
    going_on = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([going_on, going_on + 1]))
    counts = np.diff(edges, prepend=0, append=size[0] * size[1])
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return mask_utils.frPyObjects({"size": list(size), "counts": counts}, *size)


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
    height = int(rle["size"][0])
    runs = runs_of(rle)
    runs = runs[runs[:, 1] > runs[:, 0]]
    if not len(runs):
        return np.zeros((0, 0), bool), (0, 0)
    # One run for each column that it goes through.
    first, last = runs[:, 0] // height, (runs[:, 1] - 1) // height
    number = last - first + 1
    which = np.repeat(np.arange(len(runs)), number)
    columns = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number)
    begins = np.maximum(runs[which, 0] - columns * height, 0)
    ends = np.minimum(runs[which, 1] - columns * height, height)
    top, left = int(begins.min()), int(columns.min())
    changes = np.zeros((int(columns.max()) - left + 1, int(ends.max()) - top + 1), np.int8)
    np.add.at(changes, (columns - left, begins - top), 1)
    np.add.at(changes, (columns - left, ends - top), -1)
    inside = np.cumsum(changes[:, :-1], 1, np.int8).view(bool)
    # PyTorch transposes in blocks: a large mask takes a third of NumPy's time.
    return torch.from_numpy(inside).T.contiguous().numpy(), (top, left)


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

    The map is read once, a few of its columns at one time.
    """
    height, width = labels.shape
    at_once = max(1, PIXELS_AT_ONCE // max(height, 1))
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for left in range(0, width, at_once):
        values = np.ascontiguousarray(labels[:, left : left + at_once].T).ravel()
        changes = np.flatnonzero(values[1:] != values[:-1]) + 1
        edges = np.concatenate([[0], changes, [len(values)]])
        runs = np.stack([edges[:-1], edges[1:]], 1) + left * height
        numbers = values[edges[:-1]]
        order = np.argsort(numbers, kind="stable")
        seen, begins = np.unique(numbers[order], return_index=True)
        for number, part in zip(seen.tolist(), np.split(runs[order], begins[1:]), strict=True):
            found[number].append(part)
        release(labels)
    size = height, width
    return {number: rle_of(np.concatenate(parts), size) for number, parts in sorted(found.items())}
