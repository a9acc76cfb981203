"""Drawn regions, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from maskdino.ops.rle import encode_mask
from maskdino.visualization.drawing import (
    FILL_OPACITY,
    Region,
    below,
    beside,
    contour,
    draw_regions,
    enlarge,
)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_contours_are_what_lies_near_the_background(width: int) -> None:
    """Steps go up, down, left and right; outside of the image is background."""
    mask = noise(13, 17) < 235
    rows, columns = np.mgrid[-1:14, -1:18]
    background = ~np.pad(mask, 1)
    expected = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        distance = abs(rows - y) + abs(columns - x)
        expected[y, x] = distance[background].min() <= width
    found = contour(mask, width)
    assert found.dtype == bool and (found == expected).all()
    assert 0 < found.sum() < mask.sum() or width > 1


@pytest.mark.parametrize("scale", [1, 3])
def test_enlarged_images_repeat_their_pixels(scale: int) -> None:
    image = noise(4, 5, 3)
    found = enlarge(image, scale)
    assert (found == image.repeat(scale, axis=0).repeat(scale, axis=1)).all()
    found[:] = 0
    assert image.any()  # it is a copy


def test_masks_are_filled_and_outlined() -> None:
    image, mask = noise(20, 24, 3), np.zeros((20, 24), bool)
    mask[4:12, 6:20] = True
    color = (200, 30, 90)
    drawn = draw_regions(image, [Region(color, rle=encode_mask(mask))])
    border = contour(mask)
    expected = image.astype(float)
    expected[mask] = expected[mask] * (1 - FILL_OPACITY) + np.multiply(color, FILL_OPACITY)
    expected[border] = color
    np.testing.assert_allclose(drawn, expected, atol=0.51)
    assert (drawn[~mask] == image[~mask]).all()


def test_images_below_and_beside_each_other() -> None:
    images = [noise(4, 9, 3), noise(6, 5, 3)]
    sheet = below(images, gap=2)
    assert sheet.shape == (12, 9, 3) and sheet.dtype == np.uint8
    assert (sheet[:4] == images[0]).all() and (sheet[6:, :5] == images[1]).all()
    assert (sheet[4:6] == 255).all() and (sheet[6:, 5:] == 255).all()
    assert (below(images[:1], gap=0) == images[0]).all()
    row = beside([("", image) for image in images], gap=2)
    assert row.shape[1] == 16
    strip = row.shape[0] - 6
    assert (row[strip : strip + 4, :9] == images[0]).all() and (row[strip:, 11:] == images[1]).all()
