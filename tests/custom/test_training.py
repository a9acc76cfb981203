"""Tests of maskdino.custom.training, with a stand-in for the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskdino.custom import CustomTrainer
from maskdino.custom.run import judge_by_task
from maskdino.custom.training import Plan, TellTime
from maskdino.engine.trainer import MaskDINOTrainer
from tests.engine.stand_in import tiny_config


def test_newest_and_best_checkpoints_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def evaluate(trainer: MaskDINOTrainer) -> dict[str, dict[str, float]]:
        kept.append(sorted(path.name for path in tmp_path.glob("*.pth")))
        return {"segm": {"AP": 9.0 - trainer.iter}}

    monkeypatch.setattr(MaskDINOTrainer, "evaluate", evaluate)
    values = ("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 3)
    cfg = tiny_config(tmp_path, *values, "DATASETS.TEST", "('nuclei_val',)", "SOLVER.STEPS", "()")
    judge_by_task(cfg)
    trainer = CustomTrainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    # The one before is there until the evaluation has ended well.
    first, second = "model_0000000.pth", "model_0000001.pth"
    assert kept == [[first], [first, second], [second, "model_final.pth"]]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert (tmp_path / "best" / "model_best.pth").exists()


def test_what_decides_which_is_best(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    judge_by_task(cfg)
    assert cfg.SOLVER.BEST.METRIC == "segm/AP"
    cfg.SOLVER.BEST.METRIC, cfg.MODEL.MASK_DINO.MASK_ON = "", False
    judge_by_task(cfg)
    assert cfg.SOLVER.BEST.METRIC == "bbox/AP"
    cfg.SOLVER.BEST.METRIC = "bbox/AP50"
    judge_by_task(cfg)
    assert cfg.SOLVER.BEST.METRIC == "bbox/AP50"


def test_the_first_of_the_hooks_tells_the_time(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "TEST.EVAL_PERIOD", 7)
    assert not any(isinstance(hook, TellTime) for hook in CustomTrainer(cfg).build_hooks())
    Plan(3, 0.1, 0.0).write(tmp_path)
    assert isinstance(CustomTrainer(cfg).build_hooks()[0], TellTime)
