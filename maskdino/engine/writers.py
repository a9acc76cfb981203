"""Where the scalars of a training go: console and metrics.json always, others by LOG.WRITERS.

W&B and MLflow are imported when a training starts. A resumed training goes on with its run there:
its identity is kept in ``OUTPUT_DIR/runs.json``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
import time
from abc import abstractmethod
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import EventWriter, TensorboardXWriter

from maskdino.engine.hooks import ConsoleWriter
from maskdino.engine.metrics_file import MetricsFile, latest_scalars
from maskdino.integration.extensions import WRITER_REGISTRY
from maskdino.system.files import write_text

RUNS_FILE = "runs.json"  # name of the writer -> identity of its run


def check_writers(cfg: CfgNode) -> None:
    """Checks that LOG.WRITERS names writers whose packages are installed.

    Raises:
        ValueError: one is unknown, or its package is missing.
    """
    for name in cfg.LOG.WRITERS:
        package = getattr(WRITER_REGISTRY.find(name), "package", None)
        if package and importlib.util.find_spec(package[0]) is None:
            raise ValueError(
                f"LOG.WRITERS names {name!r}, which needs a package that is not installed: "
                f"pip install {package[1]}"
            )


def build_writers(cfg: CfgNode, max_iter: int) -> list[EventWriter]:
    """Builds the writers of the console, of ``metrics.json``, and those of LOG.WRITERS.

    Raises:
        ValueError: see `check_writers`.
    """
    check_writers(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        ConsoleWriter(max_iter),
        MetricsFile(folder / "metrics.json"),
        *(WRITER_REGISTRY.find(name)(cfg) for name in cfg.LOG.WRITERS),
    ]


class RunWriter(EventWriter):
    """A writer to a service that knows runs; a training that goes on goes on with its run.

    Attributes:
        name: in LOG.WRITERS.
        package: to be imported, and to be installed for that.
    """

    name: str
    package: tuple[str, str]

    def __init__(self, cfg: CfgNode) -> None:
        self.folder = Path(cfg.OUTPUT_DIR)
        self.project: str = cfg.LOG.PROJECT
        self.run_name: str = cfg.LOG.RUN or Path(os.path.abspath(cfg.OUTPUT_DIR)).name
        self.settings: dict[str, Any] = yaml.safe_load(cfg.dump())
        self._last_iteration = -1
        self._is_open = False

    def start(self, *, goes_on: bool) -> None:
        """Opens a run before the first step; if the training goes on, that of before."""
        path = self.folder / RUNS_FILE
        runs = json.loads(path.read_text()) if path.is_file() else {}
        runs[self.name] = self.open_run(runs.get(self.name) if goes_on else None)
        write_text(path, json.dumps(runs, indent=1))
        self._is_open = True

    def write(self) -> None:
        """Sends what is new since the last time, smoothed as in the other writers."""
        if not self._is_open:  # the training ended before its first step
            return
        for iteration, scalars in latest_scalars():
            if iteration > self._last_iteration:
                self.send(scalars, iteration)
                self._last_iteration = iteration

    def close(self) -> None:
        """Closes the run, as failed where an error ends the training."""
        if self._is_open:
            self._is_open = False
            self.close_run(failed=isinstance(sys.exc_info()[1], Exception | KeyboardInterrupt))

    @abstractmethod
    def open_run(self, identity: str | None) -> str:
        """Opens a run, that of an identity if there is one, and gives its identity."""

    @abstractmethod
    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """Sends the values of an iteration."""

    @abstractmethod
    def close_run(self, *, failed: bool) -> None:
        """Ends the run."""


class WandbWriter(RunWriter):
    """Writes to Weights & Biases; WANDB_MODE=offline writes below OUTPUT_DIR alone."""

    name, package = "wandb", ("wandb", "wandb")

    def open_run(self, identity: str | None) -> str:
        """See `RunWriter.open_run`."""
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=self.run_name,
            dir=str(self.folder),
            config=self.settings,
            id=identity,
            resume="allow" if identity else None,
        )
        return str(self._run.id)

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """See `RunWriter.send`; steps before the last one of a run that goes on are left out."""
        self._run.log(scalars, step=iteration)

    def close_run(self, *, failed: bool) -> None:
        """See `RunWriter.close_run`."""
        self._run.finish(exit_code=int(failed))


class MlflowWriter(RunWriter):
    """Writes to MLflow: to MLFLOW_TRACKING_URI, or else to ``OUTPUT_DIR/mlruns``."""

    name, package = "mlflow", ("mlflow", "mlflow-skinny")

    def open_run(self, identity: str | None) -> str:
        """See `RunWriter.open_run`."""
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            address = (self.folder.resolve() / "mlruns").as_uri()
            # Files need no database, and are what is wanted here; MLflow 3 asks for a word.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=address)
        if identity is not None:
            self._client.update_run(identity, status="RUNNING")
            self._identity = identity
            return identity
        experiment = self._client.get_experiment_by_name(self.project)
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment(self.project)
        )
        self._identity = self._client.create_run(number, run_name=self.run_name).info.run_id
        settings = iter(flatten_results_dict(self.settings).items())
        while part := [
            Param(key.replace("/", "."), str(value)[:500]) for key, value in islice(settings, 100)
        ]:
            self._client.log_batch(self._identity, params=part)
        return self._identity

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        """See `RunWriter.send`; what MLflow does not allow in a name is replaced by ``_``."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [
            Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, iteration)
            for name, value in scalars.items()
            if not math.isnan(value)  # of classes without objects; not all stores take it
        ]
        self._client.log_batch(self._identity, metrics=metrics)

    def close_run(self, *, failed: bool) -> None:
        """See `RunWriter.close_run`."""
        self._client.set_terminated(self._identity, "FAILED" if failed else "FINISHED")


class WriteScalars(hooks.PeriodicWriter):
    """Calls the writers every so many iterations, and opens and closes their runs.

    Args:
        writers: all of them.
        period: iterations.
        evaluations: iterations between evaluations, which `metrics.json` has at once; 0: none.
    """

    def __init__(self, writers: list[EventWriter], period: int, evaluations: int = 0) -> None:
        super().__init__(writers, period)
        self._evaluations = evaluations

    def before_train(self) -> None:
        """Opens runs, those of the checkpoint if the training was resumed."""
        for writer in self._writers:
            if isinstance(writer, RunWriter):
                writer.start(goes_on=self.trainer.start_iter > 0)
            elif isinstance(writer, MetricsFile):
                writer.start(self.trainer.start_iter)

    def after_step(self) -> None:
        """Writes if it is time."""
        super().after_step()
        if self._evaluations > 0 and (self.trainer.iter + 1) % self._evaluations == 0:
            for writer in self._writers:
                if isinstance(writer, MetricsFile):
                    writer.write()


class WriteFirst(WriteScalars):
    """Calls the writers whose lines must be written before the checkpoint of an iteration.

    `WriteScalars` calls them again after the evaluation, for its results.
    """

    def __init__(self, writers: list[EventWriter], period: int, evaluations: int = 0) -> None:
        ahead = [writer for writer in writers if isinstance(writer, ConsoleWriter | MetricsFile)]
        super().__init__(ahead, period, evaluations)

    def before_train(self) -> None:
        """Leaves the beginning to `WriteScalars`."""

    def after_train(self) -> None:
        """Leaves the end to `WriteScalars`."""


def _tensorboard(cfg: CfgNode) -> EventWriter:
    return TensorboardXWriter(cfg.OUTPUT_DIR)


_tensorboard.package = ("tensorboard", "tensorboard")  # type: ignore[attr-defined]
WRITER_REGISTRY.register(_tensorboard, name="tensorboard")
WRITER_REGISTRY.register(WandbWriter, name="wandb")
WRITER_REGISTRY.register(MlflowWriter, name="mlflow")
