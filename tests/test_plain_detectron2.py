"""Mask DINO in detectron2's own trainer: the script that the README shows."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.data import register_coco_folder
from tests.custom.drawn import write_drawn
from tests.helpers import NARROW

SETTINGS = {
    "DATASETS.TRAIN": ("drawn_plain",),
    "DATASETS.TEST": ("drawn_plain",),
    "MODEL.MASK_DINO.NUM_CLASSES": 2,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "SOLVER.AMP.ENABLED": False,
}


def test_script_trains_and_evaluates(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = write_drawn(tmp_path / "drawn", 3)
    drawn.content["info"] = {}  # which detectron2's evaluator wants
    drawn.write()
    register_coco_folder("drawn_plain", drawn.json_file, drawn.images)
    values = {**NARROW, **SETTINGS, "OUTPUT_DIR": tmp_path / "out"}
    words = [str(word) for item in values.items() for word in item]
    config = repository / "configs" / "coco" / "instance" / "maskdino_R50.yaml"
    script = repository / "tools" / "train_plain_detectron2.py"
    monkeypatch.setattr(sys, "argv", [script.name, str(config), *words])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        DatasetCatalog.remove("drawn_plain")
        MetadataCatalog.remove("drawn_plain")
    assert (tmp_path / "out" / "model_final.pth").is_file()
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"total_loss", "loss_mask_dice", "bbox/AP", "segm/AP"} <= logged
