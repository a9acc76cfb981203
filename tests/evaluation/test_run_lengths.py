"""Evaluation holds masks of objects as run lengths where all evaluators read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.evaluation.build import masks_as_read
from maskdino.evaluation.coco import COCOInstanceEvaluator, instances_to_records
from maskdino.model import MaskDINO
from tests.helpers import drawn_batch, tiny_cfg, tiny_model
from tests.memory import NewTensors


class OfOthers(DatasetEvaluator):
    """Knows detectron2's fields alone."""

    def process(self, _: list[dict], outputs: list[dict]) -> None:
        """Takes the masks in."""
        self.masks = [output["instances"].pred_masks for output in outputs]


class Records(DatasetEvaluator):
    """Turns what a model says of images into records."""

    reads_run_lengths = True

    def reset(self) -> None:
        """Forgets them."""
        self.records, self.fields = [], []

    def process(self, _: list[dict], outputs: list[dict]) -> None:
        """Takes objects in."""
        for number, output in enumerate(outputs):
            self.records.append(instances_to_records(output["instances"], number))
            self.fields.append(output["instances"].get_fields().keys())

    def evaluate(self) -> dict:
        """Has no numbers."""
        return {}


@pytest.mark.parametrize("scoring", [False, True])
def test_records_are_those_of_masks_of_pixels(scoring: bool) -> None:
    model = tiny_model(TEST__MASK_SCORING=scoring, TEST__SCORE_THRESHOLD=0.004).eval()
    batch = drawn_batch([(40, 56)], [0])
    batch[0] |= {"height": 61, "width": 83}
    dense = model(batch)[0]["instances"]
    evaluator = Records()
    evaluator.reset()
    with masks_as_read(model, DatasetEvaluators([evaluator])):
        evaluator.process(batch, model(batch))
    assert len(dense) > 5 and dense.has("pred_masks")
    assert evaluator.records == [instances_to_records(dense, 0)]
    assert "pred_masks" not in evaluator.fields[0]
    assert model(batch)[0]["instances"].has("pred_masks")  # as before


def test_evaluators_of_others_get_masks_of_pixels() -> None:
    model, batch = tiny_model().eval(), drawn_batch([(40, 56)], [0])
    evaluator = OfOthers()
    for asked in (evaluator, DatasetEvaluators([evaluator, Records()])):
        with masks_as_read(model, asked):
            evaluator.process(batch, model(batch))
        assert evaluator.masks[0].dtype == torch.bool


def test_an_error_gives_the_options_back() -> None:
    model = tiny_model()
    before = model.inference
    with pytest.raises(RuntimeError, match="stop"), masks_as_read(model, Records()):
        raise RuntimeError("stop")
    assert model.inference is before
    with masks_as_read(torch.nn.Linear(1, 1), Records()):  # no Mask DINO: left alone
        pass


def test_the_trainer_evaluates_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of an image are never all there as pixels; and COCO's evaluator can do so."""
    size, number = (500, 700), 40
    cfg = tiny_cfg(QUERY_SELECTION__NUM_QUERIES=number)
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.OUTPUT_DIR = number, str(tmp_path)
    cfg.DATASETS.TEST = ("drawn",)
    batch = drawn_batch([(50, 70)], [0])
    batch[0] |= {"height": size[0], "width": size[1]}
    monkeypatch.setattr(MaskDINOTrainer, "build_test_loader", lambda _, __: [batch] * 6)
    monkeypatch.setattr("maskdino.postprocess.frame.ELEMENTS_AT_ONCE", size[0] * size[1])
    evaluator = Records()
    with NewTensors() as tensors:
        MaskDINOTrainer.test(cfg, MaskDINO(cfg), [evaluator])
    assert len(evaluator.records[0]) == number
    assert tensors.largest <= 4 * size[0] * size[1]
    assert COCOInstanceEvaluator.reads_run_lengths
