"""Bilinear sampling, one point at a time, for slow forms of whatever samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bilinear(values: Tensor, x: float, y: float) -> Tensor:
    """Values (...) of a map (H, W, ...) at (x, y) in [0, 1], zero outside.

    Pixel centers lie at (i + 0.5) / size; where a coordinate is not finite, all is zero.
    """
    height, width = values.shape[:2]
    dtype = values.dtype if values.is_floating_point() else torch.float32
    total = torch.zeros(values.shape[2:], dtype=dtype)
    column, row = x * width - 0.5, y * height - 0.5
    if not (math.isfinite(column) and math.isfinite(row)):
        return total
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * values[i, j]
    return total
