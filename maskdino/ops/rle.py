"""COCO's run lengths of masks, in all their forms.

The compressed form, which pycocotools computes with, is {"size": [height, width], "counts": bytes}.
Files in JSON hold its counts as text, or as a list of numbers, or polygons in its place.

Shape key: N masks, H, W pixels of the image, P bytes of a packed mask.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_utils

LONGEST = 60  # bits of a run length, in text
BYTES_AT_ONCE = 1 << 24  # of packed masks that are encoded at one time


def encode_mask(mask: np.ndarray) -> dict:
    """(H, W) bool, or integers 0 and 1, to the compressed form."""
    pixels = mask.view(np.uint8) if mask.dtype == bool else mask.astype(np.uint8, copy=False)
    height, width = pixels.shape
    # Where pixels change along columns is found in the order of memory: to walk through it by
    # columns, or to turn the mask, takes several times as long.
    changed = pixels[1:] != pixels[:-1]
    if np.count_nonzero(changed) >= pixels.size // 32:  # noise, or nothing
        return mask_utils.encode(np.asfortranarray(pixels))
    rows, columns = np.divmod(np.flatnonzero(changed), width)
    tops = np.flatnonzero(pixels[0, 1:] != pixels[-1, :-1]) + 1
    begins = [columns * height + rows + 1, tops * height, np.flatnonzero(pixels[0, :1])]
    counts = np.diff(np.sort(np.concatenate(begins)), prepend=0, append=pixels.size)
    return mask_utils.frPyObjects({"size": pixels.shape, "counts": counts}, height, width)


def encode_packed(bits: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """Packed masks to the compressed form, without a byte for each pixel.

    Args:
        bits: (N, P) uint8, eight pixels each, column by column, the first in the lowest bit.
        size: (H, W).
    """
    at_once = max(1, BYTES_AT_ONCE // max(1, bits.shape[1]))
    parts = (bits[begin : begin + at_once] for begin in range(0, len(bits), at_once))
    return [rle for part in parts for rle in _encode_some(part, size)]


def _encode_some(bits: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """At least one mask; see `encode_packed`."""
    number, pixels = len(bits), size[0] * size[1]
    words = np.zeros((number, -(-bits.shape[1] // 8)), "<u8")
    words.view(np.uint8)[:, : bits.shape[1]] = bits
    changed = words << np.uint64(1)  # of each pixel, whether it differs from the one before it
    changed[:, 1:] |= words[:, :-1] >> np.uint64(63)
    changed ^= words
    if pixels % 64:  # what follows the last pixel is none
        changed[:, -1] &= np.uint64((1 << pixels % 64) - 1)
    flat = changed.reshape(-1)
    some = np.flatnonzero(flat != 0)
    if len(some) >= flat.size // 2:  # noise, or nothing
        rows = (np.unpackbits(row, count=pixels, bitorder="little") for row in bits)
        return [mask_utils.encode(row.reshape(size, order="F")) for row in rows]
    inside = np.flatnonzero(np.unpackbits(flat[some].view(np.uint8), bitorder="little").view(bool))
    masks, begins = np.divmod(some[inside >> 6] * 64 + (inside & 63), 64 * words.shape[1])
    last = np.bincount(masks, minlength=number).cumsum()
    ends = np.insert(begins, last, pixels)
    first = last[:-1] + np.arange(1, number)  # in `ends`, of each mask but the first
    counts = np.diff(ends, prepend=0)
    counts[first] = ends[first]
    parts = [{"size": size, "counts": part} for part in np.split(counts, first)]
    return mask_utils.frPyObjects(parts, *size)


def encode_segmentation(segmentation: list | dict, size: tuple[int, int]) -> dict:
    """The "segmentation" of an annotation, in any form, to the compressed one.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or run lengths in any form.
        size: (H, W).
    """
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return mask_utils.frPyObjects(segmentation, *size)
    return {**segmentation, "counts": counts.encode() if isinstance(counts, str) else counts}


def decode_segmentation(segmentation: list | dict, size: tuple[int, int]) -> np.ndarray:
    """The "segmentation" of an annotation, in any form, to (H, W) bool."""
    return mask_utils.decode(encode_segmentation(segmentation, size)).astype(bool)


def box_and_area(segmentation: list | dict, size: tuple[int, int]) -> tuple[list[float], float]:
    """[x, y, width, height] around the "segmentation" of an annotation, and its pixels.

    Args:
        segmentation: see `encode_segmentation`.
        size: (H, W).
    """
    rle = encode_segmentation(segmentation, size)
    return mask_utils.toBbox(rle).tolist(), float(mask_utils.area(rle))


def counts_of_text(text: str) -> list[int]:
    """The run lengths that a compressed form's text stands for.

    Each is a number in digits of 5 bits, the lowest first, and from the fourth on the difference to
    the one before the last. Pycocotools reads texts of wrong sums without a word.

    Raises:
        ValueError: it is no such text.
    """
    counts: list[int] = []
    value = shift = 0
    for code in map(ord, text):
        digit = code - 48
        if not 0 <= digit < 64:
            raise ValueError(f"run lengths hold the character {chr(code)!r}")
        value |= (digit & 31) << shift
        shift += 5
        if shift > LONGEST:
            raise ValueError("run lengths hold a number that is too large")
        if digit & 32:  # more digits follow
            continue
        if digit & 16:  # negative
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths end within a number")
    return counts


def to_json(rle: dict) -> dict:
    """The compressed form with values that JSON can hold."""
    height, width = rle["size"]
    return {"size": [int(height), int(width)], "counts": rle["counts"].decode("ascii")}
