"""Whole models on plain transformers: training, results of every task, export."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from maskdino.config import load_config
from maskdino.engine.solver import build_optimizer
from maskdino.model import MaskDINO
from tests.helpers import drawn_batch, tiny_cfg

NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def config(name: str = "vit_small_patch16_dinov3", **overrides: object) -> CfgNode:
    cfg = tiny_cfg(ENCODER__NUM_LEVELS=3, DECODER__NUM_LAYERS=1, **overrides)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.TIMM.ARGS = CfgNode(NARROW)
    cfg.MODEL.VIT.PYRAMID_CHANNELS = 16
    cfg.MODEL.VIT.WINDOW_SIZE, cfg.MODEL.VIT.GLOBAL_BLOCKS = 2, [-1]
    return cfg


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_every_parameter_learns(counts: tuple[int, int]) -> None:
    model = MaskDINO(config()).train()
    losses = model(drawn_batch([(60, 90), (64, 64)], counts))
    sum(losses.values()).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []


@pytest.mark.parametrize("task", ["INSTANCE", "PANOPTIC", "SEMANTIC"])
@torch.no_grad()
def test_results_of_every_task(task: str) -> None:
    switches = {f"TEST__{t}_ON": t == task for t in ("INSTANCE", "PANOPTIC", "SEMANTIC")}
    model = MaskDINO(config("vit_small_patch14_reg4_dinov2", **switches)).eval()
    results = model(drawn_batch([(60, 90), (64, 64)], (0, 0)))
    key = {"INSTANCE": "instances", "PANOPTIC": "panoptic_seg", "SEMANTIC": "sem_seg"}[task]
    shapes = {
        "INSTANCE": lambda r: r.pred_masks.shape[1:],
        "PANOPTIC": lambda r: r[0].shape,
        "SEMANTIC": lambda r: r.shape[1:],
    }
    assert [tuple(shapes[task](result[key])) for result in results] == [(60, 90), (64, 64)]


def test_rates_decay_by_layer() -> None:
    cfg = config()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.SOLVER.LAYER_DECAY = 1.0, 0.5, 0.1
    model = MaskDINO(cfg)
    rates = {
        parameter: group["lr"]
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    trunk = model.backbone.body.model
    assert rates[trunk.patch_embed.proj.weight] == pytest.approx(0.5e-3)
    assert rates[trunk.blocks[0].mlp.fc1.weight] == pytest.approx(0.5e-2)
    assert rates[trunk.blocks[1].mlp.fc1.weight] == pytest.approx(0.5e-1)
    assert {rates[p] for p in model.backbone.pyramid.parameters()} == {0.5}
    assert {rates[p] for p in model.decoder.parameters()} == {1.0}


def test_decay_by_layer_needs_a_transformer() -> None:
    cfg = load_config(None, ["SOLVER.LAYER_DECAY", 0.5, "MODEL.DEVICE", "cpu"])
    with pytest.raises(ValueError, match=r"SOLVER\.LAYER_DECAY is 0\.5, but the backbone"):
        build_optimizer(cfg, torch.nn.Linear(2, 2))
    cfg.SOLVER.LAYER_DECAY = 0.0
    with pytest.raises(ValueError, match=r"SOLVER\.LAYER_DECAY must be above 0"):
        build_optimizer(cfg, torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_export_computes_what_the_model_computes(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is optional, see requirements.txt")
    from maskdino.cli import export

    cfg = config()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    model = MaskDINO(cfg).eval()
    for head in (model.heads.class_head, model.heads.box_head.layers[-1]):
        torch.nn.init.normal_(head.weight, std=0.3)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    words = [
        "--config-file",
        str(tmp_path / "config.yaml"),
        "--images",
        str(tmp_path / "noise.png"),
    ]
    words += ["--output", str(tmp_path / "model.onnx"), "--size", "64", "96"]
    # The command compares the written file with the model, and fails where they differ.
    export.main([*words, "--opts", "MODEL.WEIGHTS", str(tmp_path / "weights.pth")])
    assert (tmp_path / "model.onnx").is_file()
