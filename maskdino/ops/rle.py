"""COCO's run lengths of masks, in all their forms.

The compressed form, which pycocotools computes with, is {"size": [height, width], "counts": bytes}.
Files in JSON hold its counts as text, or as a list of numbers, or polygons in its place.

Shape key: H, W pixels of the image.
"""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as mask_utils

LONGEST = 60  # bits of a run length, in text


def encode_mask(mask: np.ndarray) -> dict:
    """(H, W) bool, or integers 0 and 1, to the compressed form."""
    return mask_utils.encode(by_columns(mask))


def by_columns(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, or integers 0 and 1, as uint8 that lie column by column in memory."""
    pixels = mask.view(np.uint8) if mask.dtype == bool else mask.astype(np.uint8, copy=False)
    if pixels.flags.c_contiguous and pixels.flags.writeable:
        # Torch is many times faster than NumPy where masks are large.
        rows = torch.from_numpy(pixels.reshape(-1)).view(pixels.shape)
        return rows.t().contiguous().numpy().T
    return np.asfortranarray(pixels)


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
    for code in text.encode():
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
