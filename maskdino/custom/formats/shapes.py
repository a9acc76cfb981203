"""Shapes that are neither boxes nor polygons, as polygons or run lengths.

Shape key: H, W pixels of an image; h, w pixels of a mask's box.
"""

from __future__ import annotations

import math

import numpy as np

from maskdino.data import DataError
from maskdino.ops.rle import encode_mask, to_json

DEVIATION = 0.05  # pixels by which a polygon may miss its ellipse
MOST = 3200  # corners, which is enough for all radii that a mask may have


def ellipse(center: tuple[float, float], radii: tuple[float, float]) -> list[float]:
    """A polygon [x, y, x, y, ...] within `DEVIATION` of an ellipse."""
    step = math.acos(1 - DEVIATION / max(*radii, 1.0))
    number = max(16, math.ceil(math.pi / max(step, math.pi / MOST)))
    angles = (2 * math.pi * i / number for i in range(number))
    return [
        value
        for angle in angles
        for value in (
            center[0] + radii[0] * math.cos(angle),
            center[1] + radii[1] * math.sin(angle),
        )
    ]


def turned(points: list[float], center: tuple[float, float], degrees: float) -> list[float]:
    """Points [x, y, x, y, ...], turned clockwise (y points down) about a center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = np.reshape(points, (-1, 2)).T - np.reshape(center, (2, 1))
    pairs = center[0] + x * cos - y * sin, center[1] + x * sin + y * cos
    return np.stack(pairs, axis=1).ravel().tolist()


def placed(mask: np.ndarray, left: int, top: int, size: tuple[int, int], where: str) -> dict:
    """Run lengths of a mask (h, w) bool that lies in an image of (H, W); what is beyond is cut off.

    Raises:
        DataError: no pixel of the mask is in the image.
    """
    whole = np.zeros(size, bool)
    top_left = max(top, 0), max(left, 0)
    part = mask[max(-top, 0) : size[0] - top, max(-left, 0) : size[1] - left]
    if top >= size[0] or left >= size[1] or not part.any():
        raise DataError(f"{where}: no pixel of the mask lies in the image")
    whole[top_left[0] : top_left[0] + part.shape[0], top_left[1] : top_left[1] + part.shape[1]] = (
        part
    )
    return to_json(encode_mask(whole))
