"""COCO's run lengths of masks, in all their forms.

The compressed form, which pycocotools computes with, is {"size": [height, width], "counts": bytes}.
Files in JSON hold its counts as text, or as a list of numbers, or polygons in its place.

Shape key: H, W pixels of the image.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_utils


def encode_mask(mask: np.ndarray) -> dict:
    """(H, W) bool, or integers 0 and 1, to the compressed form."""
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))


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


def to_json(rle: dict) -> dict:
    """The compressed form with values that JSON can hold."""
    height, width = rle["size"]
    return {"size": [int(height), int(width)], "counts": rle["counts"].decode("ascii")}
