"""Tests of maskdino.custom.split."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskdino.custom.annotations import Annotations
from maskdino.custom.split import split
from maskdino.data import DataError


def made(number: int, classes: int = 1) -> Annotations:
    """`number` images with one object each; classes take turns."""
    names = [f"image_{i}.png" for i in range(number)]
    images = [{"id": i, "file_name": name, "height": 9, "width": 9} for i, name in enumerate(names)]
    objects = [
        {"id": i, "image_id": i, "category_id": i % classes, "bbox": [1, 1, 4, 4]}
        for i in range(number)
    ]
    categories = [{"id": i, "name": str(i)} for i in range(classes)]
    return Annotations(Path("a.json"), Path(), images, objects, categories)


def names(data: Annotations) -> set[str]:
    return {image["file_name"] for image in data.images}


@pytest.mark.parametrize(("number", "expected"), [(2, 1), (5, 1), (15, 3), (99, 20), (200, 20)])
def test_share_and_disjoint_parts(number: int, expected: int) -> None:
    train, validation = split(made(number))
    assert len(validation.images) == len(validation.annotations) == expected
    assert len(train.images) == len(train.annotations) == number - expected
    assert not names(train) & names(validation)


def test_choice_depends_on_file_names_alone() -> None:
    data = made(40)
    chosen = names(split(data)[1])
    data.images.reverse()
    for image in data.images:
        image["id"] += 7
    for annotation in data.annotations:
        annotation["image_id"] += 7
    assert names(split(data)[1]) == chosen
    # Of a dataset that has grown, most of the same images are set aside.
    assert len(names(split(made(44))[1]) & chosen) >= len(chosen) - 2


def test_no_class_loses_its_last_image() -> None:
    data = made(12, classes=10)  # 8 of the classes have a single image
    train, validation = split(data)
    assert {a["category_id"] for a in train.annotations} == set(range(10))
    assert 1 <= len(validation.images) <= 2


def test_validation_has_objects_and_whole_masks() -> None:
    data = made(20)
    del data.annotations[:5]
    for annotation in data.annotations[:10]:
        annotation["segmentation"] = [[1, 1, 4, 1, 4, 4]]
    _, validation = split(data)
    assert validation.images
    assert all(5 <= image["id"] < 15 for image in validation.images)


def test_nothing_to_set_aside() -> None:
    with pytest.raises(DataError, match="--val-json"):
        split(made(1))
    with pytest.raises(DataError, match="only one of a class"):
        split(made(3, classes=3))
