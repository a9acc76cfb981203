"""The command that converts ImageNet weights of a backbone."""

from pathlib import Path

import pytest
import timm
import torch
from detectron2.modeling import build_backbone
from torch import nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.cli import convert_backbone
from maskdino.config import load_config

CONFIG = """
MODEL:
  BACKBONE: {NAME: swin_tiny_patch4_window7_224, FREEZE_AT: 0}
  TIMM:
    PRETRAINED: True
    OUTPUT_NORM: True
    ARGS: {embed_dim: 12, depths: [2, 2, 2, 2], num_heads: [1, 2, 3, 4]}
"""


class Detector(nn.Module):
    """Stands for a detector: a backbone and one part that no ImageNet file has."""

    def __init__(self, config_file: Path) -> None:
        super().__init__()
        cfg = load_config(str(config_file), ["MODEL.TIMM.PRETRAINED", "False"])
        cfg.MODEL.TIMM.NAME = cfg.MODEL.BACKBONE.NAME
        cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
        self.backbone = build_backbone(cfg)
        self.head = nn.Linear(2, 2)


def test_the_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    source.write_bytes(b"weights")
    with pytest.raises(SystemExit, match=f"^error: {source} is the file that is read: give"):
        convert_backbone.main([str(source), str(source), "--config-file", "swin.yaml"])
    assert source.read_bytes() == b"weights"


def test_converted_weights_load_into_a_detector(tmp_path: Path) -> None:
    config_file, source, target = (tmp_path / n for n in ("swin.yaml", "in.pth", "out.pth"))
    config_file.write_text(CONFIG)
    arguments = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)}
    classifier = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    torch.save({"model": classifier.state_dict()}, source)
    words = [source, target, "--config-file", config_file]
    convert_backbone.main([str(word) for word in words])

    detector = Detector(config_file)
    MaskDINOCheckpointer(detector).load(str(target))
    expected = classifier.layers[3].blocks[1].mlp.fc2.weight
    assert detector.backbone.body.layers_3.blocks[1].mlp.fc2.weight.equal(expected)
    assert detector.backbone.norms.res5.weight.equal(torch.ones(96))
