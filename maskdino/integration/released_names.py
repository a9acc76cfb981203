"""Names of the released Mask DINO code that others import, and what does their work here.

An import of one of them answers with its replacement in one line, not with "no module named".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Released name -> what to use here, and how where that does not say it.
NAMES = {
    "maskdino.COCOInstanceNewBaselineDatasetMapper": (
        "maskdino.data.InstanceMapper",
        "INPUT.DATASET_MAPPER_NAME instance",
    ),
    "maskdino.COCOPanopticNewBaselineDatasetMapper": (
        "maskdino.data.PanopticMapper",
        "INPUT.DATASET_MAPPER_NAME panoptic",
    ),
    "maskdino.DetrDatasetMapper": (
        "maskdino.data.InstanceMapper",
        "INPUT.DATASET_MAPPER_NAME instance, INPUT.LSJ.ENABLED False",
    ),
    "maskdino.MaskFormerSemanticDatasetMapper": (
        "maskdino.data.SemanticMapper",
        "INPUT.DATASET_MAPPER_NAME semantic, INPUT.LSJ.ENABLED False",
    ),
    "maskdino.InstanceSegEvaluator": (
        "maskdino.evaluation.coco.COCOInstanceEvaluator",
        "maskdino.evaluation.build.build_evaluator chooses by dataset",
    ),
    "maskdino.SemanticSegmentorWithTTA": (
        "maskdino.evaluation.test_time_augmentation.AugmentedSemanticModel",
        "TEST.AUG.ENABLED True",
    ),
}
MODULES = {
    "maskdino.maskdino": ("maskdino.model", ""),
    "maskdino.test_time_augmentation": ("maskdino.evaluation.test_time_augmentation", ""),
    "maskdino.utils": ("maskdino.ops", "box_ops is maskdino.ops.boxes"),
    "maskdino.data.dataset_mappers": ("maskdino.data.mappers", ""),
    "maskdino.evaluation.instance_evaluation": ("maskdino.evaluation.coco", ""),
    "maskdino.modeling.criterion": ("maskdino.losses.criterion", ""),
    "maskdino.modeling.matcher": ("maskdino.losses.matcher", ""),
    "maskdino.modeling.pixel_decoder": (
        "maskdino.modeling.encoder",
        "its ops are maskdino.ops.ms_deform_attn",
    ),
    "maskdino.modeling.transformer_decoder": ("maskdino.modeling.decoder", ""),
    "maskdino.modeling.backbone": ("maskdino.backbones", ""),
    "maskdino.modeling.meta_arch": ("maskdino.model", ""),
}


def answer_for(name: str) -> str | None:
    """What to use instead of a name of the released code; None: it is not one of them."""
    found = NAMES.get(name) or MODULES.get(name)
    if found is None:
        return None
    replacement, how = found
    hint = f" ({how})" if how else ""
    message = f"{name} is of the released Mask DINO code; use {replacement}{hint}"
    return f"{message}; docs/from_released.md has all names"


class _Answers(MetaPathFinder):
    """Stands behind all other finders, so it is asked for what does not exist."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - as Python calls it
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        message = answer_for(fullname)
        if message is not None:
            raise ModuleNotFoundError(message)
        return None


def missing_attribute(name: str) -> object:
    """`__getattr__` of the package, which Python calls for names that it lacks."""
    full = f"maskdino.{name}"
    raise AttributeError(answer_for(full) or f"module 'maskdino' has no attribute {name!r}")


def install() -> None:
    """Lets imports of released names and modules answer; more than one call does nothing more."""
    if not any(type(finder).__name__ == _Answers.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Answers())
