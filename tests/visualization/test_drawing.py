"""Drawn regions, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from maskdino.ops import masks
from maskdino.ops.masks import RunMask, masks_of_map
from maskdino.ops.rle import encode_mask
from maskdino.visualization import drawing
from maskdino.visualization.drawing import (
    FILL_OPACITY,
    Region,
    below,
    beside,
    color_of,
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
    for wrong in (0, -1, 0.5):
        with pytest.raises(ValueError, match=f"whole factors from 1 on, not by {wrong}"):
            enlarge(image, wrong)


def test_masks_are_filled_and_outlined() -> None:
    image, mask = noise(20, 24, 3), np.zeros((20, 24), bool)
    mask[4:12, 6:20] = True
    color = (200, 30, 90)
    drawn = draw_regions(image, [Region(color, mask=RunMask.of(encode_mask(mask)))])
    border = contour(mask)
    expected = image.astype(float)
    expected[mask] = expected[mask] * (1 - FILL_OPACITY) + np.multiply(color, FILL_OPACITY)
    expected[border] = color
    np.testing.assert_allclose(drawn, expected, atol=0.51)
    assert (drawn[~mask] == image[~mask]).all()


def scene() -> tuple[np.ndarray, np.ndarray]:
    """An image, and a map (90, 130) of blobs over bands of ground, with pixels of nothing."""
    rows, columns = np.mgrid[:90, :130]
    labels = (1 + rows // 25).astype(np.int32)
    labels[np.sin(columns / 9) + np.cos(rows / 7) > 1.2] = 9
    for number in range(10, 30):
        y, x = 4 * number % 83, 29 * number % 120
        labels[np.hypot(rows - y, 0.6 * (columns - x)) < 3 + number % 9] = number
    labels[noise(90, 130) < 4] = 30  # single pixels
    labels[:, 60:64] = 0
    return noise(90, 130, 3), labels


@pytest.mark.parametrize(("scale", "at_once"), [(1, 1), (1, 700), (3, 1), (3, 500), (2, 1 << 20)])
def test_maps_are_drawn_as_their_masks_are(
    scale: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips of any width, with outlines of several pixels, labels and boxes."""
    image, labels = scene()
    monkeypatch.setattr(drawing, "line_width", lambda _: 3)
    numbers = [n for n in np.unique(labels).tolist() if n]
    boxes = {n: (n, 5.0, n + 20.0, 30.5) for n in numbers[::4]}
    common = {n: (color_of(n), f"number {n}" if n % 3 else "", boxes.get(n)) for n in numbers}
    encoded = [Region(*common[n], RunMask.of(encode_mask(labels == n))) for n in numbers]
    expected = draw_regions(image, encoded, scale=scale)
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", at_once)
    found = masks_of_map(labels)
    drawn = draw_regions(image, [Region(*common[n], found[n]) for n in numbers], scale=scale)
    np.testing.assert_array_equal(drawn, expected)
    assert (drawn != enlarge(image, scale)).any(2).mean() > 0.5


def test_images_below_and_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "GAP", 2)
    images = [noise(4, 9, 3), noise(6, 5, 3)]
    sheet = below(images)
    assert sheet.shape == (12, 9, 3) and sheet.dtype == np.uint8
    assert (sheet[:4] == images[0]).all() and (sheet[6:, :5] == images[1]).all()
    assert (sheet[4:6] == 255).all() and (sheet[6:, 5:] == 255).all()
    assert (below(images[:1]) == images[0]).all()
    row = beside([("", image) for image in images])
    assert row.shape[1] == 16
    strip = row.shape[0] - 6
    assert (row[strip : strip + 4, :9] == images[0]).all() and (row[strip:, 11:] == images[1]).all()
