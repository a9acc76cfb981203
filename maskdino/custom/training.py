"""Training that keeps, of the checkpoints to resume from, only the newest, and tells how long."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import mean

from detectron2.engine import HookBase
from detectron2.utils import comm

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.custom.measure import WARM_UP, total_seconds
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system.files import write_text

PLAN_NAME = "plan.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What was planned of the time of a training, with which it compares itself."""

    epoch: int  # iterations
    step: float | None  # seconds; None: not measured
    evaluation: float  # seconds

    def write(self, folder: Path) -> None:
        """Writes it to the folder of a run."""
        write_text(folder / PLAN_NAME, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """Reads it; None of runs of earlier versions."""
        path = folder / PLAN_NAME
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


class CustomTrainer(MaskDINOTrainer):
    """Trains on own data: checkpoints that newer ones replace are removed, but for the best."""

    def build_hooks(self) -> list[HookBase]:
        """Those of every training, and one that removes checkpoints."""
        period = self.cfg.SOLVER.CHECKPOINT_PERIOD
        result = [*super().build_hooks(), _KeepNewest(self.checkpointer, period)]
        plan = Plan.read(Path(self.cfg.OUTPUT_DIR))
        return result if plan is None else [TellTime(plan, self.cfg.TEST.EVAL_PERIOD), *result]


class TellTime(HookBase):
    """Says, after the first epoch, how long the training takes after all.

    The first of the hooks: it counts steps, and not what the others do after them.
    """

    def __init__(
        self, plan: Plan, eval_period: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._plan, self._eval_period, self._clock = plan, eval_period, clock
        self._seconds: list[float] = []

    def before_step(self) -> None:
        """Notes when the step begins."""
        self._began = self._clock()

    def after_step(self) -> None:
        """Speaks once."""
        if len(self._seconds) == self._plan.epoch:
            return  # it has
        self._seconds.append(self._clock() - self._began)
        if len(self._seconds) == self._plan.epoch and comm.is_main_process():
            logger.info(self._text(mean(self._seconds[WARM_UP:] or self._seconds)))

    def _text(self, step: float) -> str:
        planned = self._plan.step
        text = f"After the first epoch: {step:.3g} s per iteration"
        if planned is not None:
            text += f", where {planned:.3g} were planned"
        text += f"; the whole training takes about {self._total(step)}"
        return text if planned is None else f"{text} instead of {self._total(planned)}"

    def _total(self, step: float) -> timedelta:
        seconds = total_seconds(
            self.trainer.max_iter, self._eval_period, step, self._plan.evaluation
        )
        return timedelta(seconds=round(seconds))


class _KeepNewest(HookBase):
    """Removes checkpoints of the training, once those after them are written and evaluated."""

    def __init__(self, checkpointer: MaskDINOCheckpointer, period: int) -> None:
        self._checkpointer = checkpointer
        self._period = period

    def after_step(self) -> None:
        """Acts after each checkpoint but the last, whose evaluation is yet to come."""
        finished = self.trainer.iter + 1
        if finished % self._period == 0 and finished != self.trainer.max_iter:
            self._remove_old()

    def after_train(self) -> None:
        """Removes what the last checkpoint replaces."""
        self._remove_old()

    def _remove_old(self) -> None:
        if not comm.is_main_process() or not self._checkpointer.has_checkpoint():
            return
        newest = Path(self._checkpointer.get_checkpoint_file())
        for path in newest.parent.glob("model_*.pth"):
            if path != newest and re.fullmatch(r"model_\d{7}\.pth", path.name):
                path.unlink()
