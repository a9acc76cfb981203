"""Keeping the best weights by a metric, and stopping when nothing gets better (SOLVER.BEST).

``OUTPUT_DIR/best`` gets ``model_best.pth`` and ``history.json``, all evaluations of the run. The
latter is what a resumed run goes on from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.ema import WeightAverage
from maskdino.data import DataError
from maskdino.evaluation.build import known_metrics
from maskdino.metrics import before_class, flatten
from maskdino.system.errors import UserError
from maskdino.system.files import write_text
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

BEST_FOLDER, BEST_NAME, HISTORY_NAME = "best", "model_best", "history.json"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        iteration: number of the last step before it, from 0.
        results: task ("segm", "bbox") -> metric -> value, AP in percent; with several datasets,
            dataset -> task -> metric -> value.
    """

    iteration: int
    results: dict[str, Any]

    def value(self, metric: str) -> float | None:
        """The finite value of a metric such as "segm/AP"; None: it could not be measured."""
        value = flatten(self.results).get(metric)
        return value if value is not None and math.isfinite(value) else None


@dataclass
class History:
    """All evaluations of a run so far, in a file.

    Attributes:
        path: of the JSON file; its folder is made when something is written.
        metric: that evaluations are judged by.
        lower_is_better: the metric is an error.
        evaluations: in the order of their iterations.
    """

    path: Path
    metric: str
    lower_is_better: bool = False
    evaluations: list[Evaluation] = field(default_factory=list)

    @staticmethod
    def read(path: Path, metric: str, lower_is_better: bool = False) -> History:
        """Reads the file; without one, the history is empty.

        Raises:
            UserError: the file holds something else.
        """
        try:
            entries = json.loads(path.read_text()) if path.is_file() else []
            evaluations = [Evaluation(**entry) for entry in entries]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} holds no evaluations ({error}): without the file, the history begins anew"
            ) from error
        return History(path, metric, lower_is_better, evaluations)

    @property
    def best(self) -> Evaluation | None:
        """The first one with the best value; what could not be measured is the worst."""
        return max(self.evaluations, key=self.score, default=None)

    def score(self, entry: Evaluation) -> float:
        """Gives the value of an evaluation as a number of which more is better."""
        value = entry.value(self.metric)
        if value is None:
            return -math.inf
        return -value if self.lower_is_better else value

    def has(self, iteration: int) -> bool:
        """Tells whether there was an evaluation after this step."""
        return any(entry.iteration == iteration for entry in self.evaluations)

    def since_best(self) -> int:
        """Counts evaluations after the best one; 0 while that found nothing (AP 0)."""
        best, least = self.best, -math.inf if self.lower_is_better else 0.0
        if best is None or self.score(best) <= least:
            return 0
        return sum(entry.iteration > best.iteration for entry in self.evaluations)

    def forget_from(self, iteration: int) -> None:
        """Drops evaluations after steps that a resumed run makes once more."""
        self.evaluations = [entry for entry in self.evaluations if entry.iteration < iteration]

    def add(self, evaluation: Evaluation) -> bool:
        """Adds an evaluation; returns whether it is the best so far."""
        self.evaluations.append(evaluation)
        return self.best is evaluation

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        entries = [asdict(entry) for entry in self.evaluations]
        write_text(self.path, json.dumps(entries, indent=1))


def check_best(cfg: CfgNode) -> None:
    """Checks that SOLVER.BEST names something that evaluations will measure, as far as is known.

    Raises:
        ValueError: it does not.
    """
    best = cfg.SOLVER.BEST
    if not best.METRIC:
        if best.PATIENCE:
            raise ValueError("SOLVER.BEST.PATIENCE needs SOLVER.BEST.METRIC, such as segm/AP")
        return
    if not cfg.DATASETS.TEST or cfg.TEST.EVAL_PERIOD < 1:
        raise ValueError(
            "SOLVER.BEST.METRIC needs evaluations: set DATASETS.TEST and TEST.EVAL_PERIOD"
        )
    known: list[str] = []
    for dataset in cfg.DATASETS.TEST:
        names = known_metrics(cfg, dataset)
        if names is None:
            return
        known += names if len(cfg.DATASETS.TEST) == 1 else [f"{dataset}/{name}" for name in names]
    if not (best.METRIC in known or _is_of_class(best.METRIC, known)):
        raise _unknown(best.METRIC, known)


class BestCheckpoint(HookBase):
    """Judges each evaluation, keeps the best weights, and stops a training that gets no better.

    Its `evaluate` takes the place of the trainer's in the hook that evaluates, which comes before.

    Args:
        cfg: configuration; reads OUTPUT_DIR, SOLVER.BEST and TEST.EVAL_PERIOD.
        model: the plain model.
        average: the averaged weights, which are what is evaluated and kept, if there are any.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, average: WeightAverage | None) -> None:
        check_best(cfg)
        best = cfg.SOLVER.BEST
        folder = Path(cfg.OUTPUT_DIR) / BEST_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.history = History.read(folder / HISTORY_NAME, best.METRIC, best.LOWER_IS_BETTER)
        self._patience = best.PATIENCE
        self._period = cfg.TEST.EVAL_PERIOD
        self._average = average
        self._checkpointer = MaskDINOCheckpointer(model, str(folder))

    def before_train(self) -> None:
        """Finds where a resumed run stands; makes up for an evaluation that was cut off."""
        done, last = self.trainer.start_iter, self.trainer.max_iter
        self.history.forget_from(done)
        if not 0 < done < last:
            return
        self.trainer.iter = done - 1  # to which the evaluation belongs, and where a stop leaves us
        # Only the main process has results, so it decides for all.
        if comm.all_gather(done % self._period == 0 and not self.history.has(done - 1))[0]:
            self.evaluate()
        self._stop_if_stale()
        if not self.trainer.stopped:
            self.trainer.iter = done

    def after_step(self) -> None:
        """Acts after each evaluation but the last, which is made when training has ended."""
        finished = self.trainer.iter + 1
        if finished % self._period == 0 and finished != self.trainer.max_iter:
            self._stop_if_stale()

    def evaluate(self) -> dict[str, Any]:
        """Evaluates, and saves the weights if they are the best so far.

        Raises:
            DataError: there is no such metric among the results (in all processes).
        """
        results = self.trainer.evaluate()
        fault = ""
        if comm.is_main_process():
            values = flatten(results)
            metric = self.history.metric
            # Evaluators that found nothing may leave out everything, or what is of classes.
            if values and metric not in values and not _is_of_class(metric, list(values)):
                fault = str(_unknown(metric, list(values)))
            else:
                self._record(results)
        fault = comm.all_gather(fault)[0]
        if fault:
            raise DataError(fault)
        return results

    def _record(self, results: dict[str, Any]) -> None:
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if self.history.has(iteration):
            return
        evaluation = Evaluation(iteration, json.loads(json.dumps(results, default=float)))
        if self.history.add(evaluation):
            averaged = (
                contextlib.nullcontext() if self._average is None else self._average.applied()
            )
            with averaged:
                self._checkpointer.save(BEST_NAME, iteration=iteration)
        self.history.write()
        metric, best = self.history.metric, self.history.best
        if best is not None:
            logger.info(
                "%s %s after iteration %d; the best is %s after iteration %d.",
                metric,
                _shown(evaluation.value(metric)),
                iteration + 1,
                _shown(best.value(metric)),
                best.iteration + 1,
            )

    def _stop_if_stale(self) -> None:
        stale = self._patience > 0 and self.history.since_best() >= self._patience
        if comm.all_gather(stale)[0]:
            self.trainer.stopped = True
            logger.info(
                "Stopped: %s in a row without a better result.",
                counted(self._patience, "evaluation"),
            )


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _is_of_class(metric: str, known: list[str]) -> bool:
    """Tells whether a metric may be that of a class, of which none are known now."""
    task = before_class(metric)
    of_task = [other for other in known if other.startswith(f"{task}/")]
    return bool(of_task) and all(before_class(other) is None for other in of_task)


def _unknown(metric: str, known: list[str]) -> ValueError:
    listed = [name for name in known if before_class(name) is None]
    return ValueError(
        f"SOLVER.BEST.METRIC is {metric!r}, which the evaluation does not give; there is "
        f"{', '.join(listed)}"
        + (", and those of single classes" if len(listed) < len(known) else "")
    )
