"""Trainings of a stand-in for the model, with results that are made up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from maskdino.custom.training import CustomTrainer
from maskdino.engine.trainer import MaskDINOTrainer
from tests.engine.stand_in import tiny_config


def config(folder: Path, *more: object) -> CfgNode:
    """Eight iterations, each with a checkpoint and an evaluation."""
    values = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1)
    return tiny_config(folder, *values, "DATASETS.TEST", "('nuclei_val',)", *more)


def evaluate_as(scores: Sequence[float]) -> None:
    """Gives evaluations the mask AP of their iteration, on the main process as in reality."""

    def evaluate(trainer: MaskDINOTrainer) -> OrderedDict:
        if not comm.is_main_process():
            return OrderedDict()
        score = scores[min(trainer.iter, trainer.max_iter - 1)]
        return OrderedDict(segm={"AP": score}, bbox={"AP": 99.0})

    MaskDINOTrainer.evaluate = evaluate


def run(cfg: CfgNode, *, early_stop: int = 0, resume: bool = False) -> CustomTrainer:
    """Trains, and returns the trainer."""
    trainer = CustomTrainer(cfg, early_stop)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def run_in_process(cfg: CfgNode, scores: list[float], early_stop: int) -> None:
    """Trains in one of several processes."""
    evaluate_as(scores)
    run(cfg, early_stop=early_stop)
