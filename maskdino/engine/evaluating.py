"""Evaluating a model on the datasets of its configuration, in a training and without one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, print_csv_format
from detectron2.utils import comm
from torch import nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.loading import load_trained
from maskdino.data import check_datasets
from maskdino.data.stream import build_test_data
from maskdino.evaluation.build import build_evaluator, masks_as_read
from maskdino.evaluation.loop import evaluate_images
from maskdino.evaluation.slices import SlicedModel
from maskdino.evaluation.test_time_augmentation import AugmentedSemanticModel
from maskdino.system.devices import settle_device
from maskdino.system.files import write_errors, write_text

logger = logging.getLogger(__name__)


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds the meta-architecture that the configuration names, on its device."""
    model = modeling.build_model(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s with %.1f M trainable parameters.", type(model).__name__, trained / 1e6)
    return model


def as_evaluated(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """What is given the images of `build_test_data`: the model, or one that slices them."""
    return SlicedModel(cfg, model) if cfg.TEST.SLICES.SIZE else model


def evaluate_model(
    cfg: CfgNode,
    model: nn.Module,
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    build_loader: Callable[[CfgNode, str], Iterable[list[dict]]] = build_test_data,
    build_evaluator: Callable[
        [CfgNode, str], DatasetEvaluator | list[DatasetEvaluator] | None
    ] = build_evaluator,
) -> dict[str, Any]:
    """See `MaskDINOTrainer.test`, whose builders of a dataset are given."""
    names = cfg.DATASETS.TEST
    if isinstance(evaluators, DatasetEvaluator):
        evaluators = [evaluators]
    if evaluators is not None and len(evaluators) != len(names):
        raise ValueError(f"{len(evaluators)} evaluators for {len(names)} datasets {names}")
    model = as_evaluated(cfg, model)
    results: dict[str, Any] = {}
    for index, name in enumerate(names):
        loader = build_loader(cfg, name)
        evaluator = build_evaluator(cfg, name) if evaluators is None else evaluators[index]
        if evaluator is None or isinstance(evaluator, list):  # detectron2's trainers may give these
            evaluator = DatasetEvaluators(evaluator or [])
        with masks_as_read(model, evaluator):
            results[name] = evaluate_images(model, loader, evaluator)
        if comm.is_main_process():
            logger.info("Results on %s:", name)
            print_csv_format(results[name])
    return results[names[0]] if len(names) == 1 else results


def evaluate_weights(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluates `MODEL.WEIGHTS`, or the last checkpoint of `OUTPUT_DIR`, without training.

    With `SOLVER.EMA.ENABLED`, the averaged weights of the file are used, if it has them. With
    `TEST.AUG.ENABLED`, semantic maps are means over several sizes of each image, and mirrored
    ones; evaluations during training are without, as they would take ten times as long.
    """
    cfg = settle_device(cfg)
    check_datasets(cfg, is_evaluation=True)
    model = build_model(cfg)
    run = MaskDINOCheckpointer(model, cfg.OUTPUT_DIR)
    load_trained(model, cfg, run.get_checkpoint_file() if resume and run.has_checkpoint() else None)
    if cfg.TEST.AUG.ENABLED:
        model = AugmentedSemanticModel(cfg, model)
    with write_errors(cfg.OUTPUT_DIR):
        results = evaluate_model(cfg, model)
        if comm.is_main_process():
            write_results(cfg.OUTPUT_DIR, results)
    return results


def write_results(folder: str, results: dict) -> None:
    """Writes the numbers of an evaluation to `<folder>/inference/results.json`."""
    write_text(os.path.join(folder, "inference", "results.json"), json.dumps(results, indent=1))
