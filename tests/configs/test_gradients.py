"""Every shipped configuration trains all that it calls trainable, whatever a batch holds.

Several processes wait for the gradient of each trainable parameter: one that gets none ends the
training at the second iteration.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from maskdino.config import load_config
from maskdino.model import MaskDINO
from tests.helpers import drawn_batch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = [
    str(path.relative_to(CONFIGS))
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if not path.name.startswith("Base-")
]
SIZE = (64, 64)
# Objects of each image, and whether they have masks.
BATCHES = (((3, 2), True), ((0, 0), True), ((0, 3), True), ((2, 1), False))
SWIN = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 6]}


def load(name: str) -> CfgNode:
    """A shipped configuration for a CPU, without weights, that compares masks at few points."""
    cfg = load_config(str(CONFIGS / name))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "cpu", "", False
    cfg.MODEL.MASK_DINO.LOSS.NUM_POINTS = 64
    return cfg


def narrow(cfg: CfgNode) -> None:
    """Makes a model narrow, and a Swin shallow (in place); all kinds of modules stay."""
    node = cfg.MODEL.MASK_DINO
    node.HIDDEN_DIM = node.ENCODER.FEEDFORWARD_DIM = node.DECODER.FEEDFORWARD_DIM = 32
    node.ENCODER.NUM_LAYERS = min(node.ENCODER.NUM_LAYERS, 2)
    node.QUERY_SELECTION.NUM_QUERIES, node.DENOISING.NUM_QUERIES = 20, 12
    resnets = cfg.MODEL.RESNETS
    resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 8, 32, 8
    if cfg.MODEL.BACKBONE.NAME.startswith("swin"):
        cfg.MODEL.TIMM.ARGS.update(SWIN)
    elif cfg.MODEL.BACKBONE.NAME.startswith("vit_"):
        cfg.MODEL.TIMM.ARGS.update({"embed_dim": 24, "depth": 4, "num_heads": 2})
    elif cfg.MODEL.BACKBONE.NAME == "resnet10t":
        cfg.MODEL.TIMM.ARGS.update({"channels": [8, 16, 32, 64]})


@cache
def without_gradient(model_node: str) -> tuple[tuple[str, ...], ...]:
    """For each batch, the trainable parameters without a gradient; equal models are asked once."""
    cfg = load_config()
    cfg.MODEL = CfgNode.load_cfg(model_node)
    torch.manual_seed(0)
    model, found = MaskDINO(cfg).train(), []
    for counts, masks in BATCHES:
        model.zero_grad(set_to_none=True)
        batch = drawn_batch([SIZE] * 2, counts, masks=cfg.MODEL.MASK_DINO.MASK_ON)
        for image in batch:
            if not masks:  # as our mappers say that an object has a box alone
                count = len(image["instances"])
                image["instances"].gt_has_mask = torch.zeros(count, dtype=torch.bool)
            image["instances"].gt_classes %= cfg.MODEL.MASK_DINO.NUM_CLASSES
        torch.stack(list(model(batch).values())).sum().backward()
        found.append(
            tuple(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)
        )
    return tuple(found)


@pytest.mark.parametrize("name", LEAVES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    cfg = load(name)
    narrow(cfg)
    assert without_gradient(cfg.MODEL.dump()) == ((),) * len(BATCHES)
