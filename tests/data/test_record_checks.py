"""Datasets that a function of the user gives, in place of a file in COCO's format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from maskdino.data import DataError, check_datasets
from maskdino.evaluation.coco import COCOInstanceEvaluator

POLYGON = [1.0, 1.0, 9.0, 1.0, 9.0, 9.0]
OBJECT = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
RECORD = {
    "file_name": "a.png",
    "image_id": "a",
    "height": 20,
    "width": 20,
    "annotations": [{**OBJECT, "segmentation": [POLYGON]}],
}


@pytest.fixture
def checked(make_cfg: Callable, request: pytest.FixtureRequest) -> Callable[[Any], str]:
    """Registers and checks what a function gives, to train and to evaluate on."""

    def check(records: Any) -> str:
        name = f"test/{request.node.name}"
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=["cell"], evaluator_type="coco")
        words = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,)]
        check_datasets(make_cfg(*words, "MODEL.MASK_DINO.NUM_CLASSES", 1))
        return name

    return check


def test_records_are_judged_without_a_file(checked: Callable, tmp_path: Path) -> None:
    bare = {**RECORD, "image_id": "b", "annotations": [{**OBJECT, "bbox": np.array([1, 1, 9, 9])}]}
    empty = {**RECORD, "image_id": "c", "annotations": []}
    name = checked([RECORD, bare, empty])
    evaluator = COCOInstanceEvaluator(name, str(tmp_path), with_masks=True, fast=False)
    assert len(evaluator._ground_truth["annotations"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": None}, "image 0, a.png, lacks image_id$"),
        ({"height": None, "width": None}, "image 0, a.png, lacks height, width$"),
        ({"bbox": None}, "image a.png: bbox is None; it must be four numbers"),
        ({"bbox": [1, 1, 9, float("nan")]}, r"bbox is \[1, 1, 9, nan\]; it must be four numbers"),
        ({"bbox": [5, 5, 4, 4, 30.0]}, r"bbox is \[5, 5, 4, 4, 30.0\]; it must be four"),
        ({"bbox_mode": None}, "bbox_mode is None; it must be BoxMode.XYXY_ABS or"),
        ({"bbox_mode": BoxMode.XYXY_REL}, "bbox_mode is .*; it must be BoxMode.XYXY_ABS"),
        ({"segmentation": [np.array(POLYGON)]}, "segmentation is an array, or holds some"),
        ({"segmentation": np.ones((20, 20), bool)}, "segmentation is an array, or holds some"),
    ],
)
def test_what_no_file_could_hold_is_said_before_the_training(
    checked: Callable, change: dict, message: str
) -> None:
    record = copy.deepcopy(RECORD)
    changed = record if change.keys() & record.keys() else record["annotations"][0]
    for key, value in change.items():
        if value is None:
            del changed[key]
        else:
            changed[key] = value
    with pytest.raises(DataError, match=f"^dataset 'test/.*{message}"):
        checked([record])


def test_images_are_told_apart(checked: Callable) -> None:
    with pytest.raises(DataError, match="image_id 'a' stands twice"):
        checked([RECORD, RECORD])


def test_a_function_gives_a_list(checked: Callable) -> None:
    with pytest.raises(DataError, match="gives NoneType: no list of records"):
        checked(None)


def test_annotations_without_a_folder_of_images(make_cfg: Callable, repository: Path) -> None:
    """As detectron2's evaluator, which needs the file alone."""
    name = "test/file_alone"
    DatasetCatalog.register(name, lambda: [])
    file = repository / "datasets" / "nuclei" / "annotations" / "instances_val.json"
    MetadataCatalog.get(name).set(json_file=str(file), evaluator_type="coco")
    check_datasets(make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 1))
