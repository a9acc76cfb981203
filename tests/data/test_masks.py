"""Masks of every form against slow, obvious drawing."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T

from maskdino.data.masks import CroppedMask, draw_polygons, pack, transform_mask
from maskdino.data.reading import DataError

SIZE = (40, 53)
NOTHING = T.TransformList([])


def whole(mask: CroppedMask | None, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The mask of the whole image, (H, W) bool."""
    return pack([mask], size).to_bool().numpy()[0]


@pytest.mark.parametrize(("low", "high"), [((0, 0), (53, 40)), ((-30, -30), (80, 70))])
def test_polygons_on_crops_equal_polygons_on_the_image(
    low: tuple[int, int], high: tuple[int, int]
) -> None:
    generator = np.random.default_rng(0)
    for number in generator.integers(3, 9, 200):
        polygons = [generator.uniform(low, high, (number, 2)) for _ in range(2)]
        rles = mask_util.frPyObjects([polygon.ravel() for polygon in polygons], *SIZE)
        expected = mask_util.decode(rles).any(axis=2)
        mask = draw_polygons(polygons, SIZE)
        assert (whole(mask) == expected).all()


def test_polygon_outside_of_the_image_draws_nothing() -> None:
    for offset in ((-100, 0), (0, -100), (100, 0), (0, 100)):
        triangle = np.array([(1.0, 1.0), (9.0, 1.0), (5.0, 9.0)]) + offset
        assert draw_polygons([triangle], SIZE) is None


def test_all_forms_of_a_mask_are_the_same_mask() -> None:
    polygon = [5.0, 4.0, 40.0, 8.0, 30.0, 35.0]
    rle = mask_util.frPyObjects([polygon], *SIZE)[0]
    expected = mask_util.decode(rle).astype(bool)
    flat = expected.ravel(order="F")
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    forms = [
        [polygon],
        rle,
        {"size": list(SIZE), "counts": rle["counts"].decode()},
        {"size": list(SIZE), "counts": counts},
    ]
    for form in forms:
        mask = transform_mask(form, NOTHING, SIZE, SIZE)
        assert (whole(mask) == expected).all()
        x, y, width, height = mask_util.toBbox(rle)
        assert mask.box() == (x, y, x + width, y + height)


def test_polygons_and_rle_follow_the_same_transform() -> None:
    transforms = T.TransformList(
        [T.HFlipTransform(53), T.ResizeTransform(40, 53, 120, 159), T.CropTransform(30, 20, 96, 64)]
    )
    polygon = [5.0, 4.0, 40.0, 8.0, 30.0, 35.0]
    rle = mask_util.frPyObjects([polygon], *SIZE)[0]
    drawn = whole(transform_mask([polygon], transforms, SIZE, (64, 96)), (64, 96))
    resized = whole(transform_mask(rle, transforms, SIZE, (64, 96)), (64, 96))
    assert (drawn & resized).sum() / (drawn | resized).sum() > 0.93
    assert polygon == [5.0, 4.0, 40.0, 8.0, 30.0, 35.0]


def test_degenerate_polygons_draw_nothing() -> None:
    assert transform_mask([[1.0, 1.0, 9.0, 9.0]], NOTHING, SIZE, SIZE) is None
    assert transform_mask([[1.0, 1.0]], NOTHING, SIZE, SIZE) is None
    both = transform_mask([[1.0, 1.0, 9.0, 9.0], [2.0, 2, 8, 2, 8, 8]], NOTHING, SIZE, SIZE)
    one = transform_mask([[2.0, 2, 8, 2, 8, 8]], NOTHING, SIZE, SIZE)
    assert (whole(both) == whole(one)).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1.0, 2.0, 3.0]], "flat list"),
        ([[(1.0, 2.0), (3.0, 4.0)]], "flat list"),
        ([[1.0, float("nan"), 3.0, 4.0, 5.0, 6.0]], "finite"),
        ([[1.0, 1e9, 3.0, 4.0, 5.0, 6.0]], "finite"),
        ({"size": [10, 10], "counts": [100]}, r"\[10, 10\].*\(40, 53\)"),
        ({"size": list(SIZE)}, "RLE"),
        ({"size": list(SIZE), "counts": [5, 5]}, "add up to 10"),
    ],
)
def test_malformed_masks_are_errors(segmentation: list | dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        transform_mask(segmentation, NOTHING, SIZE, SIZE)


def test_boxes_and_packing_of_cropped_masks() -> None:
    pixels = np.zeros((5, 11), np.uint8)
    pixels[1:4, 2:10] = 1
    mask = CroppedMask(pixels, top=30, left=40)
    assert mask.box() == (42, 31, 50, 34)
    assert CroppedMask(np.zeros((5, 5), bool)).box() is None
    packed = pack([mask, None], SIZE)
    expected = torch.zeros(2, *SIZE, dtype=torch.bool)
    expected[0, 31:34, 42:50] = True
    assert packed.size == SIZE and torch.equal(packed.to_bool(), expected)
    assert len(pack([], SIZE)) == 0


@pytest.mark.parametrize("window", [(3, 9, 10, 30), (0, 0, 40, 53), (39, 52, 40, 53), (5, 5, 5, 5)])
def test_masks_of_whole_images_are_held_cropped(window: tuple[int, int, int, int]) -> None:
    """A copy: many whole masks of a large image never exist at one time."""
    top, left, bottom, right = window
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    found = CroppedMask.around(mask)
    assert (whole(found) == mask).all() and found.mask.base is None
    assert found.left % 8 == 0 and found.mask.size <= (bottom - top) * (right - left + 7)
    assert found.box() == ((left, top, right, bottom) if mask.any() else None)
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    again = transform_mask(rle, NOTHING, SIZE, SIZE)
    assert again.mask.shape == found.mask.shape and (again.mask == found.mask).all()
