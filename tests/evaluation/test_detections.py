"""Dense images: AP and AR count as many detections as the model is asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from maskdino.config import load_config
from maskdino.data import register_coco_folder
from maskdino.evaluation.build import build_evaluator, known_metrics
from maskdino.evaluation.coco import average_precision

NUMBER, SIDE = 200, 160
BOXES = [[x * 10, y * 10, 8, 8] for y in range(16) for x in range(16)][:NUMBER]
CONTENT = {
    "info": {},
    "images": [{"id": 1, "file_name": "a.png", "height": SIDE, "width": SIDE}],
    "categories": [{"id": 1, "name": "cell"}],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
        for i, box in enumerate(BOXES, start=1)
    ],
}
RECORDS = [
    {"image_id": 1, "category_id": 1, "score": 1 - i / 1000, "bbox": box}
    for i, box in enumerate(BOXES)
]


@pytest.fixture
def dense(tmp_path: Path) -> str:
    """A dataset of one image with 200 objects."""
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(CONTENT))
    register_coco_folder("dense", path, tmp_path)
    DatasetCatalog.get("dense")
    return "dense"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("detections", "recall"), [(50, 25), (100, 50), (200, 100), (300, 100)])
def test_as_many_detections_count_as_asked_for(fast: bool, detections: int, recall: int) -> None:
    stats, _, _ = average_precision(CONTENT, RECORDS, "bbox", fast=fast, detections=detections)
    assert stats[-1] == pytest.approx(recall)
    assert stats[0] == pytest.approx(100 * (recall + 1) / 101 if recall < 100 else 100)


def test_the_evaluator_follows_the_configuration(
    dense: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((SIDE, SIDE), pred_boxes=Boxes(boxes), scores=torch.linspace(1, 0.5, NUMBER))
    found.pred_classes = torch.zeros(NUMBER, dtype=torch.long)
    for number, expected in ((200, 100.0), (100, 100 * 51 / 101)):
        caplog.clear()
        options = ["TEST.DETECTIONS_PER_IMAGE", number, "MODEL.MASK_DINO.MASK_ON", False]
        cfg = load_config(None, [*options, "OUTPUT_DIR", str(tmp_path)])
        evaluator = build_evaluator(cfg, dense)
        evaluator.reset()
        with caplog.at_level(logging.WARNING):
            evaluator.process([{"image_id": 1}], [{"instances": found}])
            results = evaluator.evaluate()["bbox"]
        assert results["AP"] == pytest.approx(expected)
        assert ("count up to 200 detections" in caplog.text) == (number == 200)
        assert "bbox/AR" in known_metrics(cfg, dense)
        assert results["AR"] == pytest.approx(number / 2)
