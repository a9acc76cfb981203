"""Results of one image as COCO's entries, as boxes, and as what is drawn: by hand."""

from __future__ import annotations

import errno
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maskdino.categories import Categories
from maskdino.ops.rle import encode_mask
from maskdino.system.errors import WriteError
from maskdino.visualization.drawing import color_of
from maskdino.visualization.results import ImageResult

SIZE = (12, 16)
CATEGORIES = Categories(("cat", "sky", "dog"), (True, False, True), (17, 40, 5))


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture
def result() -> ImageResult:
    """Two objects; three segments, one of stuff; a label map with pixels of no class."""
    ids = np.zeros(SIZE, np.int32)
    ids[2:5, 3:10], ids[6:, :5], ids[6:, 9:] = 4, 2, 9
    labels = np.full(SIZE, 255, np.uint8)
    labels[:3, :4], labels[3:7, 5:8], labels[8:10, 1:3] = 1, 0, 7  # there is no class 7
    return ImageResult(
        "image.png",
        SIZE,
        CATEGORIES,
        boxes=np.array([[2, 3, 10, 9], [1, 0, 5, 11.5]], np.float32),
        scores=np.array([0.75, 0.5], np.float32),
        class_ids=np.array([2, 1]),
        rles=(encode_mask(rectangle(2, 3, 10, 9)), encode_mask(rectangle(1, 0, 5, 11))),
        panoptic_ids=ids,
        segments=(
            {"id": 4, "category_id": 2, "isthing": True, "score": 0.5},
            {"id": 2, "category_id": 1, "isthing": False},
            {"id": 9, "category_id": 0, "isthing": True, "score": 0.25},
        ),
        label_map=labels,
    )


def test_images_are_kept_or_said_to_be_missing(result: ImageResult) -> None:
    image = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(*SIZE, 3)
    np.testing.assert_array_equal(replace(result, source=image).image, image)
    with pytest.raises(ValueError, match=r"^the result of image\.png was made without its image$"):
        _ = result.image


def test_masks_are_decoded(result: ImageResult) -> None:
    expected = [rectangle(2, 3, 10, 9), rectangle(1, 0, 5, 11)]
    np.testing.assert_array_equal(result.masks, expected)
    assert result.select(np.array([], int)).masks.shape == (0, *SIZE)


def without_masks(entries: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "segmentation"} for entry in entries]


def test_drawings_are_written_whole_or_not_at_all(
    result: ImageResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((*result.size, 3), np.uint8)
    drawn, path = replace(result, source=image), tmp_path / "a.png"
    path.write_text("before")

    def save(_: Image.Image, target: Path, *__: object, **___: object) -> None:
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Image.Image, "save", save)
        with pytest.raises(WriteError, match=f"cannot write {path}: No space left"):
            drawn.save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["a.png"] and path.read_text() == "before"
    with pytest.raises(ValueError, match=r"a.bogus: no format of images has the suffix '.bogus'"):
        drawn.save(tmp_path / "a.bogus")
    for name in ("a.png", "b.JPG", "c.webp", "d.tif"):
        with Image.open(drawn.save(tmp_path / name)) as saved:
            assert saved.size == result.size[::-1]


def test_objects_in_the_form_of_coco(result: ImageResult) -> None:
    dog = {"image_id": "image.png", "category_id": 5, "category_name": "dog"}
    sky = {"image_id": "image.png", "category_id": 40, "category_name": "sky"}
    entries = result.to_coco()
    assert without_masks(entries) == [
        dog | {"bbox": [2, 3, 8, 6], "score": 0.75},
        sky | {"bbox": [1, 0, 4, 11.5], "score": 0.5},
    ]
    for entry, rle in zip(entries, result.rles, strict=True):
        counts = rle["counts"].decode()
        assert entry["segmentation"] == {"size": list(SIZE), "counts": counts}


def test_segments_in_the_form_of_coco(result: ImageResult) -> None:
    dog = {"image_id": 3, "category_id": 5, "category_name": "dog", "bbox": [3, 2, 7, 3]}
    sky = {"image_id": 3, "category_id": 40, "category_name": "sky", "bbox": [0, 6, 5, 6]}
    cat = {"image_id": 3, "category_id": 17, "category_name": "cat", "bbox": [9, 6, 7, 6]}
    assert without_masks(result.to_coco(3, "panoptic")) == [
        dog | {"area": 21, "score": 0.5},
        sky | {"area": 30},
        cat | {"area": 42, "score": 0.25},
    ]


def test_only_classes_that_there_are_become_regions(result: ImageResult) -> None:
    entries = without_masks(result.to_coco(3, "semantic"))
    assert [(e["category_name"], e["bbox"], e["area"]) for e in entries] == [
        ("cat", [5, 3, 3, 4], 12),
        ("sky", [0, 0, 4, 3], 12),
    ]


def test_more_classes_than_8_bits_tell() -> None:
    """Their maps are int32, and 255 is a class like others."""
    number = 257
    names = tuple(f"class {label}" for label in range(number))
    categories = Categories(names, (True,) * number, tuple(range(number)))
    labels = np.full(SIZE, 3, np.int32)
    labels[:2], labels[2:4] = 255, 256
    result = ImageResult("image.png", SIZE, categories, label_map=labels)
    found = [entry["category_id"] for entry in result.to_coco()]
    assert found == [3, 255, 256]


def test_colors_of_things_and_classes(result: ImageResult) -> None:
    """Each thing has its own, far from those of classes; stuff has that of its class."""

    def colors(task: str, given: list[int] | None = None) -> list[tuple]:
        return [region.color for region in result.regions(task, given)]

    assert colors("panoptic") == [color_of(3), color_of(1), color_of(3 + 2)]
    assert colors("panoptic", [8, 6, 7]) == [color_of(11), color_of(1), color_of(10)]
    assert colors("instance") == [color_of(0), color_of(1)]
    swapped = result.select(np.array([1, 0])).regions("instance")
    assert [region.color for region in swapped] == [color_of(1), color_of(1)]  # class 1, thing 1
    assert colors("instance", [8, 6]) == [color_of(8), color_of(6)]
    assert colors("semantic") == [color_of(0), color_of(1)]


def test_labels_and_boxes_of_regions(result: ImageResult) -> None:
    """A thing has a box; stuff with a mask has none."""
    dog, sky = result.regions("instance")
    assert (dog.label, dog.box) == ("dog 75", (2, 3, 10, 9))
    assert (sky.label, sky.box) == ("sky 50", None)
    assert [region.label for region in result.regions("panoptic")] == ["dog 50", "sky", "cat 25"]


def test_detections_of_supervision(result: ImageResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class takes these arguments; a stand-in keeps them."""
    stand_in = SimpleNamespace(Detections=lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    found = result.to_supervision()
    np.testing.assert_array_equal(found.xyxy, result.boxes)
    np.testing.assert_array_equal(found.mask, result.masks)
    assert found.mask.dtype == bool
    np.testing.assert_array_equal(found.confidence, result.scores)
    np.testing.assert_array_equal(found.class_id, result.class_ids)
    assert found.data["class_name"].tolist() == ["dog", "sky"]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="supervision"):
        result.to_supervision()
