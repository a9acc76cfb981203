"""Tests of maskdino.custom.training and maskdino.custom.history, with a stand-in for the model."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from maskdino.custom.history import Evaluation, History
from maskdino.custom.training import CustomTrainer
from maskdino.engine.launch import launch
from maskdino.engine.trainer import MaskDINOTrainer
from tests.custom.runs import config, evaluate_as, run, run_in_process
from tests.engine.stand_in import read_checkpoint

SCORES = [0.0, 0.0, 3.0, 7.0, 5.0, 7.0, 6.0, 6.0]  # after each step
CONSTANT_RATE = ("SOLVER.STEPS", "()")


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Mask AP by iteration, in place of evaluations; change it to change them."""
    values = list(SCORES)

    monkeypatch.setattr(MaskDINOTrainer, "evaluate", MaskDINOTrainer.evaluate)  # to be restored
    evaluate_as(values)
    return values


def test_best_weights_and_last_checkpoint_are_kept(scores: list[float], tmp_path: Path) -> None:
    trainer = run(config(tmp_path, *CONSTANT_RATE))
    assert [entry.score for entry in trainer.history.evaluations] == scores
    assert trainer.history.best.iteration == 3
    best = read_checkpoint(tmp_path / "best", "model_best.pth")
    assert best["iteration"] == 3
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # The same run, ended there, has the same weights.
    short = config(tmp_path / "short", "SOLVER.MAX_ITER", 4, *CONSTANT_RATE)
    run(short)
    final = read_checkpoint(tmp_path / "short")["model"]
    assert all(torch.equal(best["model"][name], value) for name, value in final.items())


def test_best_weights_are_the_averaged_ones(scores: list[float], tmp_path: Path) -> None:
    scores[-1] = 50.0
    run(config(tmp_path, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5))
    best = read_checkpoint(tmp_path / "best", "model_best.pth")["model"]
    whole = read_checkpoint(tmp_path)
    assert all(torch.equal(best[name], value) for name, value in whole["ema"].items())
    assert not torch.equal(best["head.weight"], whole["model"]["head.weight"])


@pytest.mark.usefixtures("scores")
def test_early_stop_and_resuming_a_stopped_run(tmp_path: Path) -> None:
    trainer = run(config(tmp_path), early_stop=2)
    # Scores of 0 at the beginning do not count; the best is the fourth, two more are no better.
    assert len(trainer.history.evaluations) == 6
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    again = run(config(tmp_path), early_stop=2, resume=True)
    assert (again.start_iter, len(again.history.evaluations)) == (6, 6)
    longer = run(config(tmp_path), early_stop=5, resume=True)
    assert len(longer.history.evaluations) == 8
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path: Path) -> None:
    launch(run_in_process, config(tmp_path), SCORES, 2, processes=2)
    history = History.read(tmp_path / "best" / "history.json")
    assert [entry.score for entry in history.evaluations] == SCORES[:6]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert read_checkpoint(tmp_path / "best", "model_best.pth")["iteration"] == 3


def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    scores: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config(tmp_path / "whole"))
    trainer = CustomTrainer(config(tmp_path / "cut"))
    trainer.resume_or_load(False)
    normal = MaskDINOTrainer.evaluate

    def fail(running: MaskDINOTrainer) -> OrderedDict:
        if running.iter == 4:
            raise KeyboardInterrupt
        return normal(running)

    with monkeypatch.context() as patch:
        patch.setattr(MaskDINOTrainer, "evaluate", fail)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    # The checkpoint is there, its evaluation is not: it is made up for.
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000004.pth"
    assert [entry.iteration for entry in trainer.history.evaluations] == [0, 1, 2, 3]
    resumed = run(config(tmp_path / "cut"), resume=True)
    assert resumed.start_iter == 5
    assert resumed.history.evaluations == whole.history.evaluations
    assert len(scores) == 8
    for folder, name in ((".", "model_final.pth"), ("best", "model_best.pth")):
        ours, theirs = (
            read_checkpoint(tmp_path / x / folder, name)["model"] for x in ("cut", "whole")
        )
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_history_forgets_what_is_done_again(tmp_path: Path) -> None:
    history = History(tmp_path / "history.json")
    for iteration, score in enumerate((1.0, 5.0, 2.0)):
        history.add(Evaluation(iteration, {"bbox": {"AP": score}}))
    history.write()
    read = History.read(tmp_path / "history.json")
    assert read.evaluations == history.evaluations
    read.forget_from(1)
    assert read.best.score == 1.0
    assert read.add(Evaluation(1, {"bbox": {"AP": 5.0}}))


def test_scores_of_masks_boxes_and_nothing() -> None:
    assert Evaluation(0, {"segm": {"AP": 2.0}, "bbox": {"AP": 9.0}}).score == 2.0
    assert Evaluation(0, {"bbox": {"AP": 9.0}}).score == 9.0
    assert Evaluation(0, {"bbox": {"AP": float("nan")}}).score == -1.0
    assert Evaluation(0, {}).score == -1.0
