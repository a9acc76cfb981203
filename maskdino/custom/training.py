"""Training that keeps the best checkpoint and, if wished, stops when nothing improves any more."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import OrderedDict
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.custom.history import Evaluation, History
from maskdino.engine.trainer import MaskDINOTrainer

logger = logging.getLogger(__name__)

BEST_FOLDER, BEST_NAME = "best", "model_best"


class StopTraining(BaseException):
    """Ends a training early. No `Exception`: nothing went wrong, and detectron2 logs those."""


class CustomTrainer(MaskDINOTrainer):
    """Trains on own data.

    ``<OUTPUT_DIR>/best`` gets the best checkpoint, by mask AP or, without masks, box AP, and all
    results. Of the checkpoints to resume from, only the newest is kept.

    Args:
        cfg: configuration; TEST.EVAL_PERIOD and SOLVER.CHECKPOINT_PERIOD should be equal.
        early_stop: evaluations without a better result after which training ends; 0: never.
    """

    def __init__(self, cfg: CfgNode, early_stop: int = 0) -> None:
        folder = Path(cfg.OUTPUT_DIR) / BEST_FOLDER
        self.early_stop = early_stop
        self.history = History.read(folder / "history.json")
        super().__init__(cfg)
        folder.mkdir(parents=True, exist_ok=True)
        self._best_checkpointer = MaskDINOCheckpointer(self._plain_model, str(folder))

    def build_hooks(self) -> list[HookBase]:
        """Those of every training, and one that ends it."""
        return [*super().build_hooks(), _AfterEvaluation(self.cfg.TEST.EVAL_PERIOD)]

    def resume_or_load(self, resume: bool = True) -> None:
        """See `MaskDINOTrainer.resume_or_load`; evaluations after the checkpoint are forgotten."""
        super().resume_or_load(resume)
        self.history.forget_from(self.start_iter)

    def train(self) -> OrderedDict | None:
        """Trains to the end, or until `early_stop` evaluations brought nothing better."""
        period, done = self.cfg.TEST.EVAL_PERIOD, self.start_iter
        cut_off = 0 < done < self.max_iter and done % period == 0 and not self.history.has(done - 1)
        if cut_off:  # the run was interrupted after the checkpoint, during the evaluation
            self.iter = done - 1
            self.evaluate()
        try:
            if self.must_stop():
                raise StopTraining
            return super().train()
        except StopTraining:
            logger.info(
                "Stopped: %d evaluations in a row were not better than the best.", self.early_stop
            )
            return None

    def evaluate(self) -> OrderedDict:
        """Evaluates, and saves the weights if they are the best so far."""
        results = super().evaluate()
        iteration = min(self.iter, self.max_iter - 1)
        if comm.is_main_process() and not self.history.has(iteration):
            evaluation = Evaluation(iteration, {task: dict(v) for task, v in results.items()})
            if self.history.add(evaluation):
                applied = (
                    contextlib.nullcontext() if self.average is None else self.average.applied()
                )
                with applied:
                    self._best_checkpointer.save(BEST_NAME, iteration=iteration)
            self.history.write()
            logger.info(
                "%s AP %.2f after iteration %d; the best is %.2f after iteration %d.",
                "Mask" if evaluation.task == "segm" else "Box",
                evaluation.score,
                iteration + 1,
                self.history.best.score,
                self.history.best.iteration + 1,
            )
        return results

    def must_stop(self) -> bool:
        """Whether to end now, the same in all processes (only the main one has results)."""
        stale = self.early_stop > 0 and self.history.since_best() >= self.early_stop
        return comm.all_gather(stale)[0]


class _AfterEvaluation(HookBase):
    """Ends a training that gets no better, and removes checkpoints that newer ones replace."""

    def __init__(self, period: int) -> None:
        self._period = period

    def after_step(self) -> None:
        """Acts after each evaluation but the last, which is made when training has ended."""
        finished = self.trainer.iter + 1
        if finished % self._period or finished == self.trainer.max_iter:
            return
        self._remove_old()
        if self.trainer.must_stop():
            raise StopTraining

    def after_train(self) -> None:
        """Removes what the last checkpoint replaces."""
        self._remove_old()

    def _remove_old(self) -> None:
        checkpointer = self.trainer.checkpointer
        if not comm.is_main_process() or not checkpointer.has_checkpoint():
            return
        newest = Path(checkpointer.get_checkpoint_file())
        for path in newest.parent.glob("model_*.pth"):
            if path != newest and re.fullmatch(r"model_\d{7}\.pth", path.name):
                path.unlink()
