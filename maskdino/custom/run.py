"""One training on own data, from the files to the result: plan, train, tell."""

from __future__ import annotations

import heapq
import json
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from maskdino.config import load_config
from maskdino.config.loading import merge_overrides
from maskdino.custom import plan
from maskdino.custom.annotations import summarize
from maskdino.custom.measure import Pace, measure_pace
from maskdino.custom.prepare import prepare_data, prepared_data, register_prepared
from maskdino.custom.report import QUALITIES, plan_text, results_text
from maskdino.custom.request import Request
from maskdino.custom.training import CustomTrainer, Plan
from maskdino.data import DataError
from maskdino.engine.best_checkpoint import BEST_FOLDER, BEST_NAME, HISTORY_NAME, History
from maskdino.engine.evaluating import write_results
from maskdino.engine.run_folder import check_folder, locked, open_logs, removed_if_unused
from maskdino.evaluation.files import INSTANCES_FILE
from maskdino.evaluation.report import write_report
from maskdino.integration.extensions import config_header
from maskdino.model_zoo import read_config
from maskdino.system.files import write_text
from maskdino.system.words import counted

NO_WEIGHTS = "none"
DEFAULT_CONFIGS = {"cuda": "custom/maskdino_R50", "cpu": "custom/maskdino_small"}
OFFLINE_CONFIG = "custom/maskdino_lite2"  # in place of one whose weights are out of reach
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Where the parts of a run are."""

    output: Path

    @property
    def config(self) -> Path:
        """The whole configuration."""
        return self.output / "config.yaml"

    @property
    def best_weights(self) -> Path:
        """The best checkpoint."""
        return self.output / BEST_FOLDER / f"{BEST_NAME}.pth"

    @property
    def drawings(self) -> Path:
        """Folder of predictions beside ground truth."""
        return self.output / "predictions"

    @property
    def report(self) -> Path:
        """The page about the last evaluation."""
        return self.output / "report.html"

    def is_planned(self) -> bool:
        """Whether there is something that could be resumed."""
        return self.config.is_file()

    def results(self) -> str:
        """A table of the best evaluation."""
        best = self._history(load_config(self.config)).best
        if best is None:
            return "no evaluation yet"
        summary = summarize(prepared_data(self.output, plan.VALIDATION_NAME))
        title = f"{QUALITIES[summary.task]} on the validation images, in percent, best of all "
        title += f"evaluations (iteration {best.iteration + 1}):"
        return f"{title}\n{results_text(best, summary)}"

    def lowest_shown(self) -> float:
        """The score from which on the last evaluation has as many objects as there are.

        Where it is lower than the usual threshold, as after short trainings, it takes its place. 1
        where it is not known.
        """
        path = self.output / "inference" / plan.VALIDATION_NAME / INSTANCES_FILE
        if not path.is_file():  # of another task
            return 1.0
        scores = [found["score"] for found in json.loads(path.read_text(encoding="utf-8"))]
        number = summarize(prepared_data(self.output, plan.VALIDATION_NAME)).objects
        least = min(heapq.nlargest(number, scores), default=1.0)
        return math.floor(100 * least) / 100

    def write_report(self, threshold: float) -> None:
        """Writes a page about the last evaluation, whose predictions are there, if there was one.

        Objects with lower scores than the threshold are not shown. The datasets must be registered.
        """
        cfg = load_config(self.config)
        evaluations = self._history(cfg).evaluations
        if evaluations:
            write_results(str(self.output), evaluations[-1].results)
            write_report(self.report, cfg.DATASETS.TEST[0], self.output, threshold=threshold)

    def _history(self, cfg: CfgNode) -> History:
        judged = cfg.SOLVER.BEST
        path = self.output / BEST_FOLDER / HISTORY_NAME
        return History.read(path, judged.METRIC, judged.LOWER_IS_BETTER)


def plan_run(request: Request) -> tuple[Run, str]:
    """Checks the data, chooses all settings, and writes them to the folder of the run.

    Returns:
        The run, and what was chosen and found odd, as text.

    Raises:
        ValueError: the data or the request are at fault (`maskdino.data.DataError`: the data).
        FileNotFoundError, KeyError, ConnectionError: see `read_start`.
    """
    run = Run(request.output)
    machine = plan.find_machine(request.processes)
    # Before the data, whose check takes longer.
    cfg = (
        read_default(machine, request)
        if request.config is None
        else read_start(request.config, request)
    )
    with removed_if_unused(request.output):
        check_folder(request.output, resume=True)
        with locked(request.output):  # two plans would write over each other's files
            if run.is_planned():
                raise DataError(
                    f"{run.output} holds a run: go on with --resume, or choose another folder"
                )
            text = _plan(cfg, run, machine, request)
    return run, text


def _plan(cfg: CfgNode, run: Run, machine: plan.Machine, request: Request) -> str:
    """Completes a configuration (in place), and writes what `plan_run` writes; returns the text."""
    data = prepare_data(request)
    register_prepared(request.output)
    plan.apply_data(cfg, data.train, machine, request)
    known = request.epochs and request.batch_size
    memory = None if known else plan.fit_memory(cfg, data.train, machine, request)
    plan.enlarge_small_objects(cfg, data.train, request)
    plan.apply_batch(cfg, data.train, machine, request, memory)
    pace = None if known else fit_pace(cfg, machine, request, data.validation.images)
    epochs = plan.apply_schedule(cfg, data.train, machine, request, pace)
    cfg.OUTPUT_DIR = str(request.output)
    merge_overrides(cfg, request.overrides)
    judge_by_task(cfg)
    Plan(
        plan.epoch_length(cfg, data.train),
        None if pace is None else pace.step,
        0.0 if pace is None else pace.evaluation,
    ).write(request.output)
    text = plan_text(cfg, data, machine, epochs, memory, pace)
    if data.notes:
        text += "\n" + "\n".join(data.notes)
    write_text(request.output / "plan.txt", f"{text}\n")
    write_text(run.config, config_header() + cfg.dump())  # last: it says that the run is planned
    return text


def fit_pace(cfg: CfgNode, machine: plan.Machine, request: Request, images: int) -> Pace:
    """Measures with all settings that are known, and makes batches smaller until one fits.

    Raises:
        DataError: not even one image fits, or the batch that was asked for does not.
    """
    while True:
        trial = cfg.clone()
        merge_overrides(trial, request.overrides)
        trial.SOLVER.IMS_PER_BATCH = max(1, trial.SOLVER.IMS_PER_BATCH // machine.processes)
        pace = measure_pace(trial, partial(register_prepared, request.output), images)
        if pace is not None:
            return pace
        batch = cfg.SOLVER.IMS_PER_BATCH
        if request.batch_size or batch <= machine.processes:
            raise DataError(
                f"a batch of {counted(batch, 'image')} does not fit in {machine.processes} x "
                f"{machine.memory_mb:.0f} MB; give a smaller --batch-size or --image-size"
            )
        plan.set_batch(cfg, batch // 2)


def judge_by_task(cfg: CfgNode) -> None:
    """Judges evaluations by what was learned, if nothing else was asked for (in place).

    That is mask AP or, without masks, box AP; panoptic quality; mean intersection over union.
    """
    test = cfg.MODEL.MASK_DINO.TEST
    if cfg.SOLVER.BEST.METRIC:
        return
    if test.INSTANCE_ON:
        cfg.SOLVER.BEST.METRIC = "segm/AP" if cfg.MODEL.MASK_DINO.MASK_ON else "bbox/AP"
    else:
        cfg.SOLVER.BEST.METRIC = "panoptic_seg/PQ" if test.PANOPTIC_ON else "sem_seg/mIoU"


def read_default(machine: plan.Machine, request: Request) -> CfgNode:
    """The configuration that suits the machine, or one whose weights need no network."""
    try:
        return read_start(DEFAULT_CONFIGS[machine.device], request)
    except ConnectionError as error:
        if request.weights is not None:
            raise
        logger.warning("%s: starting from %s instead.", error, OFFLINE_CONFIG)
        return read_start(OFFLINE_CONFIG, request)


def read_start(config: str, request: Request) -> CfgNode:
    """The configuration to start from, with weights that can be read.

    Raises:
        FileNotFoundError: there is no such configuration or checkpoint.
        ConnectionError: the weights cannot be downloaded.
        KeyError: no weights were released for the configuration, or a key is unknown.
    """
    if request.weights != NO_WEIGHTS:
        return read_config(config, request.weights, request.overrides)
    cfg = read_config(config, "", request.overrides)
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    return cfg


def train_run(run: Run, resume: bool, early_stop: int) -> None:
    """Trains, in one of possibly several processes.

    After `early_stop` evaluations without a better result it ends; 0: as SOLVER.BEST.PATIENCE says.
    """
    open_logs(run.output)
    logger.info("The whole configuration is in %s", run.config)
    register_prepared(run.output)
    cfg = load_config(run.config)
    cfg.OUTPUT_DIR = str(run.output)  # the folder may have been moved
    judge_by_task(cfg)  # as runs of earlier versions do not say
    cfg.SOLVER.BEST.PATIENCE = early_stop or cfg.SOLVER.BEST.PATIENCE
    cfg.freeze()
    with locked(run.output) if comm.is_main_process() else nullcontext():
        trainer = CustomTrainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
