"""Training that keeps, of the checkpoints to resume from, only the newest."""

from __future__ import annotations

import re
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.engine.trainer import MaskDINOTrainer


class CustomTrainer(MaskDINOTrainer):
    """Trains on own data: checkpoints that newer ones replace are removed, but for the best."""

    def build_hooks(self) -> list[HookBase]:
        """Those of every training, and one that removes checkpoints."""
        period = self.cfg.SOLVER.CHECKPOINT_PERIOD
        return [*super().build_hooks(), _KeepNewest(self.checkpointer, period)]


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
