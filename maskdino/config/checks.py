"""Which values a configuration may have: one table, checked when a command starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from maskdino.config.loading import get_value
from maskdino.system.errors import UserError


class ConfigError(UserError):
    """A value of a configuration makes no sense: the message names the key and what is allowed."""


@dataclass(frozen=True)
class Allowed:
    """What a value may be: a text for messages, and whether a value is allowed."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Allowed:
    """Finite numbers from `low` on."""
    return Allowed(f"at least {low:g}", lambda value: low <= value < math.inf)


def between(low: float, high: float) -> Allowed:
    """Numbers of a closed interval."""
    return Allowed(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


def one_of(*values: Any) -> Allowed:
    """Some values."""
    return Allowed(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


def numbers(of: Allowed, count: int | None = None) -> Allowed:
    """Lists of numbers of a kind."""
    text = f"{count or 'a list of'} numbers, each {of.text}"
    return Allowed(text, lambda values: count in (None, len(values)) and all(map(of.holds, values)))


ABOVE_0 = Allowed("above 0", lambda value: 0 < value < math.inf)
SHARE = between(0, 1)
FINITE = Allowed("finite", lambda value: -math.inf < value < math.inf)
WHOLE = Allowed("whole and at least 0", lambda value: value == value // 1 >= 0)
SIDE = Allowed("whole and at least 1", lambda value: value == value // 1 >= 1)
NAMES = Allowed("a list of names", lambda values: all(isinstance(x, str) for x in values))
FOLDER = Allowed("the path of a folder", lambda value: bool(value) and "\0" not in value)
FORMATS = ("BGR", "RGB", "L", "YUV-BT.601", "HSV", "LAB", "YCbCr")
WEIGHT, COUNT, COUNT_OR_0 = at_least(0), at_least(1), at_least(0)
BELOW_1 = Allowed("at least 0 and below 1", lambda value: 0 <= value < 1)

_MODEL = "MODEL.MASK_DINO."
_WEIGHTS = ("CLASS", "L1", "GIOU", "MASK_BCE", "MASK_DICE")
GROUPS = 32  # channels are normalized in so many groups
RULES: dict[str, Allowed] = {
    f"{_MODEL}NUM_CLASSES": COUNT,
    f"{_MODEL}HIDDEN_DIM": COUNT,
    f"{_MODEL}SIZE_DIVISIBILITY": COUNT_OR_0,
    f"{_MODEL}ENCODER.NUM_LEVELS": COUNT,
    f"{_MODEL}DECODER.NUM_LEVELS": COUNT_OR_0,
    **{
        f"{_MODEL}{part}.{name}": COUNT
        for part in ("ENCODER", "DECODER")
        for name in ("NUM_LAYERS", "NUM_HEADS", "NUM_POINTS", "FEEDFORWARD_DIM")
    },
    f"{_MODEL}QUERY_SELECTION.NUM_QUERIES": COUNT,
    f"{_MODEL}QUERY_SELECTION.MASK_ENHANCED_ANCHORS": one_of("mask2box", "bitmask", "none"),
    f"{_MODEL}QUERY_SELECTION.EMPTY_MASKS": one_of("box", "corner"),
    f"{_MODEL}QUERY_SELECTION.LARGEST_PROPOSALS": one_of("coarsest", "finest"),
    f"{_MODEL}DENOISING.MODE": one_of("boxes_and_masks", "boxes", "off"),
    f"{_MODEL}DENOISING.NUM_QUERIES": COUNT_OR_0,
    f"{_MODEL}DENOISING.LABEL_NOISE": SHARE,
    f"{_MODEL}DENOISING.BOX_NOISE": at_least(0),
    **{f"{_MODEL}MATCHER.{name}_WEIGHT": WEIGHT for name in _WEIGHTS},
    **{f"{_MODEL}LOSS.{name}_WEIGHT": WEIGHT for name in _WEIGHTS},
    f"{_MODEL}LOSS.CLASSIFICATION": one_of("focal", "cross_entropy"),
    f"{_MODEL}LOSS.NO_OBJECT_WEIGHT": WEIGHT,
    f"{_MODEL}LOSS.NUM_POINTS": COUNT,
    f"{_MODEL}LOSS.OVERSAMPLE_RATIO": at_least(1),
    f"{_MODEL}LOSS.IMPORTANCE_RATIO": SHARE,
    f"{_MODEL}RECOMPUTE": one_of("none", "cheap", "all"),
    f"{_MODEL}TEST.DECODER_LAYER": at_least(-1),
    f"{_MODEL}TEST.SCORE_THRESHOLD": SHARE,
    f"{_MODEL}TEST.MASK_LIMIT": Allowed("0, or at least 1", lambda value: value == 0 or value >= 1),
    f"{_MODEL}TEST.PANOPTIC_SCORE_THRESHOLD": SHARE,
    f"{_MODEL}TEST.PANOPTIC_OVERLAP_THRESHOLD": SHARE,
    f"{_MODEL}TEST.TEMPERATURE": ABOVE_0,
    "MODEL.PIXEL_MEAN": numbers(FINITE),
    "MODEL.PIXEL_STD": numbers(ABOVE_0),
    "MODEL.TIMM.DROP_PATH_RATE": BELOW_1,
    **dict.fromkeys(
        (f"INPUT.{name}_SCALE" for name in ("LSJ.MIN", "LSJ.MAX", "MOSAIC.MIN", "MOSAIC.MAX")),
        ABOVE_0,
    ),
    **dict.fromkeys((f"SOLVER.WEIGHT_DECAY{part}" for part in ("", "_NORM", "_EMBED")), WEIGHT),
    **dict.fromkeys(("SOLVER.BASE_LR", "SOLVER.BACKBONE_MULTIPLIER"), WEIGHT),
    **dict.fromkeys(("SOLVER.GAMMA", "SOLVER.WARMUP_FACTOR"), WEIGHT),
    "SOLVER.OPTIMIZER": one_of("ADAMW", "SGD"),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.ACCUMULATION_STEPS": COUNT,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.LAYER_DECAY": Allowed("above 0 and at most 1", lambda value: 0 < value <= 1),
    "SOLVER.MOMENTUM": BELOW_1,
    "SOLVER.STEPS": numbers(WHOLE),
    "SOLVER.WARMUP_ITERS": COUNT_OR_0,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ABOVE_0,
    "SOLVER.EMA.DECAY": BELOW_1,
    "SOLVER.BEST.PATIENCE": COUNT_OR_0,
    "DATALOADER.NUM_WORKERS": COUNT_OR_0,
    **dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST", "INPUT.AUGMENTATIONS"), NAMES),
    **dict.fromkeys(("LOG.WRITERS", "TEST.EVALUATORS", f"{_MODEL}CLASS_NAMES"), NAMES),
    f"{_MODEL}STUFF_CLASSES": NAMES,
    "OUTPUT_DIR": FOLDER,
    "INPUT.FORMAT": one_of(*FORMATS),
    "INPUT.LSJ.SIZE": numbers(SIDE, 2),
    "INPUT.COPY_PASTE.PROBABILITY": SHARE,
    "INPUT.COPY_PASTE.MAX_OBJECTS": COUNT,
    "INPUT.COPY_PASTE.MIN_VISIBLE": SHARE,
    "INPUT.MOSAIC.PROBABILITY": SHARE,
    "INPUT.MOSAIC.MIN_VISIBLE": SHARE,
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": SHARE,
    "INPUT.MIN_SIZE_TEST": COUNT_OR_0,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.EVAL_PERIOD": COUNT_OR_0,
    "TEST.COCO_EVALUATOR": one_of("auto", "pycocotools"),
    "TEST.SLICES.SIZE": Allowed("0, or at least 48", lambda value: value == 0 or value >= 48),
    "TEST.SLICES.OVERLAP": between(0, 0.9),
    "TEST.SLICES.BATCH_SIZE": COUNT,
    "SEED": Allowed("from -1 to 2^63 - 1", lambda value: -1 <= value < 1 << 63),
}


def check_values(cfg: CfgNode) -> None:
    """Checks all values that have a rule; ConfigError, with what is allowed, for others."""
    for key, allowed in RULES.items():
        value = get_value(cfg, key)
        try:
            holds = allowed.holds(value)
        except TypeError:  # a list may hold anything
            holds = False
        if not holds:
            raise ConfigError(f"{key} is {value!r}; it must be {allowed.text}")
    if cfg.TEST.SLICES.SIZE and cfg.TEST.AUG.ENABLED:
        raise ConfigError(
            f"TEST.SLICES.SIZE is {cfg.TEST.SLICES.SIZE}; it must be 0 with TEST.AUG.ENABLED"
        )
    means, stds = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(means) != len(stds):
        raise ConfigError(
            f"MODEL.PIXEL_STD is {stds}; it must have one number for each of MODEL.PIXEL_MEAN, "
            f"{means}"
        )
    _check_model(cfg.MODEL.MASK_DINO)
    for name in ("LSJ", "MOSAIC"):
        scales = cfg.INPUT[name]
        if scales.MIN_SCALE > scales.MAX_SCALE:
            raise ConfigError(
                f"INPUT.{name}.MIN_SCALE is {scales.MIN_SCALE}; it must be at most "
                f"INPUT.{name}.MAX_SCALE, {scales.MAX_SCALE}"
            )


def _check_model(model: CfgNode) -> None:
    for part in ("ENCODER", "DECODER"):
        heads = model[part].NUM_HEADS
        if model.HIDDEN_DIM % heads or model.HIDDEN_DIM % GROUPS:
            raise ConfigError(
                f"{_MODEL}HIDDEN_DIM is {model.HIDDEN_DIM}; it must be a multiple of {GROUPS} "
                f"(groups of its norms) and of "
                f"{_MODEL}{part}.NUM_HEADS, {heads}"
            )
    if model.TEST.DECODER_LAYER > model.DECODER.NUM_LAYERS:
        raise ConfigError(
            f"{_MODEL}TEST.DECODER_LAYER is {model.TEST.DECODER_LAYER}; it must be from -1 to "
            f"{_MODEL}DECODER.NUM_LAYERS, {model.DECODER.NUM_LAYERS}"
        )


def check_training(cfg: CfgNode) -> None:
    """Checks what a training needs besides, or raises a ConfigError."""
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is (); it must name at least one dataset to train on")
    batch, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if batch % steps:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of "
            f"SOLVER.ACCUMULATION_STEPS, {steps}"
        )
    end, steps = cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)
    order = [0, *(step for step in steps if step <= end), end]
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and order != sorted({*order}):
        raise ConfigError(
            f"SOLVER.STEPS is {steps}; its numbers must increase, and lie above 0 and below "
            f"SOLVER.MAX_ITER, {end} (those beyond it count for nothing)"
        )
    if cfg.SOLVER.COMPILE and cfg.SOLVER.CUDA_GRAPHS:
        raise ConfigError("SOLVER.COMPILE and SOLVER.CUDA_GRAPHS are both True; set one to False")
