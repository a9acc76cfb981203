"""Released configurations: each key has its place."""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode

from maskdino.checkpoint.released_config import convert_config
from maskdino.config import load_config


def converted(**released: object) -> CfgNode:
    """Our configuration from released keys, "__" for "."."""
    nested: dict = {}
    for key, value in released.items():
        *path, last = key.split("__")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    cfg = load_config()
    convert_config(nested, cfg)
    return cfg


def test_released_keys_become_ours() -> None:
    node = converted(
        MODEL__SEM_SEG_HEAD__FEATURE_ORDER="low2high",
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=133,
        MODEL__MaskDINO__DN="standard",
        MODEL__MaskDINO__DN_NOISE_SCALE=0.6,
        MODEL__MaskDINO__INITIALIZE_BOX_TYPE="bitmask",
        MODEL__MaskDINO__NHEADS=4,
        MODEL__MaskDINO__PANO_BOX_LOSS=True,
        MODEL__MaskDINO__TEST__PANOPTIC_ON=True,
        MODEL__MaskDINO__BOX_WEIGHT=3,
    ).MODEL.MASK_DINO
    assert node.NUM_CLASSES == 133 and node.QUERY_SELECTION.LARGEST_PROPOSALS == "finest"
    assert node.DENOISING.MODE == "boxes"
    noise = [node.DENOISING.LABEL_NOISE, node.DENOISING.BOX_NOISE]
    assert noise == pytest.approx([0.3, 0.6])
    assert node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS == "bitmask"
    assert node.LOSS.DECOUPLE_STUFF_BOXES
    assert node.ENCODER.NUM_HEADS == 4 and node.DECODER.NUM_HEADS == 8
    assert not node.MATCHER.DECOUPLE_STUFF_BOXES  # the released matcher is never told
    assert node.TEST.PANOPTIC_ON and node.LOSS.L1_WEIGHT == 3.0


def test_defaults_of_released_keys() -> None:
    node = converted(MODEL__MaskDINO__INITIALIZE_BOX_TYPE="no", MODEL__MaskDINO__DN="no")
    assert node.MODEL.MASK_DINO.QUERY_SELECTION.MASK_ENHANCED_ANCHORS == "none"
    assert node.MODEL.MASK_DINO.DENOISING.MODE == "off"
    node = converted(MODEL__MaskDINO__BOX_LOSS=False, MODEL__MaskDINO__BOX_WEIGHT=5.0)
    assert node.MODEL.MASK_DINO.LOSS.L1_WEIGHT == 0 and node.MODEL.MASK_DINO.LOSS.GIOU_WEIGHT == 0


def test_a_released_key_that_is_left_out_has_its_released_default() -> None:
    node = converted(MODEL__SEM_SEG_HEAD__NUM_CLASSES=5).MODEL.MASK_DINO
    assert node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS == "none"
    assert node.QUERY_SELECTION.NUM_QUERIES == 100 and node.DECODER.NUM_LAYERS == 6
    assert not node.LOSS.DECOUPLE_STUFF_BOXES
    assert node.TEST.SEMANTIC_ON and not node.TEST.INSTANCE_ON


@pytest.mark.parametrize(
    ("tasks", "loss"),
    [
        ({"SEMANTIC_ON": True, "PANOPTIC_ON": False}, "cross_entropy"),
        ({"SEMANTIC_ON": True, "PANOPTIC_ON": True}, "focal"),
        ({"SEMANTIC_ON": False, "INSTANCE_ON": True}, "focal"),
    ],
)
def test_cross_entropy_is_for_semantic_models_alone(tasks: dict[str, bool], loss: str) -> None:
    keys = {f"MODEL__MaskDINO__TEST__{name}": on for name, on in tasks.items()}
    node = converted(MODEL__MaskDINO__SEMANTIC_CE_LOSS=True, **keys).MODEL.MASK_DINO
    assert loss == node.LOSS.CLASSIFICATION


def test_unsupported_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="PRE_NORM is True: only False"):
        converted(MODEL__MaskDINO__PRE_NORM=True)
