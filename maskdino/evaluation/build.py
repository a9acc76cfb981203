"""Which evaluators a dataset gets: one table from its type and the model's tasks."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)
from torch import nn

from maskdino.evaluation import coco as coco_evaluation
from maskdino.evaluation.coco import ALL_DETECTIONS, COCOInstanceEvaluator
from maskdino.evaluation.panoptic import PanopticEvaluator
from maskdino.evaluation.semantic import SemanticEvaluator
from maskdino.integration.compat import cityscapes_scripts
from maskdino.integration.extensions import EVALUATOR_REGISTRY
from maskdino.postprocess import InferenceOptions


def _coco(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return COCOInstanceEvaluator(
        dataset_name,
        folder,
        with_masks=cfg.MODEL.MASK_DINO.MASK_ON,
        fast=cfg.TEST.COCO_EVALUATOR == "auto" and coco_evaluation.fast_library() is not None,
        # Each slice of an image has TEST.DETECTIONS_PER_IMAGE.
        detections=ALL_DETECTIONS if cfg.TEST.SLICES.SIZE else cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def _lvis(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_DINO.MASK_ON else ("bbox",)
    return LVISEvaluator(dataset_name, tasks, output_dir=folder)


def _panoptic(_: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return PanopticEvaluator(dataset_name, folder)


def _semantic(_: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    return SemanticEvaluator(dataset_name, folder)


class _AnyNumPy:
    """Lets detectron2's evaluators of Cityscapes run with any NumPy."""

    def evaluate(self) -> dict | None:
        """See detectron2's; leaves no file `matches.json` in the current folder."""
        with cityscapes_scripts():
            return super().evaluate()  # type: ignore[misc]


class CityscapesInstances(_AnyNumPy, CityscapesInstanceEvaluator):
    """Evaluates instances."""


class CityscapesClasses(_AnyNumPy, CityscapesSemSegEvaluator):
    """Evaluates semantic maps."""


def _cityscapes_instance(_: CfgNode, dataset_name: str, __: str) -> DatasetEvaluator:
    return CityscapesInstances(dataset_name)


def _cityscapes_semantic(_: CfgNode, dataset_name: str, __: str) -> DatasetEvaluator:
    return CityscapesClasses(dataset_name)


# Ours and those of users, EVALUATOR_REGISTRY's, are built alike.
_Builder = Callable[[CfgNode, str, str], DatasetEvaluator]
_COCO_PANOPTIC: dict[str, _Builder] = {
    "instance": _coco,
    "panoptic": _panoptic,
    "semantic": _semantic,
}
_CITYSCAPES: dict[str, _Builder] = {
    "instance": _cityscapes_instance,
    "panoptic": _panoptic,
    "semantic": _cityscapes_semantic,
}
# Type of the dataset (its metadata's `evaluator_type`) -> task of the model -> evaluator.
EVALUATORS: dict[str, dict[str, _Builder]] = {
    "coco": {"instance": _coco},
    "lvis": {"instance": _lvis},
    "sem_seg": {"semantic": _semantic},
    "coco_panoptic_seg": _COCO_PANOPTIC,
    "ade20k_instance": {"instance": _coco},
    "ade20k_panoptic_seg": _COCO_PANOPTIC,
    "cityscapes_instance": {"instance": _cityscapes_instance},
    "cityscapes_sem_seg": {"semantic": _cityscapes_semantic},
    "cityscapes_panoptic_seg": _CITYSCAPES,
}
# What each evaluator measures, by task.
_OF_INSTANCES: dict[str, tuple[str, ...]] = dict.fromkeys(("bbox", "segm"), coco_evaluation.METRICS)
METRICS: dict[_Builder, dict[str, tuple[str, ...]]] = {
    _coco: _OF_INSTANCES,
    _lvis: {
        task: (*(name for name in names if name != "AR"), "APr", "APc", "APf")
        for task, names in _OF_INSTANCES.items()
    },
    _panoptic: {"panoptic_seg": tuple(f"{q}Q{of}" for of in ("", "_th", "_st") for q in "PSR")},
    _semantic: {"sem_seg": ("mIoU", "fwIoU", "mACC", "pACC")},
    _cityscapes_instance: {"segm": ("AP", "AP50")},
    _cityscapes_semantic: {"sem_seg": ("IoU", "iIoU", "IoU_sup", "iIoU_sup")},
}


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
    """Builds the evaluators of all tasks that both the model and the dataset have.

    Results go below ``OUTPUT_DIR/inference/<dataset name>``.

    Args:
        cfg: configuration; ``MODEL.MASK_DINO.TEST`` says which tasks the model does, and
            ``TEST.EVALUATORS`` which evaluators of users judge it too.
        dataset_name: name of a registered dataset. The ``evaluator_type`` of its metadata is one of
            EVALUATORS, or a name in EVALUATOR_REGISTRY.

    Raises:
        ValueError: if the dataset's type is unknown, or the model does nothing it can be judged by.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    own = [EVALUATOR_REGISTRY.find(name) for name in _own_evaluators(cfg, dataset_name)]
    builders = [*_builders(cfg, dataset_name), *own]
    return DatasetEvaluators([build(cfg, dataset_name, folder) for build in builders])


@contextmanager
def masks_as_read(model: nn.Module, evaluator: DatasetEvaluator) -> Iterator[None]:
    """Inside, the model gives masks as run lengths, if all evaluators read them.

    As pixels, those of 100 objects in an image of 24 megapixels are 2.4 GB. Evaluators of others
    may know detectron2's `pred_masks` alone; then these are given.

    Args:
        model: a `MaskDINO`, perhaps in a wrapper for several processes; others are left alone.
        evaluator: has a true `reads_run_lengths` where it knows `pred_rles`.
    """
    together = isinstance(evaluator, DatasetEvaluators)
    parts = evaluator._evaluators if together else [evaluator]
    network = getattr(model, "module", model)
    options = getattr(network, "inference", None)
    if isinstance(options, InferenceOptions) and all(
        getattr(part, "reads_run_lengths", False) for part in parts
    ):
        network.inference = replace(options, run_lengths=True)
    try:
        yield
    finally:
        if options is not None:
            network.inference = options


def check_evaluators(cfg: CfgNode) -> None:
    """Raises a ValueError unless there is something to evaluate each of DATASETS.TEST with."""
    for name in cfg.DATASETS.TEST:
        _builders(cfg, name)
        EVALUATOR_REGISTRY.check(_own_evaluators(cfg, name))


def known_metrics(cfg: CfgNode, dataset_name: str) -> list[str] | None:
    """Names of what the evaluation of a dataset measures, such as "segm/AP"; not of single classes.

    None if an evaluator of the user's takes part: what it measures is not known.
    """
    if _own_evaluators(cfg, dataset_name):
        return None
    tables = [METRICS[builder] for builder in _builders(cfg, dataset_name)]
    return [
        f"{task}/{name}"
        for table in tables
        for task, names in table.items()
        if task != "segm" or cfg.MODEL.MASK_DINO.MASK_ON
        for name in names
    ]


def _own_evaluators(cfg: CfgNode, dataset_name: str) -> list[str]:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    of_dataset = [kind] if kind not in EVALUATORS and kind in EVALUATOR_REGISTRY else []
    return list(dict.fromkeys([*of_dataset, *cfg.TEST.EVALUATORS]))


def _builders(cfg: CfgNode, dataset_name: str) -> list[_Builder]:
    """Chooses evaluators of ours; there may be none if the user has evaluators of their own."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    own = _own_evaluators(cfg, dataset_name)
    if kind not in EVALUATORS:
        if own:
            return []
        raise ValueError(
            f"The dataset '{dataset_name}' has the evaluator type {kind!r}; known types are "
            f"{', '.join(EVALUATORS)}. Set `evaluator_type` in its metadata, or name evaluators of "
            "your own in TEST.EVALUATORS (with --import)."
        )
    test = cfg.MODEL.MASK_DINO.TEST
    enabled = {
        "panoptic": test.PANOPTIC_ON,
        "instance": test.INSTANCE_ON,
        "semantic": test.SEMANTIC_ON,
    }
    table = EVALUATORS[kind]
    builders = [table[task] for task, on in enabled.items() if on and task in table]
    if not builders and not own:
        raise ValueError(
            f"Nothing to evaluate on '{dataset_name}': it serves {', '.join(table)}, "
            f"the model does {[task for task in enabled if enabled[task]]} (MODEL.MASK_DINO.TEST)."
        )
    return builders
