"""The best checkpoint, early stopping and their resumption, with a stand-in for the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from maskdino.data import DataError
from maskdino.engine.before_training import check_settings, warn_of_schedule
from maskdino.engine.best_checkpoint import BestCheckpoint, Evaluation, History
from maskdino.engine.launch import launch
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system.errors import UserError
from tests.engine.stand_in import read_checkpoint, tiny_config, train

SCORES = [0.0, 0.0, 3.0, 7.0, 5.0, 7.0, 6.0, 6.0]  # after each step
CONSTANT_RATE = ("SOLVER.STEPS", "()")


def config(folder: Path, *more: object, patience: int = 0) -> CfgNode:
    """Eight iterations, each with a checkpoint and an evaluation."""
    values = ("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1)
    best = ("SOLVER.BEST.METRIC", "segm/AP", "SOLVER.BEST.PATIENCE", patience)
    return tiny_config(folder, *values, *best, "DATASETS.TEST", "('nuclei_val',)", *more)


def evaluate_as(scores: Sequence[float]) -> None:
    """Gives evaluations the mask AP of their iteration, on the main process as in reality."""

    def evaluate(trainer: MaskDINOTrainer) -> dict[str, Any]:
        if not comm.is_main_process():
            return {}
        score = scores[min(trainer.iter, trainer.max_iter - 1)]
        return {"segm": {"AP": score, "AP-nucleus": score}, "bbox": {"AP": 99.0 - score}}

    MaskDINOTrainer.evaluate = evaluate  # type: ignore[method-assign]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Mask AP by iteration, in place of evaluations; change it to change them."""
    values = list(SCORES)
    monkeypatch.setattr(MaskDINOTrainer, "evaluate", MaskDINOTrainer.evaluate)  # to be restored
    evaluate_as(values)
    return values


def history_of(trainer: MaskDINOTrainer) -> History:
    (hook,) = (hook for hook in trainer._hooks if isinstance(hook, BestCheckpoint))
    return hook.history


def iterations(folder: Path) -> list[int]:
    """Of the evaluations that were written."""
    entries = json.loads((folder / "best" / "history.json").read_text())
    return [entry["iteration"] for entry in entries]


def train_in_process(cfg: CfgNode, scores: list[float]) -> None:
    """Trains in one of several processes."""
    evaluate_as(scores)
    train(cfg)


def test_best_weights_are_kept(scores: list[float], tmp_path: Path) -> None:
    trainer = train(config(tmp_path, *CONSTANT_RATE))
    history = history_of(trainer)
    assert [entry.value("segm/AP") for entry in history.evaluations] == scores
    assert history.best.iteration == 3
    best = read_checkpoint(tmp_path / "best", "model_best.pth")
    assert best["iteration"] == 3
    # The same run, ended there, has the same weights.
    train(config(tmp_path / "short", "SOLVER.MAX_ITER", 4, *CONSTANT_RATE))
    final = read_checkpoint(tmp_path / "short")["model"]
    assert all(torch.equal(best["model"][name], value) for name, value in final.items())


def test_best_weights_are_the_averaged_ones(scores: list[float], tmp_path: Path) -> None:
    scores[-1] = 50.0
    train(config(tmp_path, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5))
    best = read_checkpoint(tmp_path / "best", "model_best.pth")["model"]
    whole = read_checkpoint(tmp_path)
    assert all(torch.equal(best[name], value) for name, value in whole["ema"].items())
    assert not torch.equal(best["head.weight"], whole["model"]["head.weight"])


@pytest.mark.usefixtures("scores")
def test_lower_may_be_better(tmp_path: Path) -> None:
    more = ("SOLVER.BEST.METRIC", "bbox/AP", "SOLVER.BEST.LOWER_IS_BETTER", True)
    trainer = train(config(tmp_path, *more, patience=3))
    assert history_of(trainer).best.iteration == 3  # 92; others are higher
    assert iterations(tmp_path) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("scores")
def test_early_stop_and_resuming_a_stopped_run(tmp_path: Path) -> None:
    train(config(tmp_path, patience=2))
    # Scores of 0 at the beginning do not count; the best is the fourth, two more are no better.
    assert iterations(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    again = train(config(tmp_path, patience=2), resume=True)
    assert again.start_iter == 6
    assert iterations(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    train(config(tmp_path, patience=5), resume=True)
    assert iterations(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert not (tmp_path / "model_0000007.pth").exists()


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
def test_two_processes_stop_together(tmp_path: Path) -> None:
    launch(train_in_process, config(tmp_path, patience=2), SCORES, processes=2)
    assert iterations(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert read_checkpoint(tmp_path / "best", "model_best.pth")["iteration"] == 3


@pytest.mark.usefixtures("scores")
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path / "whole"))
    normal = MaskDINOTrainer.evaluate

    def fail(running: MaskDINOTrainer) -> dict[str, Any]:
        if running.iter == 4:
            raise KeyboardInterrupt
        return normal(running)

    with monkeypatch.context() as patch:
        patch.setattr(MaskDINOTrainer, "evaluate", fail)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "cut"))
    # The checkpoint is there, its evaluation is not: it is made up for.
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000004.pth"
    assert iterations(tmp_path / "cut") == [0, 1, 2, 3]
    resumed = train(config(tmp_path / "cut"), resume=True)
    assert resumed.start_iter == 5
    texts = [(tmp_path / x / "best" / "history.json").read_text() for x in ("cut", "whole")]
    assert texts[0] == texts[1]
    for folder, name in ((".", "model_final.pth"), ("best", "model_best.pth")):
        ours, theirs = (
            read_checkpoint(tmp_path / x / folder, name)["model"] for x in ("cut", "whole")
        )
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_unknown_metric_ends_before_training_where_it_is_known(tmp_path: Path) -> None:
    for metric in ("segm/AP5O", "sem_seg/mIoU", "AP", "PQ-cat"):
        with pytest.raises(ValueError, match=f"is '{metric}', which .*there is bbox/AP, .*segm/AP"):
            MaskDINOTrainer(config(tmp_path, "SOLVER.BEST.METRIC", metric))
    check_settings(config(tmp_path, "SOLVER.BEST.METRIC", "segm/AP-nucleus"))
    check_settings(config(tmp_path, "SOLVER.BEST.METRIC", "bbox/AP50"))
    boxes = ("MODEL.MASK_DINO.MASK_ON", False)
    with pytest.raises(ValueError, match="is 'segm/AP'.* there is bbox/AP, "):
        check_settings(config(tmp_path, *boxes))
    both = ("DATASETS.TEST", "('nuclei_val', 'nuclei_train')")
    with pytest.raises(ValueError, match="there is nuclei_val/bbox/AP, .* nuclei_train/segm/AP"):
        check_settings(config(tmp_path, *both))
    check_settings(config(tmp_path, *both, "SOLVER.BEST.METRIC", "nuclei_train/segm/AP75"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("SOLVER.BEST.METRIC", ""), "PATIENCE needs SOLVER.BEST.METRIC"),
        (("DATASETS.TEST", "()"), "needs evaluations: set DATASETS.TEST"),
        (("TEST.EVAL_PERIOD", 0), "needs evaluations: .* TEST.EVAL_PERIOD"),
    ],
)
def test_settings_that_cannot_be_followed(
    tmp_path: Path, values: tuple[object, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(config(tmp_path, *values, patience=3))


@pytest.mark.usefixtures("scores")
def test_unknown_metric_ends_the_training_at_the_first_evaluation(tmp_path: Path) -> None:
    trainer = MaskDINOTrainer(config(tmp_path, "SOLVER.BEST.METRIC", "bbox/AP50"))
    trainer.resume_or_load(False)
    with pytest.raises(DataError, match="'bbox/AP50', .* segm/AP, bbox/AP, and those of single"):
        trainer.train()
    assert trainer.iter == 0
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"


def test_class_without_objects_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([float("nan"), 3.0, float("nan"), 1.0])
    monkeypatch.setattr(
        MaskDINOTrainer, "evaluate", lambda _: {"segm": {"AP": 5.0, "AP-nucleus": next(values)}}
    )
    more = ("SOLVER.BEST.METRIC", "segm/AP-nucleus", "SOLVER.MAX_ITER", 4, *CONSTANT_RATE)
    trainer = train(config(tmp_path, *more))
    assert history_of(trainer).best.iteration == 1
    assert read_checkpoint(tmp_path / "best", "model_best.pth")["iteration"] == 1


def test_history_forgets_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    history = History(path, "bbox/AP")
    for iteration, score in enumerate((1.0, 5.0, 2.0)):
        history.add(Evaluation(iteration, {"bbox": {"AP": score}}))
    history.write()
    read = History.read(path, "bbox/AP")
    assert read.evaluations == history.evaluations
    assert read.since_best() == 1
    read.forget_from(1)
    assert read.best.value("bbox/AP") == 1.0
    assert read.add(Evaluation(1, {"bbox": {"AP": 5.0}}))


def test_values_of_an_evaluation() -> None:
    entry = Evaluation(0, {"val": {"segm": {"AP": 2.0, "AP-cat": float("nan")}}})
    assert entry.value("val/segm/AP") == 2.0
    assert entry.value("val/segm/AP-cat") is None
    assert entry.value("segm/AP") is None


@pytest.fixture
def unnamed() -> str:
    """A dataset whose evaluator type is not known."""
    DatasetCatalog.register("unnamed", lambda: [])
    return "unnamed"


def test_names_are_checked_before_anything_is_built(tmp_path: Path, unnamed: str) -> None:
    for key, message in (
        ("INPUT.DATASET_MAPPER_NAME", "names 'lost', .* instance, panoptic, semantic.*--import"),
        ("INPUT.AUGMENTATIONS", "names 'lost'.*--import"),
        ("TEST.EVALUATORS", "names 'lost'.*--import"),
        ("LOG.WRITERS", "names 'lost'.* mlflow, tensorboard, wandb.*--import"),
    ):
        value = "lost" if key.endswith("NAME") else "['lost']"
        with pytest.raises(ValueError, match=f"{key} {message}"):
            MaskDINOTrainer(config(tmp_path, key, value))
    with pytest.raises(ValueError, match="evaluator type None.*TEST.EVALUATORS"):
        MaskDINOTrainer(config(tmp_path, "DATASETS.TEST", f"('{unnamed}',)"))


def test_schedule_beyond_the_end_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forgotten = ("SOLVER.STEPS", "(4, 30000, 40000)", "SOLVER.WARMUP_ITERS", 8)
    warn_of_schedule(config(tmp_path, *forgotten))
    steps, warmup = (record.getMessage() for record in caplog.records)
    assert "SOLVER.STEPS [30000, 40000] lie beyond SOLVER.MAX_ITER 8" in steps
    assert "falls at [4] alone" in steps
    assert "SOLVER.WARMUP_ITERS 8" in warmup
    caplog.clear()
    warn_of_schedule(config(tmp_path, *forgotten[:2], "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"))
    warn_of_schedule(config(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize("text", ["", '[{"iteration": 3,', "[3]", '[{"step": 3}]', "{}x"])
def test_files_that_hold_no_evaluations_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} holds no evaluations .*begins anew$"):
        History.read(path, "segm/AP")
