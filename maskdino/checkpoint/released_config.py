"""Released configurations: what their keys are called here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode

from maskdino.config.loading import flatten, get_value

NODE = "MODEL.MASK_DINO."
# Released key -> our key, or several; values are carried over.
SAME_VALUE = {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": f"{NODE}NUM_CLASSES",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": f"{NODE}HIDDEN_DIM",
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": f"{NODE}ENCODER.FEEDFORWARD_DIM",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": f"{NODE}ENCODER.IN_FEATURES",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": f"{NODE}ENCODER.NUM_POINTS",
    "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": f"{NODE}ENCODER.NUM_LEVELS",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": f"{NODE}ENCODER.NUM_LAYERS",
    "MODEL.MaskDINO.HIDDEN_DIM": f"{NODE}HIDDEN_DIM",
    "MODEL.MaskDINO.SIZE_DIVISIBILITY": f"{NODE}SIZE_DIVISIBILITY",
    "MODEL.MaskDINO.DEC_LAYERS": f"{NODE}DECODER.NUM_LAYERS",
    "MODEL.MaskDINO.DIM_FEEDFORWARD": f"{NODE}DECODER.FEEDFORWARD_DIM",
    "MODEL.MaskDINO.NHEADS": f"{NODE}ENCODER.NUM_HEADS",
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": f"{NODE}QUERY_SELECTION.NUM_QUERIES",
    "MODEL.MaskDINO.TWO_STAGE": f"{NODE}QUERY_SELECTION.ENABLED",
    "MODEL.MaskDINO.DN_NUM": f"{NODE}DENOISING.NUM_QUERIES",
    "MODEL.MaskDINO.COST_CLASS_WEIGHT": f"{NODE}MATCHER.CLASS_WEIGHT",
    "MODEL.MaskDINO.COST_BOX_WEIGHT": f"{NODE}MATCHER.L1_WEIGHT",
    "MODEL.MaskDINO.COST_GIOU_WEIGHT": f"{NODE}MATCHER.GIOU_WEIGHT",
    "MODEL.MaskDINO.COST_MASK_WEIGHT": f"{NODE}MATCHER.MASK_BCE_WEIGHT",
    "MODEL.MaskDINO.COST_DICE_WEIGHT": f"{NODE}MATCHER.MASK_DICE_WEIGHT",
    "MODEL.MaskDINO.CLASS_WEIGHT": f"{NODE}LOSS.CLASS_WEIGHT",
    "MODEL.MaskDINO.BOX_WEIGHT": f"{NODE}LOSS.L1_WEIGHT",
    "MODEL.MaskDINO.GIOU_WEIGHT": f"{NODE}LOSS.GIOU_WEIGHT",
    "MODEL.MaskDINO.MASK_WEIGHT": f"{NODE}LOSS.MASK_BCE_WEIGHT",
    "MODEL.MaskDINO.DICE_WEIGHT": f"{NODE}LOSS.MASK_DICE_WEIGHT",
    "MODEL.MaskDINO.NO_OBJECT_WEIGHT": f"{NODE}LOSS.NO_OBJECT_WEIGHT",
    "MODEL.MaskDINO.DEEP_SUPERVISION": f"{NODE}LOSS.DEEP_SUPERVISION",
    "MODEL.MaskDINO.INITIAL_PRED": f"{NODE}LOSS.SUPERVISE_INITIAL",
    "MODEL.MaskDINO.PANO_BOX_LOSS": f"{NODE}LOSS.DECOUPLE_STUFF_BOXES",
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": f"{NODE}LOSS.NUM_POINTS",
    "MODEL.MaskDINO.OVERSAMPLE_RATIO": f"{NODE}LOSS.OVERSAMPLE_RATIO",
    "MODEL.MaskDINO.IMPORTANCE_SAMPLE_RATIO": f"{NODE}LOSS.IMPORTANCE_RATIO",
    "MODEL.MaskDINO.TEST.INSTANCE_ON": f"{NODE}TEST.INSTANCE_ON",
    "MODEL.MaskDINO.TEST.PANOPTIC_ON": f"{NODE}TEST.PANOPTIC_ON",
    "MODEL.MaskDINO.TEST.SEMANTIC_ON": f"{NODE}TEST.SEMANTIC_ON",
    "MODEL.MaskDINO.TEST.OBJECT_MASK_THRESHOLD": f"{NODE}TEST.PANOPTIC_SCORE_THRESHOLD",
    "MODEL.MaskDINO.TEST.OVERLAP_THRESHOLD": f"{NODE}TEST.PANOPTIC_OVERLAP_THRESHOLD",
    "MODEL.MaskDINO.TEST.PANO_TEMPERATURE": f"{NODE}TEST.TEMPERATURE",
    "MODEL.MaskDINO.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": f"{NODE}TEST.RESIZE_BEFORE_SUM",
    "INPUT.MIN_SCALE": "INPUT.LSJ.MIN_SCALE",
    "INPUT.MAX_SCALE": "INPUT.LSJ.MAX_SCALE",
}
# Released key -> (value -> {our key: value}).
CONVERTED: dict[str, Callable[[Any], dict[str, object]]] = {
    "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": lambda v: {
        f"{NODE}QUERY_SELECTION.LARGEST_PROPOSALS": "finest" if v == "low2high" else "coarsest"
    },
    "MODEL.MaskDINO.DN": lambda v: {
        f"{NODE}DENOISING.MODE": {"seg": "boxes_and_masks", "standard": "boxes", "no": "off"}[v]
    },
    "MODEL.MaskDINO.DN_NOISE_SCALE": lambda v: {
        f"{NODE}DENOISING.LABEL_NOISE": v / 2,
        f"{NODE}DENOISING.BOX_NOISE": v,
    },
    "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": lambda v: {
        f"{NODE}QUERY_SELECTION.MASK_ENHANCED_ANCHORS": v
        if v in ("mask2box", "bitmask")
        else "none"
    },
    "MODEL.MaskDINO.SEMANTIC_CE_LOSS": lambda v: {
        f"{NODE}LOSS.CLASSIFICATION": "cross_entropy" if v else "focal"
    },
    "MODEL.MaskDINO.BOX_LOSS": lambda v: (
        {} if v else {f"{NODE}LOSS.L1_WEIGHT": 0.0, f"{NODE}LOSS.GIOU_WEIGHT": 0.0}
    ),
    "MODEL.MaskDINO.TEST.TEST_FOUCUS_ON_BOX": lambda v: {f"{NODE}TEST.MASK_SCORING": not v},
    "INPUT.IMAGE_SIZE": lambda v: {"INPUT.LSJ.SIZE": [v, v]},
    "INPUT.DATASET_MAPPER_NAME": lambda v: _mapper(v),
}
# What a released configuration means by leaving a key out, where that is not our default.
DEFAULTS: dict[str, object] = {
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 1024,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "high2low",
    "MODEL.MaskDINO.DEC_LAYERS": 6,
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 100,
    "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no",
    "MODEL.MaskDINO.PANO_BOX_LOSS": False,
    "MODEL.MaskDINO.TEST.INSTANCE_ON": False,
    "MODEL.MaskDINO.TEST.SEMANTIC_ON": True,
    "MODEL.MaskDINO.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MaskDINO.TEST.OVERLAP_THRESHOLD": 0.0,
}
# Parts that the released code can switch on but no released model has.
MUST_BE: dict[str, object] = {
    "MODEL.MaskDINO.LEARN_TGT": False,
    "MODEL.MaskDINO.PRE_NORM": False,
    "MODEL.MaskDINO.PRED_CONV": False,
    "MODEL.MaskDINO.ENFORCE_INPUT_PROJ": False,
    "MODEL.MaskDINO.DROPOUT": 0.0,
    "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME": "MaskDINODecoder",
    "MODEL.MaskDINO.TEST.PANO_TRANSFORM_EVAL": True,
    "MODEL.SEM_SEG_HEAD.NAME": "MaskDINOHead",
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MaskDINOEncoder",
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
}
# Released key -> why nothing here stands for it.
NO_MEANING = {
    "Default_loading": "read by nothing",
    "INPUT.SIZE_DIVISIBILITY": "the model pads its batches",
    "MODEL.MaskDINO.ENC_LAYERS": "read by nothing",
    "MODEL.MaskDINO.EVAL_FLAG": "read by nothing",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": "MODEL.MaskDINO.NHEADS is read",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "label maps ignore 255",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": "the encoder's, and the pixel embedding's, have own keys",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": "read by nothing",
    "MODEL.SEM_SEG_HEAD.MASK_DIM": "as MODEL.MASK_DINO.HIDDEN_DIM",
    "MODEL.SEM_SEG_HEAD.NUM_FEATURE_LEVELS": "the number of ENCODER.IN_FEATURES",
    **dict.fromkeys(
        (
            "MODEL.RESNETS.RES4_DILATION",
            "MODEL.RESNETS.RES5_MULTI_GRID",
            "MODEL.RESNETS.STEM_TYPE",
            "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS",
            "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS",
            "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT",
            "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
            "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS",
            "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES",
            "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
            "SOLVER.POLY_LR_CONSTANT_ENDING",
            "SOLVER.POLY_LR_POWER",
        ),
        "of DeepLab",
    ),
}
MISSING = object()  # in place of the value of a key that there is not
MAPPERS = {  # of the released code, by its name -> ours, whether with large-scale jitter
    "coco_instance_lsj": ("instance", True),
    "coco_instance_detr": ("instance", False),
    "coco_panoptic_lsj": ("panoptic", True),
    "mask_former_semantic": ("semantic", False),
    "MaskDINO_semantic": ("semantic", False),
}


def _mapper(name: str) -> dict[str, object]:
    task = next((task for task in ("instance", "panoptic") if task in name), "semantic")
    ours, jitter = MAPPERS.get(name, (task, name.endswith("lsj")))
    return {"INPUT.DATASET_MAPPER_NAME": ours, "INPUT.LSJ.ENABLED": jitter}


def convert_config(released: Mapping[str, object], cfg: CfgNode) -> list[str]:
    """Carries the values of a released configuration into ours.

    Returns:
        What a user should know: keys that have no meaning here, and keys of neither code.

    Raises:
        ValueError: the configuration asks for a part that this project does not have, or a value
            has the wrong type.
    """
    flat = DEFAULTS | flatten(released)
    foreign = []
    # Keys that the conversion sets last, so that they win over those that only carry a value.
    for key, value in sorted(flat.items(), key=lambda item: item[0] in CONVERTED):
        try:
            ours = _ours(key, value, cfg)
            for name, new in ours.items():
                set_value(cfg, name, new)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{key} is {value!r}: {error}") from error
        if not ours and not (key in CONVERTED or key in MUST_BE or key in NO_MEANING):
            foreign.append(key)
    node = cfg.MODEL.MASK_DINO
    node.QUERY_SELECTION.EMPTY_MASKS = "corner"
    # The released matcher is never told of decoupled boxes.
    node.MATCHER.DECOUPLE_STUFF_BOXES = False
    # Cross-entropy is for models that do semantic segmentation and nothing beside it.
    if node.TEST.PANOPTIC_ON or not node.TEST.SEMANTIC_ON:
        node.LOSS.CLASSIFICATION = "focal"
    return _remarks(flat, foreign, node.HIDDEN_DIM)


def _ours(key: str, value: Any, cfg: CfgNode) -> dict[str, object]:
    """Our keys and values for one released key; none for what is left out."""
    if key in MUST_BE:
        if value != MUST_BE[key]:
            raise ValueError(f"only {MUST_BE[key]!r} is supported")
        return {}
    if key in CONVERTED:
        return CONVERTED[key](value)
    if key in SAME_VALUE:
        return {SAME_VALUE[key]: value}
    is_known = get_value(cfg, key, MISSING) is not MISSING
    if key.startswith("MODEL.SWIN.") or (key not in NO_MEANING and is_known):
        return {key: value}
    return {}


def _remarks(flat: Mapping[str, object], foreign: list[str], hidden_dim: int) -> list[str]:
    mask_dim = flat.get("MODEL.SEM_SEG_HEAD.MASK_DIM", hidden_dim)
    if mask_dim != hidden_dim:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.MASK_DIM is {mask_dim!r}: only MODEL.MaskDINO.HIDDEN_DIM, "
            f"{hidden_dim}, is supported"
        )
    remarks = [f"left out, a key of neither code: {key}" for key in foreign]
    mapper = flat.get("INPUT.DATASET_MAPPER_NAME")
    if mapper is not None and mapper not in MAPPERS:
        remarks.append(
            f"INPUT.DATASET_MAPPER_NAME is {mapper!r}, a mapper of neither code: check what stands "
            "for it now"
        )
    without = sorted(NO_MEANING.keys() & flat.keys())
    return remarks + ([f"left out, without meaning here: {', '.join(without)}"] if without else [])


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Sets a dotted key, with yacs' type checks, to which 2 is no float."""
    if key.startswith("MODEL.SWIN."):  # whose keys are open
        cfg.MODEL.SWIN[key.removeprefix("MODEL.SWIN.")] = value
        return
    whole = isinstance(value, int) and isinstance(get_value(cfg, key), float)
    cfg.merge_from_list([key, float(value) if whole else value])
