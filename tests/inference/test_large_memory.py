"""Memory of large images in slices: neither the image, nor a mask of its size, is in it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from maskdino.inference import class_maps, large_result
from maskdino.inference.class_maps import LargeMap
from maskdino.inference.large_result import LargeResult
from maskdino.inference.sliced import predict_sliced
from maskdino.inference.tiles import TiledImage
from maskdino.ops.rle import encode_mask
from maskdino.system.errors import WriteError
from maskdino.visualization.results import ImageResult
from tests.inference.large_mosaic import CATEGORIES, see, seen, write_tiff
from tests.memory import in_child, needs_linux

SIDE = 2048


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_a_large_image_is_never_whole_in_memory(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image has 12.6 MB, a mask of its size 4.2 MB, and a map of segments 16.8 MB."""
    write_tiff(tmp_path / "large.tif", SIDE)
    monkeypatch.setattr(class_maps, "IN_MEMORY", 1 << 16)
    monkeypatch.setattr(large_result, "LONGEST_DRAWN", SIDE // 8)
    monkeypatch.setattr(large_result, "PIXELS_AT_ONCE", 1 << 18)
    for name in ("runs.COLUMNS_AT_ONCE", "runs.PIXELS_AT_ONCE", "masks.VALUES_AT_ONCE"):
        monkeypatch.setattr(f"maskdino.ops.{name}", 1 << 16)
    image = TiledImage(tmp_path / "large.tif")
    predict = partial(seen, (task,))
    tracemalloc.start()
    result = predict_sliced(predict, image, size=256, overlap=0.2, name="large", progress=False)
    _, predicted = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    drawn, found = result.draw(task), result.to_dict()[task]
    _, made = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.size == (SIDE, SIDE) and drawn.shape == (SIDE // 8, SIDE // 8, 3)
    assert len(found) == 3 if task == "semantic" else len(found) > 10
    assert predicted < 4e6
    assert made < 6e6
    # What the whole image shows, where that is the same.
    whole = see((task,), image.part(slice(0, SIDE), slice(0, SIDE)))
    if task == "semantic":
        np.testing.assert_array_equal(result.label_map, whole.label_map)
    else:
        assert len(found) >= 0.95 * len(whole)


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_maps_of_noise_are_drawn_and_saved_in_little_memory(task: str, tmp_path: Path) -> None:
    """A million pixels that differ from their neighbors; image and drawing have 3 MB each."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (1000, 1000), np.uint8)
    parts: dict = {"label_map": labels}
    if task == "panoptic":
        segments = [{"id": i, "category_id": i, "isthing": i == 0} for i in range(4)]
        parts = {"panoptic_ids": labels.astype(np.int32), "segments": tuple(segments)}
    image = rng.integers(0, 256, (1000, 1000, 3), np.uint8)
    result = ImageResult("noise", (1000, 1000), CATEGORIES, source=image, **parts)
    peaks = {}
    for suffix in ("bmp", "json"):
        tracemalloc.start()
        result.save(tmp_path / f"noise.{suffix}", **({} if suffix == "json" else {"max_labels": 0}))
        _, peaks[suffix] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peaks["bmp"] < 20e6  # with run lengths, 60 MB
    assert peaks["json"] < 35e6
    saved = json.loads((tmp_path / "noise.json").read_text())
    assert saved == result.to_dict()
    assert sum(entry["area"] for entry in saved[task]) == 1000**2


def test_a_scaled_down_result_is_that_of_the_scaled_down_image(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", 515)  # no multiple of the factor
    image = TiledImage(tmp_path / "a.tif")
    predict = partial(seen, ("instance", "semantic"))
    result = predict_sliced(predict, image, size=256, overlap=0.2, name="a", progress=False)
    small = result.scaled_down(200)
    assert small.size == (172, 172) and len(small) == len(result) > 0
    np.testing.assert_array_equal(
        small.image, np.asarray(Image.open(tmp_path / "a.tif").convert("RGB").reduce(3))
    )
    for mask, own, box in zip(small.masks, result.masks, small.boxes, strict=True):
        share = np.pad(own, (0, 1)).reshape(172, 3, 172, 3).mean((1, 3))
        np.testing.assert_array_equal(mask, share >= 0.5)
        assert abs(mask_utils.toBbox(encode_mask(mask))[:2] - box[:2]).max() <= 1
    assert (small.label_map == result.label_map[1::3, 1::3][:172, :172]).all()
    assert result.scaled_down(515).size == (515, 515)


def test_classes_are_the_largest_sums_of_weighted_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slices disagree, and what is second best to both is best where both count alike."""
    first_and_second = [0.5, 0.4, 0.1, 0], [0.1, 0.4, 0.5, 0]
    answers = iter(first_and_second)

    def predict(images: Iterable[np.ndarray]) -> Iterator[ImageResult]:
        for image in images:
            scores = np.zeros((4, 100, 100), np.float16) + np.array(next(answers))[:, None, None]
            maps = {"label_map": scores.argmax(0).astype(np.uint8), "class_scores": scores}
            yield ImageResult("slice", image.shape[:2], CATEGORIES, **maps)

    image = TiledImage(np.zeros((100, 180, 3), np.uint8))
    common = {"size": 100, "overlap": 0.2, "name": "a", "progress": False}
    result = predict_sliced(predict, image, **common)
    assert result.class_scores is None
    labels = result.label_map[50].tolist()
    assert (result.label_map == labels).all()
    assert labels == sorted(labels) and labels[90] == 1
    assert 80 < labels.index(1) < 90 < labels.index(2) < 100
    answers = iter(first_and_second)
    scores = predict_sliced(predict, image, **common, class_scores=True).class_scores
    assert scores.dtype == np.float16 and scores.shape == (4, 100, 180)
    np.testing.assert_array_equal(scores.argmax(0), result.label_map)
    left, right = (np.array(x, np.float16) for x in first_and_second)
    np.testing.assert_array_equal(scores[:, 50, :80].T - left, 0)
    np.testing.assert_array_equal(scores[:, 50, 100:].T - right, 0)
    # Column 83 is the fourth of the second slice, and 16 away from the right edge of the first.
    np.testing.assert_allclose(scores[:, 50, 83], (17 * left + 4 * right) / 21, atol=1e-3)
    monkeypatch.setattr(class_maps, "MOST_SCORES", 4 * 4 * 100 * 180 - 1)
    answers = iter(first_and_second)
    with pytest.raises(
        ValueError, match=r"^the scores of 4 classes of 180 x 100 pixels need 0\.0 "
    ):
        predict_sliced(predict, image, **common, class_scores=True)


def test_a_drawing_takes_no_copy_of_scores() -> None:
    scores = np.broadcast_to(np.float16(0), (1000, 100, 180))  # 36 MB, if they were copied
    maps = {"label_map": np.zeros((100, 180), np.uint8), "class_scores": scores}
    image = TiledImage(np.zeros((100, 180, 3), np.uint8))
    result = LargeResult("a", image.size, CATEGORIES, **maps, tiled=image)
    tracemalloc.start()
    assert result.draw().shape == (100, 180, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_no_room_for_a_map_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_number: int, _begin: int, _size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(class_maps, "IN_MEMORY", 10)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WriteError, match="a map of 4 MB has no room in .*No space left.*TMPDIR"):
        LargeMap((1000, 1000), np.int32)


@needs_linux
@pytest.mark.campaign
@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_memory_at_20000_pixels_squared(task: str) -> None:
    """The image has 1.2 GB, a mask of its size 0.4 GB, a map of segments 1.6 GB."""
    found = in_child("tests.inference.large_mosaic", "20000", task)
    print(task, found)  # noqa: T201 - figures for the record, shown by -rP
    assert found["width"] == 5000
    assert found["predicted"] - found["before"] < 400
    assert found["drawn"] - found["before"] < 500
    # The stand-in's maps have far more edges than those of a model.
    assert found["most"] - found["before"] < 500 + 2 * found["file"]
