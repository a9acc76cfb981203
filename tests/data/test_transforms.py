"""Augmentations: sizes, geometry, colors, and what the configuration chooses."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
from detectron2.data import transforms as T

from maskdino.data.stream import seeded
from maskdino.data.transforms import (
    LargeScaleJitter,
    TransposeTransform,
    build_augmentations,
    build_flips,
)


def apply(augmentation: T.Augmentation, image: np.ndarray) -> tuple[np.ndarray, T.Transform]:
    aug_input = T.AugInput(image)
    transform = augmentation(aug_input)
    return aug_input.image, transform


@pytest.mark.parametrize("size", [(1, 1), (5, 1000), (1000, 5), (31, 20), (64, 96), (200, 300)])
def test_jitter_always_gives_its_size(size: tuple[int, int]) -> None:
    augmentation = LargeScaleJitter((64, 96), 0.1, 2.0)
    for seed in range(10):
        np.random.seed(seed)
        result, _ = apply(augmentation, np.zeros((*size, 3), np.uint8))
        assert result.shape == (64, 96, 3)


def test_jitter_scales_over_its_whole_range_and_crops_both_axes_independently() -> None:
    np.random.seed(0)
    augmentation = LargeScaleJitter((64, 96), 0.5, 2.0)
    transforms = [augmentation.get_transform(np.zeros((64, 96, 3))) for _ in range(200)]
    scales = [t[0].new_w / 96 for t in transforms]
    assert 0.5 <= min(scales) < 0.6 and 1.9 < max(scales) <= 2.0
    large = [t for t in transforms if t[0].new_w > 140]
    offsets = np.array([(t[1].x0 / (t[0].new_w - 96), t[1].y0 / (t[0].new_h - 64)) for t in large])
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.4
    assert offsets.min() < 0.1 and offsets.max() > 0.9


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (64, 32)), ((30, 90), (32, 96))])
def test_factor_of_one_just_fits(size: tuple[int, int], expected: tuple[int, int]) -> None:
    resize, crop, pad = LargeScaleJitter((64, 96), 1.0, 1.0).get_transform(np.zeros((*size, 3)))
    assert (resize.new_h, resize.new_w) == (crop.h, crop.w) == expected
    assert (pad.x1, pad.y1) == (96 - expected[1], 64 - expected[0])


def test_crops_reach_the_last_row_and_column() -> None:
    np.random.seed(0)
    augmentation = LargeScaleJitter((64, 96), 1.02, 1.02)  # 65 x 98 pixels
    crops = [augmentation.get_transform(np.zeros((64, 96, 3)))[1] for _ in range(60)]
    assert {crop.y0 for crop in crops} == {0, 1} and {crop.x0 for crop in crops} == {0, 1, 2}


def test_jitter_moves_points_with_the_image() -> None:
    image = np.zeros((100, 80, 3), np.uint8)
    image[40:50, 20:30] = 255
    for seed in range(20):
        np.random.seed(seed)
        result, transform = apply(LargeScaleJitter((64, 96), 0.5, 2.0), image)
        x, y = transform.apply_coords(np.array([[25.0, 45.0]]))[0]
        if 1 <= x < 95 and 1 <= y < 63:
            assert result[int(y), int(x), 0] > 200


def test_jitter_pads_masks_with_zeros_and_images_with_gray() -> None:
    np.random.seed(0)
    augmentation = LargeScaleJitter((64, 96), 0.5, 0.5)
    result, transform = apply(augmentation, np.full((64, 96, 3), 9, np.uint8))
    mask = transform.apply_segmentation(np.ones((64, 96), np.uint8))
    assert mask[:32, :48].all() and mask.sum() == 32 * 48
    assert (result[mask == 1] == 9).all() and (result[mask == 0] == 128).all()


@pytest.mark.parametrize(
    "arguments", [((0, 5), 1, 2), ((5,), 1, 2), ((5, 5), 2, 1), ((5, 5), 0, 1)]
)
def test_jitter_refuses_nonsense(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="large-scale jitter"):
        LargeScaleJitter(*arguments)


def test_jitter_takes_the_smallest_size_that_there_is() -> None:
    assert LargeScaleJitter((1, 1), 1, 1).size == (1, 1)


def test_transposition_agrees_on_images_points_and_boxes() -> None:
    image = np.zeros((10, 20), np.uint8)
    image[2:5, 7:15] = 1
    transform = TransposeTransform()
    box = transform.apply_box(np.array([[7.0, 2.0, 15.0, 5.0]]))[0].astype(int)
    result = transform.apply_image(image)
    assert result.shape == (20, 10)
    assert result[box[1] : box[3], box[0] : box[2]].all() and result.sum() == image.sum()


@pytest.mark.parametrize(
    ("name", "orientations"),
    [("none", 1), ("horizontal", 2), ("vertical", 2), ("both", 4), ("dihedral", 8)],
)
def test_flips_reach_every_orientation(name: str, orientations: int) -> None:
    np.random.seed(0)
    image = np.arange(9, dtype=np.uint8).reshape(3, 3)
    augmentation = T.AugmentationList(build_flips(name))
    assert len({apply(augmentation, image)[0].tobytes() for _ in range(200)}) == orientations


def test_unknown_flip_is_named() -> None:
    with pytest.raises(ValueError, match="'sideways'.*dihedral"):
        build_flips("sideways")


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_colors_vary_and_repeat_with_the_seeds_of_the_stream(
    image_format: str, make_cfg: Callable
) -> None:
    options = ("INPUT.COLOR_AUG_SSD", True, "INPUT.FORMAT", image_format)
    jitter = T.AugmentationList([build_augmentations(make_cfg(*options), is_train=True)[1]])
    order = slice(None) if image_format == "RGB" else slice(None, None, -1)
    image = np.full((8, 9, 3), (50, 200, 100), np.uint8)[..., order]
    colors = []
    for seed in (*range(100), 3):
        with seeded(seed):
            result, transform = apply(jitter, image)
        assert result.dtype == np.uint8 and (result == result[0, 0]).all()
        assert (transform.apply_segmentation(image[..., 0]) == image[..., 0]).all()
        colors.append(colorsys.rgb_to_hsv(*(result[0, 0, order] / 255)))
    assert colors[3] == colors[-1]
    hues, saturations, values = np.array(colors).T
    assert np.abs(hues - 140 / 360).max() < 0.12  # at most 36 degrees, and rounding
    assert np.ptp(hues) > 0.1 and np.ptp(saturations) > 0.4 and np.ptp(values) > 0.5


def test_colors_need_a_format_that_has_them(make_cfg: Callable) -> None:
    options = ("INPUT.COLOR_AUG_SSD", True, "INPUT.FORMAT", "YUV-BT.601")
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT RGB or BGR, not YUV"):
        build_augmentations(make_cfg(*options), is_train=True)


def test_configuration_chooses_augmentations(make_cfg) -> None:
    def names(*options: object, **arguments: object) -> list[str]:
        augmentations = build_augmentations(make_cfg(*options), **{"is_train": True, **arguments})
        return [type(augmentation).__name__ for augmentation in augmentations]

    resize = ("INPUT.LSJ.ENABLED", False, "INPUT.RANDOM_FLIP", "none")
    crop = (*resize, "INPUT.CROP.ENABLED", True, "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.75)
    assert names() == ["RandomFlip", "LargeScaleJitter"]
    assert names("INPUT.COLOR_AUG_SSD", True)[1] == "ColorAugSSDTransform"
    assert names(*resize) == ["ResizeShortestEdge"]
    assert names(*crop) == ["ResizeShortestEdge", "RandomCrop"]
    assert names(*crop, ignored_category=0)[1] == "RandomCrop_CategoryAreaConstraint"
    assert names(is_train=False) == ["ResizeShortestEdge"]
