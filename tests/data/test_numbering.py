"""Instances of panoptic datasets in files whose categories are numbered otherwise."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from maskdino.data import DataError, check_datasets, register_panoptic_folder
from maskdino.data.datasets import ADE20K_THING_IDS, ade20k_classes
from maskdino.data.numbering import renumber_things
from maskdino.evaluation.coco import COCOInstanceEvaluator

THINGS = ADE20K_THING_IDS
NUMBERS = [3, 40, 99]  # among the things
NAMES = ade20k_classes()


def in_order(number: int) -> dict:
    return {"id": number, "name": NAMES[THINGS[number]]}


FILES: dict[str, Callable[[int], dict]] = {
    "ours": lambda number: {"id": THINGS[number], "name": NAMES[THINGS[number]]},
    "from 0": in_order,
    "from 1": lambda number: {"id": number + 1, "name": NAMES[THINGS[number]]},
    "from 0, other names": lambda number: {"id": number, "name": f"thing of some kind {number}"},
    "shuffled": lambda number: {"id": 99 - number, "name": NAMES[THINGS[number]]},
}


@pytest.fixture
def dataset(tmp_path: Path, name: str) -> str:
    """The name of a dataset with ADE20K's classes; its instances are still to be written."""
    categories = [{"id": i, "name": name, "isthing": i in THINGS} for i, name in enumerate(NAMES)]
    places = {key: tmp_path / key for key in ("images", "panoptic", "instances.json")}
    image = {"id": 7, "height": 32, "width": 64, "file_name": "7.png"}
    maps = [{"image_id": 7, "file_name": "7.png", "segments_info": []}]
    segments = {"images": [image], "annotations": maps, "categories": categories}
    (tmp_path / "panoptic.json").write_text(json.dumps(segments))
    register_panoptic_folder(
        name,
        tmp_path / "panoptic.json",
        places["images"],
        places["panoptic"],
        categories,
        instances_json=places["instances.json"],
    )
    for key in ("images", "panoptic"):
        places[key].mkdir()
    return name


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"numbering/{request.node.name}"


def content(category: Callable[[int], dict]) -> dict:
    """An instance file with one box for each of `NUMBERS`, all in one image."""
    annotations = [
        {"id": i, "image_id": 7, "category_id": category(number)["id"], "iscrowd": 0}
        | {"bbox": [10 * i, 0, 8, 8], "area": 64}
        for i, number in enumerate(NUMBERS, start=1)
    ]
    return {
        "images": [{"id": 7, "height": 32, "width": 64, "file_name": "7.png"}],
        "categories": [category(number) for number in range(100)],
        "annotations": annotations,
    }


@pytest.mark.parametrize("kind", FILES)
def test_ground_truth_as_prediction_scores_100(
    dataset: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(MetadataCatalog.get(dataset).json_file)
    path.write_text(json.dumps(content(FILES[kind])))
    with caplog.at_level(logging.WARNING, "maskdino"):
        evaluator = COCOInstanceEvaluator(dataset, None, with_masks=False, fast=False)
    assert any("converted" in text for text in caplog.messages) == (kind != "ours")
    found = Instances((32, 64))
    found.pred_classes = torch.tensor([THINGS[number] for number in NUMBERS])
    found.scores = torch.tensor([0.9, 0.8, 0.7])
    found.pred_boxes = Boxes(torch.tensor([[10.0 * i, 0, 10 * i + 8, 8] for i in (1, 2, 3)]))
    evaluator.process([{"image_id": 7}], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100.0)


def test_files_of_other_classes_are_refused_before_training(
    dataset: str, make_cfg: Callable
) -> None:
    path = Path(MetadataCatalog.get(dataset).json_file)
    wrong = content(lambda number: {"id": number, "name": NAMES[number]})  # the first 100 of 150
    path.write_text(json.dumps(wrong))
    metadata = MetadataCatalog.get(dataset)
    message = r"instances\.json: its 100 categories \(such as 0: 'wall'\) are not the 100 things"
    with pytest.raises(DataError, match=message):
        renumber_things(wrong, metadata)
    cfg = make_cfg("DATASETS.TEST", (dataset,), "MODEL.MASK_DINO.NUM_CLASSES", 150)
    with pytest.raises(DataError, match=message):
        check_datasets(cfg)
    few = content(lambda number: {"id": number, "name": f"kind {number}"})
    few["categories"].pop()
    with pytest.raises(DataError, match="its 99 categories"):
        renumber_things(few, metadata)
