"""Masks in parts are the masks, whatever they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from maskdino.ops import masks
from maskdino.ops.masks import Mask, RunMask, masks_of_map
from maskdino.ops.rle import encode_mask


def drawn_map() -> np.ndarray:
    """Blocks, single pixels, a frame around all, and numbers that are not small."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (10, 15)).astype(np.int32).repeat(4, 0).repeat(3, 1)
    labels[rng.random(labels.shape) < 0.01] = -3
    labels[[0, -1]] = labels[:, [0, -1]] = 1 << 30
    labels[20, 30] = 1000
    return labels


def whole(mask: Mask, shape: tuple[int, ...], unit: int = 1) -> np.ndarray:
    """Of its strips; nothing is told twice."""
    found = np.zeros(shape, int)
    for left, right in mask.strips(unit=unit):
        found[mask.top : mask.bottom, left:right] += mask.columns(left, right)
        assert mask.left <= left < right <= mask.right
        assert right == mask.right or (left - mask.left) % unit == 0
    assert found.max(initial=0) <= 1
    return found.astype(bool)


@pytest.mark.parametrize("at_once", [1, 90, 1 << 20])
@pytest.mark.parametrize("unit", [1, 4])
def test_strips_of_masks(at_once: int, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", at_once)
    monkeypatch.setattr(masks, "VALUES_AT_ONCE", at_once)
    labels = drawn_map()
    found = masks_of_map(labels)
    assert list(found) == np.unique(labels).tolist() == [-3, 0, 1, 2, 3, 1000, 1 << 30]
    for number, of_map in found.items():
        expected = labels == number
        rows, columns = np.nonzero(expected)
        for mask in (of_map, RunMask.of(encode_mask(expected))):
            assert mask.area == expected.sum()
            assert (mask.top, mask.bottom) == (rows.min(), rows.max() + 1)
            assert (mask.left, mask.right) == (columns.min(), columns.max() + 1)
            np.testing.assert_array_equal(whole(mask, labels.shape, unit), expected)


def test_an_empty_mask_has_no_strip() -> None:
    mask = RunMask.of(encode_mask(np.zeros((5, 7), bool)))
    assert mask.area == 0 and list(mask.strips()) == []


def test_strips_may_begin_before_the_mask() -> None:
    """At multiples of a number of columns of the image."""
    only = np.zeros((4, 20), bool)
    only[1:3, 5:14] = True
    mask = RunMask.of(encode_mask(only))
    assert list(mask.strips(4, 4)) == [(5, 14)]
    object.__setattr__(mask, "bottom", 1 << 20)  # as many rows as pixels at one time
    assert list(mask.strips(4, 4)) == [(5, 8), (8, 12), (12, 14)]
