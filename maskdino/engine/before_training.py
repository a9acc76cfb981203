"""What a configuration asks of a run, checked before the run takes any time."""

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from maskdino.config.checks import check_training, check_values
from maskdino.data.mixing import check_mixing
from maskdino.engine.best_checkpoint import check_best
from maskdino.engine.writers import check_writers
from maskdino.evaluation.build import check_evaluators
from maskdino.integration.extensions import AUGMENTATION_REGISTRY, MAPPER_REGISTRY

logger = logging.getLogger(__name__)

STEPPED = ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR")  # schedules that read SOLVER.STEPS


def check_settings(cfg: CfgNode, *, trains: bool = True) -> None:
    """Checks values, and names of mappers, augmentations, evaluators and writers.

    Evaluators depend on the datasets; those that are not registered are left to `check_datasets`.
    Where nothing is to be trained, what only a training reads is not checked.

    Raises:
        ValueError: a name is unknown, a value makes no sense (`maskdino.config.checks`), or
            SOLVER.BEST cannot be followed.
    """
    check_values(cfg)
    if trains:
        check_training(cfg)
    is_known = set(cfg.DATASETS.TEST) <= set(DatasetCatalog.list())
    if is_known:
        check_evaluators(cfg)
    if trains:
        MAPPER_REGISTRY.check([cfg.INPUT.DATASET_MAPPER_NAME])
        AUGMENTATION_REGISTRY.check(cfg.INPUT.AUGMENTATIONS)
        check_mixing(cfg)
        check_writers(cfg)
        if is_known:
            check_best(cfg)


def warn_of_schedule(cfg: CfgNode) -> None:
    """Warns of parts of the schedule that the run is too short for."""
    solver = cfg.SOLVER
    within = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(within) < len(solver.STEPS) and solver.LR_SCHEDULER_NAME in STEPPED:
        logger.warning(
            "SOLVER.STEPS %s lie beyond SOLVER.MAX_ITER %d: the learning rate %s. Write earlier "
            "steps, or () for none.",
            [step for step in solver.STEPS if step not in within],
            solver.MAX_ITER,
            f"falls at {within} alone" if within else "never falls",
        )
    if solver.WARMUP_ITERS >= solver.MAX_ITER and solver.WARMUP_FACTOR != 1:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is no less than SOLVER.MAX_ITER %d: the learning rate never "
            "gets to SOLVER.BASE_LR.",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
        )
