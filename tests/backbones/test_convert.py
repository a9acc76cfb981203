"""Weight files of Swin and timm, onto the adapter."""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from maskdino.backbones import TimmBackbone, build_backbone, convert_backbone, swin_rules
from maskdino.backbones.convert import is_unused_in_swin
from maskdino.backbones.swin import swin_arguments
from maskdino.config import add_maskdino_config

SWIN = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4]}


def backbone_of(name: str, output_norm: bool = False, **arguments: object) -> TimmBackbone:
    cfg = get_cfg()
    add_maskdino_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.TIMM.OUTPUT_NORM = output_norm
    cfg.MODEL.TIMM.ARGS = CfgNode(arguments)
    return build_backbone(cfg).eval()


def as_published(timm_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's Swin classifier in the names, and with the tables, of the files of Swin's authors."""
    published = {}
    for name, tensor in timm_weights.items():
        name = re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name)
        published[name.replace("head.fc.", "head.")] = tensor
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(
        49, 49, dtype=torch.long
    )
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return published


@pytest.mark.parametrize("name", ["swin_large_patch4_window12_384"])
def test_every_tensor_of_the_released_swin_l_has_its_place(parity: Path, name: str) -> None:
    lines = (parity / "released" / "swinl_300q_hid2048_instance.tsv").read_text()
    rows = [line.split("\t") for line in lines.splitlines() if line.startswith("backbone.")]
    released = {row[0].removeprefix("backbone."): ast.literal_eval(row[1]) for row in rows}
    with torch.device("meta"):
        ours = backbone_of(name, output_norm=True).state_dict()

    rules = swin_rules(released)
    unused = set(released) - set(rules)
    assert all(n.endswith("relative_position_index") and is_unused_in_swin(n) for n in unused)
    assert {rules[n]: released[n] for n in rules} == {n: tuple(t.shape) for n, t in ours.items()}
    assert len(set(rules.values())) == len(rules)


def test_published_swin_file_gives_timms_features() -> None:
    classifier = timm.create_model(SWIN, **SMALL, **swin_arguments(SWIN)).eval()
    backbone = backbone_of(SWIN, **SMALL)
    checkpoint = {"model": as_published(classifier.state_dict())}
    backbone.load_state_dict(convert_backbone(checkpoint, backbone))
    images = torch.randn(1, 3, 224, 224)  # sizes that windows divide
    expected = classifier.forward_intermediates(images, intermediates_only=True)
    for output, want in zip(backbone(images).values(), expected, strict=True):
        torch.testing.assert_close(output, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv2_035", SWIN])
def test_timm_state_dict_gives_timms_features(name: str) -> None:
    arguments = SMALL if name == SWIN else {}
    classifier = timm.create_model(name, **arguments, **swin_arguments(name)).eval()
    backbone = backbone_of(name, **arguments)
    backbone.load_state_dict(convert_backbone(classifier.state_dict(), backbone))
    images = torch.randn(1, 3, 224, 224)  # sizes that windows divide
    expected = classifier.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(backbone(images)["res5"], expected[-1], atol=1e-5, rtol=1e-5)


def test_detector_checkpoint_and_new_output_norms() -> None:
    source = backbone_of(SWIN, **SMALL)
    published = as_published(timm.create_model(SWIN, **SMALL).state_dict())
    detector = {f"backbone.{n}": t for n, t in published.items()} | {"head.weight": torch.zeros(1)}
    target = backbone_of(SWIN, output_norm=True, **SMALL)
    converted = convert_backbone({"state_dict": {"model": detector}}, target)
    assert set(converted) == set(source.state_dict())
    missing, unexpected = target.load_state_dict(converted, strict=False)
    assert all(name.startswith("norms.") for name in missing)
    assert unexpected == []


def test_bias_tables_of_another_window_are_interpolated() -> None:
    published = as_published(timm.create_model(SWIN, **SMALL).state_dict())
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    published[name] = torch.full_like(published[name], 0.25)
    backbone = backbone_of(SWIN, window_size=12, **SMALL)
    table = convert_backbone(published, backbone)["body." + name.replace(".", "_", 1)]
    assert table.shape == (23 * 23, 1)
    torch.testing.assert_close(table, torch.full_like(table, 0.25))


def test_misfits_are_named() -> None:
    backbone = backbone_of(SWIN, **SMALL)
    published = as_published(timm.create_model(SWIN, **SMALL).state_dict())
    del published["patch_embed.proj.bias"]
    published["layers.3.blocks.9.norm1.bias"] = torch.zeros(96)
    published["patch_embed.norm.bias"] = torch.zeros(13)
    with pytest.raises(ValueError, match="does not fit") as error:
        convert_backbone(published, backbone)
    message = str(error.value)
    assert "1 missing (body.patch_embed.proj.bias)" in message
    assert "1 left over (body.layers_3.blocks.9.norm1.bias)" in message
    assert "body.patch_embed.norm.bias (13,) instead of (12,)" in message
    with pytest.raises(ValueError, match="'stages.0.weight'"):
        swin_rules(["layers.0.blocks.0.norm1.weight", "stages.0.weight"])


def test_an_average_of_weights_is_preferred() -> None:
    backbone = backbone_of("resnet10t")
    own = timm.create_model("resnet10t").state_dict()
    average = {name: torch.full_like(value, 3) for name, value in own.items()}
    for content in ({"state_dict": own, "state_dict_ema": average}, {"model_ema": average, **own}):
        converted = convert_backbone(content, backbone)
        assert all((value == 3).all() for value in converted.values())
    converted = convert_backbone({"state_dict": own, "model_ema": None}, backbone)
    assert converted["body.conv1.0.weight"].equal(own["conv1.0.weight"])


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {0: torch.ones(1)}, {"model": {"a": "b"}}])
def test_what_holds_no_weights_is_refused(content: dict) -> None:
    with pytest.raises(ValueError, match="holds no weights, but (nothing|epoch|0|a)$"):
        convert_backbone(content, backbone_of("resnet10t"))
