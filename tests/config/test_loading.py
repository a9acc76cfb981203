"""Configurations that other programs read."""

from __future__ import annotations

from detectron2.config import CfgNode

from maskdino.config import load_config
from maskdino.config.loading import complete_config


def test_keys_that_a_configuration_lacks_have_their_usual_values() -> None:
    whole = load_config(None)
    assert complete_config(whole) is whole
    completed = complete_config(CfgNode({"MODEL": {"DEVICE": "cpu"}}))
    assert completed.MODEL.DEVICE == "cpu"
    assert completed.MODEL.MASK_DINO == whole.MODEL.MASK_DINO
