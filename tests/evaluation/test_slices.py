"""Evaluation in slices: a mosaic of images is judged as the single images are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from maskdino.config.checks import ConfigError, check_values
from maskdino.data import register_coco_folder
from maskdino.data.reading import DataError
from maskdino.engine.evaluating import evaluate_model
from maskdino.evaluation.slices import SlicedModel
from maskdino.inference.parts import Window
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sliced import check_slices
from maskdino.model import MaskDINO
from maskdino.ops.rle import encode_mask, to_json
from tests.evaluation.mosaic import clipped, write_mosaic
from tests.helpers import tiny_cfg
from tests.inference.test_sliced import Oracle


@pytest.fixture
def mosaic(tmp_path: Path) -> tuple[str, int]:
    """A dataset of one image, and its number of nuclei."""
    number = write_mosaic(tmp_path, colors=True, every=3)
    register_coco_folder("mosaic_of_nuclei", str(tmp_path / "mosaic.json"), str(tmp_path))
    return "mosaic_of_nuclei", number


def test_what_reaches_over_the_border_of_an_image_is_cut_off() -> None:
    """As in the image alone; most of the mask lies in the second one."""
    mask = np.zeros((40, 60), bool)
    mask[5:15, 20:45] = True
    record = {"bbox": [20, 5, 25, 10], "segmentation": to_json(encode_mask(mask))}
    found = clipped(record, [Window(0, 0, 30, 28), Window(0, 32, 12, 60)])
    mask[:, :32] = mask[12:] = False
    assert found == {"bbox": [32, 5, 13, 7], "segmentation": to_json(encode_mask(mask))}
    assert clipped(record, [Window(20, 0, 40, 60)]) == record


def configuration(dataset: str, folder: Path, size: int = 256) -> CfgNode:
    cfg = tiny_cfg(NUM_CLASSES=1)
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST, cfg.INPUT.FORMAT = str(folder), (dataset,), "RGB"
    cfg.TEST.SLICES.SIZE, cfg.DATALOADER.NUM_WORKERS = size, 0
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 32, 64
    return cfg


def test_an_oracle_that_sees_slices_finds_every_nucleus(
    mosaic: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More of them than one image may show: TEST.DETECTIONS_PER_IMAGE is of each slice."""
    name, number = mosaic
    assert number > 150
    cfg = configuration(name, tmp_path)
    oracle = Oracle()
    monkeypatch.setattr(MaskDINOPredictor, "stream", lambda _self, images: oracle(images))
    for cfg.TEST.COCO_EVALUATOR in ("auto", "pycocotools"):
        results = evaluate_model(cfg, MaskDINO(cfg))
        assert results["segm"]["AP"] == pytest.approx(100) == results["bbox"]["AP"]
        assert results["segm"]["AR"] == pytest.approx(100)
    said = "AP and AR count all detections of an image; published numbers on COCO count 100."
    assert caplog.messages.count(said) == 2
    assert {shape[:2] for shape in oracle.asked} == {(256, 256)}
    records = json.loads(
        (tmp_path / "inference" / name / "coco_instances_results.json").read_text()
    )
    assert len(records) == number


def test_without_slices_the_same_evaluation_sees_the_whole_image(
    mosaic: tuple[str, int], tmp_path: Path
) -> None:
    cfg = configuration(mosaic[0], tmp_path, size=0)
    model = MaskDINO(cfg)
    results = evaluate_model(cfg, model)
    assert set(results) == {"bbox", "segm"} and model.training


def test_results_of_all_tasks_in_the_form_of_the_model(tmp_path: Path) -> None:
    """Through the network; the model is as it was afterwards."""
    cfg = configuration("", tmp_path, size=64)
    cfg.MODEL.MASK_DINO.TEST.PANOPTIC_ON = cfg.MODEL.MASK_DINO.TEST.SEMANTIC_ON = True
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)).save(path)
    model = MaskDINO(cfg).train()
    sliced = SlicedModel(cfg, model)
    assert sliced.training
    record = {"file_name": str(path), "height": 100, "width": 150}
    with torch.no_grad():
        (output,) = sliced([record])
    assert output["instances"].pred_masks.shape[1:] == (100, 150)
    assert output["instances"].image_size == (100, 150)
    ids, segments = output["panoptic_seg"]
    assert ids.shape == (100, 150)
    assert set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
    assert (output["sem_seg"].argmax(0) == output["label_map"]).all()
    with pytest.raises(KeyError):
        output["proposals"]
    expected = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0).sliced(path, 64)
    np.testing.assert_array_equal(output["label_map"], expected.label_map)
    with pytest.raises(DataError, match=r"a\.png has .* \(100, 150\), but its annotations say"):
        sliced([{**record, "height": 90}])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SIZE", 20, "TEST.SLICES.SIZE is 20; it must be 0, or at least 48"),
        ("SIZE", -1, "TEST.SLICES.SIZE is -1"),
        ("OVERLAP", 1.0, "TEST.SLICES.OVERLAP is 1.0; it must be from 0 to 0.9"),
        ("OVERLAP", -0.5, "TEST.SLICES.OVERLAP is -0.5"),
        ("BATCH_SIZE", 0, "TEST.SLICES.BATCH_SIZE is 0; it must be at least 1"),
    ],
)
def test_keys_are_checked(key: str, value: float, message: str) -> None:
    cfg = tiny_cfg()
    cfg.TEST.SLICES[key] = value
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)


def test_keys_allow_what_slices_allow() -> None:
    cfg = tiny_cfg()
    cfg.TEST.SLICES.SIZE, cfg.TEST.SLICES.OVERLAP = 48, 0.9
    check_values(cfg)
    check_slices(48, 0.9)
    for size, overlap in ((47, 0.9), (48, 0.91)):
        with pytest.raises(ValueError, match="slices"):
            check_slices(size, overlap)
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(ConfigError, match=r"SIZE is 48; it must be 0 with TEST\.AUG\.ENABLED"):
        check_values(cfg)
