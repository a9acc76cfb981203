"""Inference on a GPU against the CPU: predictions, results, pictures, a dataset.

Shape key: B images, Q queries.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode

from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.structures import Predictions
from tests.gpu.cases import (
    TASKS,
    assert_same_results,
    copy_to,
    error_of,
    make_batch,
    make_cfg,
    make_model,
    summary,
)
from tests.gpu.drawn import drawn_dataset  # noqa: F401 (a fixture)
from tests.inference.test_predictor import assert_equal, picture

pytestmark = pytest.mark.gpu

FLOAT32_BOUND = 1e-4  # of predictions, in parts of the largest
HALF_BOUNDS = {torch.bfloat16: 0.1, torch.float16: 0.02}  # of what all queries say together


def both(cfg: CfgNode, device: torch.device) -> tuple[MaskDINO, MaskDINO]:
    """One model on the device and on the CPU, for inference."""
    model = make_model(cfg).eval()
    return copy_to(model, device), model


def predict(
    model: MaskDINO, batch: list[dict], dtype: torch.dtype | None = None
) -> tuple[Predictions, torch.Tensor | None]:
    """What the network says, computed in float32 or under autocast."""
    with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        return model.predict(model.preprocess(batch).tensor)


@pytest.mark.parametrize("task", TASKS)
def test_predictions_and_results_equal_the_cpu(task: str, device: torch.device) -> None:
    cfg = make_cfg(task, TEST__PRECISION="float32")
    ours, theirs = both(cfg, device)
    batch = make_batch(task)
    (found, pixels), (expected, expected_pixels) = (predict(m, batch) for m in (ours, theirs))
    assert found.boxes.device.type == device.type
    assert error_of(found.class_logits, expected.class_logits) < FLOAT32_BOUND
    assert error_of(found.boxes, expected.boxes) < FLOAT32_BOUND
    if expected_pixels is not None:
        assert error_of(found.mask_embeddings, expected.mask_embeddings) < FLOAT32_BOUND
        assert error_of(pixels, expected_pixels) < FLOAT32_BOUND
    assert_same_results(ours(batch), theirs(batch))


@pytest.mark.parametrize("dtype", HALF_BOUNDS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_is_close_to_float32(
    task: str, dtype: torch.dtype, device: torch.device
) -> None:
    """All tokens become queries, so that both precisions select the same, in whatever order."""
    cfg = make_cfg(task, QUERY_SELECTION__NUM_QUERIES=200)
    ours, theirs = both(cfg, device)
    batch = make_batch(task)
    found, expected = summary(*predict(ours, batch, dtype)), summary(*predict(theirs, batch))
    assert 0 < error_of(found, expected) < HALF_BOUNDS[dtype]


@pytest.mark.parametrize("precision", ["auto", "tf32", "bfloat16", "float16"])
def test_every_precision_gives_results(precision: str, device: torch.device) -> None:
    if device.type != "cuda" and precision != "bfloat16":
        pytest.skip("float32, or not known there")
    reference = make_model(make_cfg("semantic")).eval()
    cfg = make_cfg("semantic", TEST__PRECISION=precision)
    cfg.MODEL.DEVICE = str(device)  # asked what it can compute in
    model = make_model(cfg).eval().to(device)
    batch = make_batch("semantic")
    for ours, theirs in zip(model(batch), reference(batch), strict=True):
        assert ours["sem_seg"].dtype == torch.float32
        assert 0 < error_of(ours["sem_seg"], theirs["sem_seg"]) < HALF_BOUNDS[torch.bfloat16]


def test_nothing_found_is_no_error(device: torch.device) -> None:
    ours, theirs = both(make_cfg("panoptic", TEST__PRECISION="float32"), device)
    for model in (ours, theirs):
        torch.nn.init.constant_(model.heads.class_head.bias, -100.0)
    for result in ours(make_batch("panoptic")):
        ids, segments = result["panoptic_seg"]
        assert not ids.any()
        assert not segments
        assert float(result["instances"].scores.amax()) < 1e-6


@pytest.mark.parametrize("task", ["panoptic", "boxes"])
def test_predictor_equals_the_cpu(task: str, device: torch.device) -> None:
    cfg = make_cfg(task, TEST__PRECISION="float32")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    predictors = [
        MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.3, batch_size=2)
        for model in both(cfg, device)
    ]
    pictures = [picture(64, 80), picture(50, 40, seed=1), picture(64, 80, seed=2)]
    for ours, theirs in zip(*(predictor(pictures) for predictor in predictors), strict=True):
        assert len(theirs) > 0
        if task == "panoptic":
            assert_equal(ours, theirs)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)


def test_predictor_in_its_own_precision(device: torch.device) -> None:
    """Which pixel is of which class hardly depends on it."""
    cfg = make_cfg("semantic")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    ours, theirs = (
        MaskDINOPredictor.from_model(model, cfg)(picture(64, 80)).label_map
        for model in both(cfg, device)
    )
    assert ours.dtype == theirs.dtype
    assert (ours == theirs).mean() > 0.9


def test_evaluation_equals_the_cpu(
    device: torch.device,
    tmp_path: Path,
    drawn_dataset: str,  # noqa: F811
) -> None:
    records, results = [], []
    cfg = make_cfg("instance", TEST__PRECISION="float32", NUM_CLASSES=2)
    cfg.DATASETS.TEST = (drawn_dataset,)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.DATALOADER.NUM_WORKERS = 0
    for name, model in zip(("device", "host"), both(cfg, device), strict=True):
        cfg.OUTPUT_DIR = str(tmp_path / name)
        results.append(MaskDINOTrainer.test(cfg, model))
        (path,) = (tmp_path / name).rglob("coco_instances_results.json")
        records.append(json.loads(path.read_text()))
    found, expected = results
    assert {"bbox", "segm"} <= expected.keys()
    for kind in ("bbox", "segm"):
        assert found[kind] == pytest.approx(expected[kind], abs=0.5, nan_ok=True)
    assert len(records[0]) == len(records[1]) > 0
    scores = [np.sort([record["score"] for record in of_device]) for of_device in records]
    np.testing.assert_allclose(*scores, atol=1e-3)
    boxes = [np.sort([record["bbox"] for record in of_device], axis=0) for of_device in records]
    np.testing.assert_allclose(*boxes, atol=0.05)
