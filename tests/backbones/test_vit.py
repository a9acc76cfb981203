"""Plain transformers through the simple feature pyramid: outputs, weights, windows, freezing."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode
from torch import nn

from maskdino.backbones import build_backbone
from maskdino.backbones.timm_backbone import TimmBackbone
from maskdino.backbones.vit import PlainViTBackbone, is_plain_vit
from tests.backbones.test_timm_backbone import configuration, pyramid

NARROW = {"embed_dim": 24, "depth": 4, "num_heads": 2}
FAMILIES = [
    "vit_small_patch16_dinov3",  # registers and rotary positions
    "vit_small_patch14_reg4_dinov2",
    "vit_tiny_patch16_224",
    "vit_base_patch32_224",
    "eva02_tiny_patch14_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_224",  # no class token
    "samvit_base_patch16",  # windows and relative positions of its own
]


def narrow(name: str) -> dict[str, Any]:
    """A small model of the same making."""
    if name.startswith("samvit"):
        return {**NARROW, "global_attn_indexes": [1, 3], "window_size": 3, "img_size": 128}
    return NARROW


def vit(name: str, arguments: dict[str, Any] | None = None, **keys: Any) -> PlainViTBackbone:
    """A narrow backbone; `keys` of MODEL.VIT, MODEL.TIMM, or FREEZE_AT."""
    cfg = configuration(name, ARGS=narrow(name) if arguments is None else arguments)
    for key, value in keys.items():
        node = next(n for n in (cfg.MODEL.VIT, cfg.MODEL.TIMM, cfg.MODEL.BACKBONE) if key in n)
        node[key] = value
    backbone = build_backbone(cfg)
    assert isinstance(backbone, PlainViTBackbone)
    return backbone


@pytest.mark.parametrize("name", FAMILIES)
def test_pyramid_and_gradients_of_many_families(name: str) -> None:
    backbone = vit(name, PYRAMID_CHANNELS=16)
    outputs = pyramid(backbone, torch.randn(2, 3, 64, 96))
    assert list(outputs) == ["res2", "res3", "res4", "res5"]
    assert [backbone.output_shape()[f].stride for f in outputs] == [4, 8, 16, 32]
    assert {o.shape[1] for o in outputs.values()} == {16}
    assert backbone.size_divisibility == 32
    sum(o.square().sum() for o in outputs.values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_only_transformers_of_patches_are_plain() -> None:
    assert is_plain_vit("vit_small_patch16_dinov3.lvd1689m")
    for name in ("swin_tiny_patch4_window7_224", "convnext_tiny.dinov3_lvd1689m", "resnet50"):
        assert not is_plain_vit(name)
    assert isinstance(build_backbone(configuration("resnet18")), TimmBackbone)


def test_batch_is_as_single_images_and_sides_may_be_any() -> None:
    backbone = vit("vit_small_patch16_dinov3").eval()
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        together = backbone(images)
        alone = [backbone(image[None]) for image in images]
    for feature, output in together.items():
        torch.testing.assert_close(output, torch.cat([a[feature] for a in alone]))
    assert together["res4"].shape[-2:] == (5, 6)  # 80 x 96, filled


def test_pretrained_weights_of_other_patches_are_resampled(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    donor = timm.create_model(name, num_classes=0, img_size=70, **NARROW)
    torch.save({"model": donor.state_dict()}, tmp_path / "weights.pth")
    backbone = vit(
        name, WEIGHTS=str(tmp_path / "weights.pth"), arguments={**NARROW, "img_size": 80}
    )
    ours, theirs = backbone.body.model.state_dict(), donor.state_dict()
    assert torch.equal(ours["blocks.2.attn.qkv.weight"], theirs["blocks.2.attn.qkv.weight"])
    assert torch.equal(ours["pos_embed"], theirs["pos_embed"])  # 5 x 5 in both
    # A smooth image and its enlargement give about the same tokens.
    smooth = nn.functional.interpolate(torch.randn(1, 3, 3, 3), (70, 70), mode="bicubic")
    enlarged = nn.functional.interpolate(smooth, (80, 80), mode="bicubic")
    expected, tokens = donor.patch_embed(smooth), backbone.body.model.patch_embed(enlarged)
    error = (
        (tokens.flatten(1, 2) - expected).norm() / expected.norm()
        if tokens.ndim == 4
        else ((tokens - expected).norm() / expected.norm())
    )
    assert error < 0.05


def test_default_grid_of_positions_is_the_learned_one() -> None:
    backbone = vit("vit_small_patch14_dinov2")
    assert backbone.body.model.pos_embed.shape[1] == 1 + 37 * 37


def test_weights_of_another_model_and_unreadable_files(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), other)
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.WEIGHTS: .* \d+ missing"):
        vit("vit_tiny_patch16_224", WEIGHTS=str(other))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for file in ("broken.pth", "missing.pth", "missing.safetensors"):
        with pytest.raises(ValueError, match=rf"MODEL\.TIMM\.WEIGHTS: .*{file} holds no weights"):
            vit("vit_tiny_patch16_224", WEIGHTS=str(tmp_path / file))


def slow_windows(tokens: torch.Tensor, block: nn.Module, size: int, prefix: int) -> torch.Tensor:
    """One image's tokens (T + h x w, C) through a block, window by window; h, w multiples of s."""
    height, width = 4, 6
    result = tokens.clone()
    prefixes = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            inside = [
                prefix + row * width + column
                for row in range(top, top + size)
                for column in range(left, left + size)
            ]
            index = [*range(prefix), *inside]
            output = block(tokens[index][None])[0]
            result[inside] = output[prefix:]
            prefixes.append(output[:prefix])
    result[:prefix] = torch.stack(prefixes).mean(dim=0)
    return result


def test_windowed_blocks_see_their_window_alone() -> None:
    name = "vit_small_patch14_reg4_dinov2"
    plain, windowed = vit(name).eval(), vit(name, WINDOW_SIZE=2, GLOBAL_BLOCKS=[3]).eval()
    windowed.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 96)
    model = plain.body.model
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))[0]
        for block in model.blocks[:3]:
            tokens = slow_windows(tokens, block, 2, model.num_prefix_tokens)
        tokens = model.blocks[3](tokens[None])[:, model.num_prefix_tokens :]
        expected = plain.pyramid(tokens.unflatten(1, (4, 6)).permute(0, 3, 1, 2))
        for feature, output in windowed(images).items():
            torch.testing.assert_close(output, expected[feature], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"])
def test_one_window_over_the_image_changes_nothing(name: str) -> None:
    plain, windowed = vit(name).eval(), vit(name, WINDOW_SIZE=4).eval()
    windowed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain(images)
        for feature, output in windowed(images).items():
            torch.testing.assert_close(output, expected[feature])
        assert windowed(torch.randn(1, 3, 32, 96))["res4"].shape[-2:] == (2, 6)


def test_windows_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="within the 4 blocks"):
        vit("vit_tiny_patch16_224", WINDOW_SIZE=2, GLOBAL_BLOCKS=[4])
    with pytest.raises(ValueError, match=r"windows of its own"):
        vit("samvit_base_patch16", WINDOW_SIZE=2)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "samvit_base_patch16"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    window = {} if name.startswith("samvit") else {"WINDOW_SIZE": 2}
    plain, recomputing = vit(name, **window), vit(name, ACTIVATION_CHECKPOINT=True, **window)
    recomputing.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 96)
    for backbone in (plain, recomputing):
        sum(o.square().sum() for o in backbone.train()(images).values()).backward()
    for (key, ours), theirs in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key)


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, 0), (1, 0), (2, 1), (3, 2), (5, 4)])
def test_freezing_by_quarters(freeze_at: int, frozen: int) -> None:
    backbone = vit("vit_small_patch14_reg4_dinov2", FREEZE_AT=freeze_at)
    model = backbone.body.model
    assert model.patch_embed.proj.weight.requires_grad == (freeze_at == 0)
    assert model.pos_embed.requires_grad == (freeze_at == 0)
    for index, block in enumerate(model.blocks):
        assert {p.requires_grad for p in block.parameters()} == {index >= frozen}
    assert all(p.requires_grad for p in backbone.pyramid.parameters())
    with pytest.raises(ValueError, match="FREEZE_AT must be"):
        vit("vit_tiny_patch16_224", FREEZE_AT=6)


def test_depths_count_from_the_pyramid() -> None:
    backbone = vit("vit_small_patch16_dinov3")
    depths = backbone.depths()
    names = {name for name, _ in backbone.named_parameters()}
    assert set(depths) == {name for name in names if name.startswith("body.")}
    assert {d for n, d in depths.items() if "blocks" not in n} == {5}
    assert [depths[f"body.model.blocks.{i}.attn.proj.weight"] for i in range(4)] == [4, 3, 2, 1]


def test_arguments_that_timm_refuses() -> None:
    cfg = configuration("vit_tiny_patch16_224", ARGS=CfgNode({"no_such": 1}))
    with pytest.raises(ValueError, match="no_such"):
        build_backbone(cfg)


def test_weights_of_detectron2s_vitdet(tmp_path: Path) -> None:
    vitdet = pytest.importorskip(
        "detectron2.modeling.backbone.vit", reason="only newer releases of detectron2 have ViTDet"
    )
    donor = vitdet.ViT(
        img_size=128,
        embed_dim=24,
        depth=4,
        num_heads=2,
        window_size=3,
        window_block_indexes=(0, 2),
        use_rel_pos=True,
        out_feature="last",
    ).eval()
    for parameter in donor.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = {f"backbone.net.{name}": tensor for name, tensor in donor.state_dict().items()}
    torch.save({"model": state}, tmp_path / "vitdet.pth")
    backbone = vit("samvit_base_patch16", WEIGHTS=str(tmp_path / "vitdet.pth")).eval()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(backbone.body(images)[-1], donor(images)["last"])


def test_vitdet_is_named_where_it_does_not_fit(tmp_path: Path) -> None:
    torch.save(
        {"net.pos_embed": torch.zeros(1, 5, 24), "net.blocks.0.norm1.weight": torch.zeros(24)},
        tmp_path / "vitdet.pth",
    )
    with pytest.raises(ValueError, match="ViTDet, which fit timm's samvit_base_patch16"):
        vit("vit_tiny_patch16_224", WEIGHTS=str(tmp_path / "vitdet.pth"))
