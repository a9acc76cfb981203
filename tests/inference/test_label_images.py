"""Panoptic and semantic results as datasets: what is read back is what was found."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdino.categories import Categories
from maskdino.custom.formats import read_own_data
from maskdino.custom.request import Request
from maskdino.inference.label_images import PanopticLabels, SemanticLabels
from maskdino.inference.labels import CocoLabels
from maskdino.visualization.results import ImageResult

CATEGORIES = Categories(("cat", "sky", "sea"), (True, False, False), (7, 3, 4))
SIZE = (20, 30)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Images in two folders, one of them by a way through another."""
    for name in ("in/x/b.png", "in/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name)
    return [tmp_path / "in/x/b.png", tmp_path / "in/x/../a.jpg"]


def test_panoptic_segments_are_read_back(paths: list[Path], tmp_path: Path) -> None:
    labels = PanopticLabels(CATEGORIES, paths, tmp_path / "labels.json")
    ids = np.zeros(SIZE, np.int32)
    ids[:, 5:], ids[8:12, 10:20] = 2, 70000  # 0, what shows nothing, is left
    segments = (
        {"id": 2, "category_id": 1, "isthing": False},
        {"id": 70000, "category_id": 0, "isthing": True, "score": 0.75},
        {"id": 9, "category_id": 2, "isthing": False},  # covered by others
    )
    for path in paths:
        labels.add(path, ImageResult("a", SIZE, CATEGORIES, panoptic_ids=ids, segments=segments))
    labels.write(tmp_path / "labels.json")
    assert str(labels).startswith("4 segments of 2 images in ")
    assert str(labels).endswith(f"its images are below {tmp_path / 'in'}")
    request = Request(
        train_json=tmp_path / "labels.json", train_images=tmp_path / "in", output=tmp_path / "out"
    )
    own = read_own_data(request).train
    assert not own.findings and own.data.maps is not None and own.data.maps.task == "panoptic"
    assert [image["file_name"] for image in own.data.images] == ["x/b.png", "a.jpg"]
    found = [(x["name"], x["isthing"]) for x in own.data.categories]
    assert found == [("cat", 1), ("sky", 0), ("sea", 0)]
    for name, annotation in zip(("x/b.png", "a.png"), labels.annotations, strict=True):
        values = np.asarray(Image.open(tmp_path / "labels" / name)).astype(int)
        np.testing.assert_array_equal(values @ (1, 256, 65536), ids)
        assert annotation["segments_info"] == [
            {"id": 2, "iscrowd": 0, "category_id": 3, "bbox": [5, 0, 25, 20], "area": 460},
            {
                "id": 70000,
                "iscrowd": 0,
                "category_id": 7,
                "bbox": [10, 8, 10, 4],
                "score": 0.75,
                "area": 40,
            },
        ]


@pytest.mark.parametrize("number", [3, 300])
def test_classes_are_read_back(number: int, paths: list[Path], tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(number))
    categories = Categories(names, (True,) * number, tuple(range(number)))
    labels = SemanticLabels(categories, paths, tmp_path / "labels")
    values = np.arange(600).reshape(SIZE) % number
    for path in paths:
        labels.add(path, ImageResult("a", SIZE, categories, label_map=values))
    labels.write(tmp_path / "labels")
    assert str(labels) == f"2 label images in {tmp_path / 'labels'}"
    for name in ("x/b.png", "a.png"):
        image = Image.open(tmp_path / "labels" / name)
        assert (image.mode == "L") == (number == 3)
        np.testing.assert_array_equal(np.asarray(image), values)
    if number > 255:  # more than train-custom takes
        return
    request = Request(
        train_json=tmp_path / "labels", train_images=tmp_path / "in", output=tmp_path / "out"
    )
    own = read_own_data(request).train
    assert not own.findings and own.data.maps is not None and own.data.maps.task == "semantic"
    assert [x["name"] for x in own.data.categories] == list(names)
    assert sorted(image["file_name"] for image in own.data.images) == ["a.jpg", "x/b.png"]


def test_two_images_of_one_label_image_are_refused(tmp_path: Path) -> None:
    images = [tmp_path / "a.jpg", tmp_path / "a.png"]
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png would have one label image"):
        SemanticLabels(CATEGORIES, images, tmp_path / "labels")


def test_inputs_and_files_beside_them_are_not_replaced(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b\.png is an input: choose another folder for --coco"):
        SemanticLabels(CATEGORIES, paths, tmp_path / "in")
    with pytest.raises(ValueError, match=r"b\.png is an input: choose another folder for --coco"):
        PanopticLabels(CATEGORIES, paths, tmp_path / "in.json")
    SemanticLabels(CATEGORIES, paths[1:], tmp_path / "in")
    (tmp_path / "in" / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.png exists, in the folder of an input: .* --coco"):
        SemanticLabels(CATEGORIES, paths[1:], tmp_path / "in")


def test_names_lead_through_no_other_folder(paths: list[Path]) -> None:
    labels = CocoLabels(CATEGORIES, paths)
    empty = np.zeros((0, 4), np.float32)
    nothing = ImageResult("a", SIZE, CATEGORIES, boxes=empty, class_ids=np.zeros(0, int))
    for path in paths:
        labels.add(path, nothing)
    assert [image["file_name"] for image in labels.images] == ["x/b.png", "a.jpg"]
