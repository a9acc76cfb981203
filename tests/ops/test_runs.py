"""Run lengths of parts of an image are those of the whole, and no array of the whole is made."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from maskdino.ops.rle import encode_mask
from maskdino.ops.runs import crop_mask, encode_at, encode_map, rle_of, runs_of


def random_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(20, 30), (1, 40), (40, 1), (7, 5), (300, 2), (64, 64)]
    masks = [rng.random(s) < p for s in shapes for p in (0, 0.02, 0.3, 0.7, 0.98, 1.1)]
    blob = np.zeros((200, 300), bool)
    blob[50:120, 100:180] = True
    return [*masks, blob, ~blob]


@pytest.mark.parametrize("number", range(len(random_masks())))
def test_crops_and_runs_are_those_of_the_decoded_mask(number: int) -> None:
    mask = random_masks()[number]
    rle = encode_mask(mask)
    assert rle_of(runs_of(rle), mask.shape) == rle
    cropped, (top, left) = crop_mask(rle)
    again = np.zeros_like(mask)
    again[top : top + cropped.shape[0], left : left + cropped.shape[1]] = cropped
    np.testing.assert_array_equal(again, mask)
    if mask.any():
        assert cropped.any(0)[[0, -1]].all() and cropped.any(1)[[0, -1]].all()
        assert encode_at(cropped, (top, left), mask.shape) == rle
    else:
        assert cropped.size == 0


def test_texts_are_those_of_pycocotools() -> None:
    """Counts of one to six digits, which rise and fall."""
    rng = np.random.default_rng(0)
    for last in (1, 15, 16, 17, 500, 1 << 9, 1 << 14, 1 << 19, 1 << 24):
        for number in (1, 2, 3, 4, 5, 60):
            counts = rng.integers(1, last + 1, number)
            edges = np.cumsum(counts)[: number // 2 * 2]
            size = int(counts.sum()), 1
            expected = mask_utils.frPyObjects({"size": size, "counts": counts}, *size)
            assert rle_of(edges.reshape(-1, 2), size) == expected


def test_masks_within_an_image() -> None:
    rng = np.random.default_rng(0)
    for top, left, height, width in ((0, 0, 20, 30), (3, 5, 9, 8), (0, 7, 20, 4), (19, 29, 1, 1)):
        for density in (0.5, 1.1):
            mask = rng.random((height, width)) < density
            whole = np.zeros((20, 30), bool)
            whole[top : top + height, left : left + width] = mask
            assert encode_at(mask, (top, left), (20, 30)) == encode_mask(whole)


def test_empty_runs_within_a_mask() -> None:
    """As other programs write them."""
    rle = mask_utils.frPyObjects({"size": [4, 3], "counts": [2, 3, 0, 2, 5]}, 4, 3)
    cropped, corner = crop_mask(rle)
    whole = mask_utils.decode(rle).astype(bool)
    np.testing.assert_array_equal(cropped, whole[:4, :2])
    assert corner == (0, 0)


def test_maps_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (30, 50)).astype(np.int32).repeat(3, 0).repeat(2, 1)
    labels[:, 20:40] = 7
    for at_once, rows in ((7, 1), (500, 7), (1 << 20, 256)):
        monkeypatch.setattr("maskdino.ops.runs.COLUMNS_AT_ONCE", 3 * at_once)
        monkeypatch.setattr("maskdino.ops.runs.PIXELS_AT_ONCE", at_once)
        monkeypatch.setattr("maskdino.ops.runs.ROWS_AT_ONCE", rows)
        found = encode_map(labels)
        assert found == {n: encode_mask(labels == n) for n in (0, 1, 2, 3, 7)}


def test_a_small_mask_in_a_large_image_stays_small() -> None:
    """Of 20,000 x 20,000 pixels, 400 MB as an array."""
    disk = np.hypot(*np.mgrid[-20:21, -20:21]) < 20
    tracemalloc.start()
    rle = encode_at(disk, (15_000, 19_000), (20_000, 20_000))
    cropped, corner = crop_mask(rle)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(cropped, disk[1:-1, 1:-1])
    assert corner == (15_001, 19_001) and mask_utils.area(rle) == disk.sum()
    assert peak < 1e6
