"""Released parameter lists: every tensor has its place, none is left over."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from torch import Tensor

from maskdino.checkpoint.released_config import convert_config, set_value
from maskdino.checkpoint.released_weights import (
    ReleasedStructure,
    convert_weights,
    is_released,
    our_names,
)
from maskdino.config import load_config
from maskdino.model import MaskDINO
from tests.conftest import load_module

# Parameter list -> width of the feed-forward networks of its encoder, scales.
LISTS = {
    "r50_300q_hid1024_instance_maskenhanced": (1024, 3),
    "r50_300q_hid2048_3sd1_instance_maskenhanced": (2048, 4),
    "r50_300q_hid2048_3sd1_panoptic": (2048, 4),
    "swinl_300q_hid2048_instance": (2048, 5),
    "r50_100q_celoss_hid1024_3s_semantic_ade20k": (1024, 3),
    "r50_100q_celoss_hid1024_3s_semantic_cityscapes": (1024, 3),
}
PREDICTOR = "sem_seg_head.predictor."


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a parameter list."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    return {name: tuple(ast.literal_eval(shape)) for name, shape, *_ in lines}


def released_case_weights(parity: Path, case: str) -> dict[str, Tensor]:
    """Released names and values of a worked case."""
    maker = load_module(parity / "make_weights.py")
    arrays = maker.released_weights(str(parity / f"{case}_parameters.tsv"))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def released_case_cfg(parity: Path, case: str) -> CfgNode:
    """Our configuration of a worked case."""
    cfg = load_config()
    convert_config(yaml.safe_load((parity / f"{case}_config.yaml").read_text()), cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def cfg_of_list(name: str, shapes: dict[str, tuple[int, ...]]) -> CfgNode:
    """A configuration whose values come from the shapes, and the backbone from the name."""
    cfg = load_config()
    cfg.MODEL.DEVICE = "cpu"
    if name.startswith("swinl"):
        cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
        cfg.MODEL.SWIN.update(
            {
                "EMBED_DIM": 192,
                "DEPTHS": [2, 2, 18, 2],
                "NUM_HEADS": [6, 12, 24, 48],
                "WINDOW_SIZE": 12,
            }
        )
        cfg.MODEL.MASK_DINO.ENCODER.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if "cityscapes" in name:
        cfg.MODEL.RESNETS.NORM = "SyncBN"
    for key, value in ReleasedStructure.from_shapes(shapes).config_values(shapes).items():
        set_value(cfg, key, value)
    return cfg


@pytest.mark.parametrize("name", LISTS)
def test_every_tensor_finds_its_place(name: str, parity: Path) -> None:
    """Names and shapes of the file and of the model are the same set; nothing is left over."""
    shapes = shapes_of(parity / "released" / f"{name}.tsv")
    assert is_released(shapes)
    cfg = cfg_of_list(name, shapes)
    node = cfg.MODEL.MASK_DINO
    structure = (node.ENCODER.FEEDFORWARD_DIM, node.ENCODER.NUM_LEVELS)
    assert structure == LISTS[name]
    semantic = "celoss" in name
    assert (node.LOSS.CLASSIFICATION == "cross_entropy") == semantic
    assert bool(node.QUERY_SELECTION.ENABLED) != semantic
    with torch.device("meta"):
        model = MaskDINO(cfg)
    released = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    # Copies of one module are compared by value, which tensors without memory do not have.
    names = our_names(released, ReleasedStructure.from_shapes(shapes))
    copies = set(names) - set({ours: k for k, ours in names.items()}.values())
    assert all("bbox_embed" in k or k.endswith(("norm.weight", "norm.bias")) for k in copies)
    converted = convert_weights({k: x for k, x in released.items() if k not in copies}, 8)
    expected = {
        k: tuple(x.shape)
        for k, x in model.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    found = {
        k: tuple(x.shape) for k, x in converted.items() if not k.endswith("num_batches_tracked")
    }
    assert found == expected


@pytest.mark.parametrize("case", ["instance", "semantic_ce", "swin"])
def test_converted_cases_leave_nothing(case: str, parity: Path) -> None:
    weights = released_case_weights(parity, case)
    converted = convert_weights(weights, 8)
    model = MaskDINO(released_case_cfg(parity, case))
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all(k.endswith(("num_batches_tracked", "relative_position_index")) for k in missing)


@pytest.mark.parametrize(("case", "coarsest_first"), [("instance", False), ("semantic_ce", True)])
def test_levels_are_put_in_order(case: str, coarsest_first: bool, parity: Path) -> None:
    """Finest first: the encoder's tensors of one order, the decoder's of the other, are turned."""
    weights = released_case_weights(parity, case)
    structure = ReleasedStructure.from_shapes({k: tuple(x.shape) for k, x in weights.items()})
    assert structure.coarsest_first == coarsest_first
    converted = convert_weights(weights, 8)
    level_embed = weights["sem_seg_head.pixel_decoder.transformer.level_embed"]
    turned = level_embed.flip(0) if coarsest_first else level_embed
    assert torch.equal(converted["encoder.level_embed"], turned)
    channels = [
        converted[f"encoder.input_proj.{i}.0.weight"].shape[1]
        for i in range(structure.num_features)
    ]
    assert channels == sorted(channels)
    for part, released, turn in (
        ("encoder", "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn", True),
        ("decoder", f"{PREDICTOR}decoder.layers.0.cross_attn", False),
    ):
        inner = released.rsplit(".", 1)[1]
        for kind, numbers in (("attention_weights", 1), ("sampling_offsets", 2)):
            theirs = weights[f"{released}.{kind}.bias"]
            ours = converted[f"{part}.layers.0.{inner}.{kind}.bias"]
            levels = structure.num_levels
            theirs, ours = (x.reshape(8, levels, 4, numbers) for x in (theirs, ours))
            for level in range(levels):
                other = levels - 1 - level if turn == coarsest_first else level
                assert torch.equal(ours[:, level], theirs[:, other]), (part, kind, level)


def test_copies_must_agree(parity: Path) -> None:
    weights = released_case_weights(parity, "instance")
    name = f"{PREDICTOR}bbox_embed.1.layers.0.bias"
    weights[name] = weights[name] + 1
    with pytest.raises(ValueError, match="differs from the other copies of heads.box_head"):
        convert_weights(weights, 8)


def test_unknown_tensors_are_named(parity: Path) -> None:
    weights = released_case_weights(parity, "instance")
    weights[f"{PREDICTOR}surprise.weight"] = torch.zeros(1)
    with pytest.raises(KeyError, match="surprise.weight"):
        convert_weights(weights, 8)
    assert not is_released({"heads.class_head.weight": None})
    with pytest.raises(KeyError, match="no sem_seg_head.pixel_decoder.transformer.level_embed"):
        ReleasedStructure.from_shapes({f"{PREDICTOR}class_embed.weight": (80, 256)})
