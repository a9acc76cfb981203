"""Predictions as a dataset: what is written is what was found, and can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_fill_holes

from maskdino.categories import Categories
from maskdino.custom.annotations import read_annotations
from maskdino.custom.checks import check
from maskdino.inference.labels import ClassThresholds, CocoLabels, polygons_of
from maskdino.ops.rle import decode_segmentation, encode_mask
from maskdino.visualization.results import ImageResult

CATEGORIES = Categories(("cat", "dog, wet"), (True, True), (7, 3))


def random_blobs(seed: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """Blobs with holes, islands in holes, and pixels that meet at corners."""
    rng = np.random.default_rng(seed)
    rough = rng.random((size[0] // 4, size[1] // 4)) < 0.6
    return rough.repeat(4, 0).repeat(4, 1) ^ (rng.random(size) < 0.03)


def result_of(masks: list[np.ndarray], size: tuple[int, int] = (60, 80)) -> ImageResult:
    number = len(masks)
    return ImageResult(
        "a",
        size,
        CATEGORIES,
        boxes=np.tile(np.array([[1, 2, 30, 40]], np.float32), (number, 1)),
        scores=np.linspace(0.9, 0.3, number, dtype=np.float32),
        class_ids=np.arange(number) % 2,
        rles=tuple(map(encode_mask, masks)),
    )


@pytest.mark.parametrize("seed", range(5))
def test_polygons_without_tolerance_are_the_mask(seed: int) -> None:
    mask = random_blobs(seed)
    assert (binary_fill_holes(mask) ^ mask).sum() > 30
    polygons = polygons_of(encode_mask(mask), 0)
    np.testing.assert_array_equal(decode_segmentation(polygons, mask.shape), mask)


def test_a_tolerance_saves_vertices_and_stays_near() -> None:
    y, x = np.mgrid[:200, :300]
    disk = np.hypot(y - 100, x - 150)
    mask = (disk < 90) & (disk > 40)
    exact = polygons_of(encode_mask(mask), 0)
    rough = polygons_of(encode_mask(mask), 1.5)
    assert len(rough) == len(exact) == 1
    assert len(rough[0]) < len(exact[0]) / 5
    off = decode_segmentation(rough, mask.shape) ^ mask
    assert not (off & (np.abs(disk - 90) > 3) & (np.abs(disk - 40) > 3)).any()
    assert off.sum() < 0.05 * mask.sum()
    closed = decode_segmentation(polygons_of(encode_mask(mask), 80), mask.shape)
    assert closed[100, 150]  # a hole that fits into the tolerance is closed
    dot = np.zeros((9, 9), bool)
    dot[4, 4] = True
    assert decode_segmentation(polygons_of(encode_mask(dot), 5), (9, 9)).sum() == 1


@pytest.mark.parametrize("tolerance", [None, 0.0, 1.0])
def test_own_data_are_read_from_it_without_a_complaint(
    tolerance: float | None, tmp_path: Path
) -> None:
    paths = [tmp_path / "x" / "b.png", tmp_path / "a.png"]
    labels = CocoLabels(CATEGORIES, paths, tolerance=tolerance)
    masks = [random_blobs(0), random_blobs(1), np.zeros((60, 80), bool)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (80, 60)).save(path)
        labels.add(path, result_of(masks))
    assert labels.left_out == 2 and labels.root == tmp_path
    target = tmp_path / "labels" / "out.json"
    labels.write(target)
    assert [path.name for path in target.parent.iterdir()] == ["out.json"]
    data = read_annotations(target, labels.root)
    assert not [finding for finding in check(data, need_all_masks=True) if finding.fatal]
    assert [image["file_name"] for image in data.images] == ["x/b.png", "a.png"]
    assert data.categories == [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog, wet"}]
    assert [a["id"] for a in data.annotations] == [1, 2, 3, 4]
    assert [a["category_id"] for a in data.annotations] == [7, 3, 7, 3]
    assert [a["score"] for a in data.annotations] == [0.9, 0.6, 0.9, 0.6]
    kind = dict if tolerance is None else list
    assert all(isinstance(a["segmentation"], kind) for a in data.annotations)
    found = decode_segmentation(data.annotations[1]["segmentation"], (60, 80))
    assert (found ^ masks[1]).mean() < (0.1 if tolerance else 1e-9)


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    labels = CocoLabels(CATEGORIES, [tmp_path / "a.png"])
    labels.images.append({"id": object()})
    with pytest.raises(TypeError):
        labels.write(target)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_boxes_without_masks(tmp_path: Path) -> None:
    result = ImageResult(**{**vars(result_of([random_blobs(0)])), "rles": None})
    labels = CocoLabels(CATEGORIES, [tmp_path / "a.png"])
    labels.add(tmp_path / "a.png", result)
    (entry,) = labels.annotations
    assert entry["bbox"] == [1, 2, 29, 38] and entry["area"] == 29 * 38
    assert "segmentation" not in entry
    json.dumps(labels.annotations)


def test_thresholds_of_classes() -> None:
    thresholds = ClassThresholds("cat=0.5,dog, wet=0.2")
    assert thresholds.scores == {"cat": 0.5, "dog, wet": 0.2}
    thresholds.check(CATEGORIES)
    assert thresholds.least(0.4) == 0.2
    masks = [random_blobs(i) for i in range(4)]  # scores 0.9, 0.7, 0.5, 0.3 of cat, dog, cat, dog
    assert len(thresholds.select(result_of(masks), 0.4)) == 4
    kept = ClassThresholds("cat=0.6").select(result_of(masks), 0.4)
    assert kept.class_names == ["cat", "dog, wet"]
    with pytest.raises(ValueError, match="there is no class bird; the classes are cat, dog, wet"):
        ClassThresholds("bird=0.5").check(CATEGORIES)


@pytest.mark.parametrize("text", ["cat", "cat=2", "cat=0.5,dog", "=0.5", "cat=-1", "cat=.e"])
def test_thresholds_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be name=score"):
        ClassThresholds(text)


def test_a_tolerance_below_zero() -> None:
    with pytest.raises(ValueError, match="polygons within -1 pixels"):
        CocoLabels(CATEGORIES, [], tolerance=-1)
