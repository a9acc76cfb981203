"""Swin on images of any size, against a slow computation that knows neither windows nor rolling."""

from pathlib import Path

import pytest
import timm
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from torch import Tensor
from torch.nn import functional as F

from maskdino.backbones import build_backbone, convert_swin
from maskdino.backbones.swin import SwinBlock, SwinV2Block, pad_before_shift
from maskdino.config import add_maskdino_config
from maskdino.export.trace import traces_any_size
from tests.conftest import load_module


def released_swin(parity: Path) -> tuple[CfgNode, dict[str, Tensor]]:
    """The small Swin of the worked cases: configuration, and weights by name after "backbone."."""
    cfg = get_cfg()
    add_maskdino_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    released = yaml.safe_load((parity / "swin_config.yaml").read_text())
    cfg.MODEL.SWIN.update(released["MODEL"]["SWIN"])
    make_weights = load_module(parity / "make_weights.py")
    arrays = make_weights.released_weights(str(parity / "swin_parameters.tsv"))
    prefix = "backbone."
    weights = {
        n[len(prefix) :]: torch.from_numpy(a) for n, a in arrays.items() if n.startswith(prefix)
    }
    return cfg, weights


class SlowSwin:
    """A released Swin on one image, straight from the definition, in float64.

    Each token may attend to all tokens of the padded map; who may see whom, and the bias between
    two tokens, follow from their coordinates alone.
    """

    def __init__(self, weights: dict[str, Tensor], heads: list[int], window: int) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.heads = heads
        self.window = window

    def __call__(self, image: Tensor) -> list[Tensor]:
        """Outputs (C, H, W) of the four stages for an image (3, H, W)."""
        height, width = image.shape[1:]
        image = F.pad(image.double(), (0, -width % 4, 0, -height % 4))
        kernel, bias = (
            self.weights["patch_embed.proj.weight"],
            self.weights["patch_embed.proj.bias"],
        )
        x = F.conv2d(image[None], kernel, bias, stride=4)[0].permute(1, 2, 0)
        x = self.norm(x, "patch_embed.norm")
        outputs = []
        for stage in range(4):
            block = 0
            while f"layers.{stage}.blocks.{block}.norm1.weight" in self.weights:
                shift = self.window // 2 if block % 2 else 0
                x = self.block(x, f"layers.{stage}.blocks.{block}", self.heads[stage], shift)
                block += 1
            outputs.append(self.norm(x, f"norm{stage}").permute(2, 0, 1))
            if stage < 3:
                x = self.merge(x, f"layers.{stage}.downsample")
        return outputs

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        scaled = (x - mean) / (variance + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights.get(f"{name}.bias", 0.0)

    def merge(self, x: Tensor, name: str) -> Tensor:
        height, width = x.shape[:2]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        quarters = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
        return self.linear(self.norm(torch.cat(quarters, -1), f"{name}.norm"), f"{name}.reduction")

    def block(self, x: Tensor, name: str, heads: int, shift: int) -> Tensor:
        x = x + self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn", heads, shift)
        hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.linear(hidden, f"{name}.mlp.fc2")

    def attention(self, x: Tensor, name: str, heads: int, shift: int) -> Tensor:
        height, width, channels = x.shape
        window = self.window
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[:2]
        tokens = x.reshape(-1, channels)
        query, key, value = self.linear(tokens, f"{name}.qkv").chunk(3, dim=-1)

        y = torch.arange(rows).repeat_interleave(columns)
        x_ = torch.arange(columns).repeat(rows)
        # Windows are cut `shift` pixels further down and right; what is left over before the first
        # cut is of its own.
        same = ((y[:, None] - shift) // window == (y - shift) // window) & (
            (x_[:, None] - shift) // window == (x_ - shift) // window
        )
        down = (y[:, None] - y).clamp(1 - window, window - 1) + window - 1
        right = (x_[:, None] - x_).clamp(1 - window, window - 1) + window - 1
        table = self.weights[f"{name}.relative_position_bias_table"]
        size = channels // heads
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / size**0.5
            scores = scores + table[down * (2 * window - 1) + right, head]
            scores = scores.masked_fill(~same, float("-inf"))
            outputs.append(scores.softmax(-1) @ value[:, part])
        y_out = self.linear(torch.cat(outputs, -1), f"{name}.proj")
        return y_out.reshape(rows, columns, channels)[:height, :width]


@pytest.mark.parametrize("size", [(128, 160), (97, 131), (32, 64)])
def test_features_equal_a_slow_computation(parity: Path, size: tuple[int, int]) -> None:
    cfg, weights = released_swin(parity)
    backbone = build_backbone(cfg).eval()
    backbone.load_state_dict(convert_swin(weights))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        outputs = backbone(images)
    slow = SlowSwin(weights, heads=cfg.MODEL.SWIN.NUM_HEADS, window=cfg.MODEL.SWIN.WINDOW_SIZE)
    expected = slow(images[1])
    for output, want in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(output[1].double(), want, atol=1e-4, rtol=1e-4)


def test_timm_alone_differs_where_windows_do_not_divide() -> None:
    """If timm comes to pad before it shifts, our blocks are no longer needed."""
    options = {"embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2), "strict_img_size": False}
    options |= {"always_partition": True, "features_only": True}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    ours = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    ours.load_state_dict(theirs.state_dict())
    pad_before_shift(ours)
    for size, equal in ((224, True), (192, False)):
        images = torch.randn(1, 3, size, size)
        assert torch.allclose(ours(images)[1], theirs(images)[1], atol=1e-5) == equal


@pytest.mark.parametrize("block_class", [SwinBlock, SwinV2Block])
def test_opposite_borders_do_not_see_each_other(block_class: type) -> None:
    block = block_class(
        8,
        (10, 10),
        num_heads=2,
        window_size=4,
        shift_size=2,
        always_partition=True,
        dynamic_mask=True,
    ).eval()
    features = torch.randn(1, 10, 10, 8)
    changed = features.clone()
    changed[:, 0, 0] = torch.randn(8)
    difference = (block(changed) - block(features)).abs().amax(-1)[0]
    assert difference[:2, :2].min() > 1e-6  # the corner window
    difference[:2, :2] = 0
    assert difference.max() < 1e-6


@pytest.mark.skipif(not traces_any_size(), reason="this PyTorch traces programs of one size alone")
@pytest.mark.parametrize("block_class", [SwinBlock, SwinV2Block])
@torch.no_grad()
def test_a_shifted_block_is_a_short_program_for_any_size(block_class: type) -> None:
    """Each size is the number of windows times theirs; or Swin-T takes a tracer beyond patience."""
    sizes = {"window_size": 4, "shift_size": 2, "always_partition": True, "dynamic_mask": True}
    block = block_class(8, (12, 12), num_heads=2, **sizes).eval()
    height, width = (torch.export.Dim(name, min=5, max=512) for name in ("height", "width"))
    program = torch.export.export(
        block,
        (torch.randn(1, 10, 15, 8),),
        dynamic_shapes={"x": {1: height, 2: width}},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    assert len(program.graph.nodes) < 200
    for size in ((8, 8), (9, 31), (17, 6)):
        features = torch.randn(1, *size, 8)
        torch.testing.assert_close(program.module()(features), block(features))


def test_unsupported_released_keys_are_named(parity: Path) -> None:
    cfg, _ = released_swin(parity)
    cfg.MODEL.SWIN.APE = True
    with pytest.raises(ValueError, match="MODEL.SWIN.APE must be False, got True"):
        build_backbone(cfg)
