"""Levels of the encoder and the pixel embedding."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor

from maskdino.modeling.encoder import MultiScaleDeformableEncoder, PixelEmbedding
from tests.helpers import tiny_cfg

SHAPE = {f"res{i}": ShapeSpec(channels=8 * i, stride=2**i) for i in range(2, 6)}


def features(height: int, width: int) -> dict[str, Tensor]:
    """Backbone features of an image of that size (a multiple of 32)."""
    return {
        name: torch.randn(2, spec.channels, height // spec.stride, width // spec.stride)
        for name, spec in SHAPE.items()
    }


def test_levels_are_finest_first_and_extra_ones_come_from_the_backbone() -> None:
    encoder = MultiScaleDeformableEncoder(tiny_cfg(ENCODER__NUM_LAYERS=0), SHAPE)
    inputs = features(64, 96)
    memory = encoder(inputs)
    assert memory.spatial_shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    assert memory.tokens.shape == (2, 96 + 24 + 6 + 2, 64)
    convolution, norm = encoder.input_proj[3]
    extra = F.conv2d(inputs["res5"], convolution.weight, convolution.bias, stride=2, padding=1)
    expected = F.group_norm(extra, 32, norm.weight, norm.bias).flatten(2).transpose(1, 2)
    torch.testing.assert_close(memory.tokens[:, -2:], expected)


def test_further_levels_come_from_the_level_before() -> None:
    encoder = MultiScaleDeformableEncoder(tiny_cfg(ENCODER__NUM_LEVELS=5), SHAPE)
    assert [p[0].in_channels for p in encoder.input_proj] == [24, 32, 40, 40, 64]
    assert encoder(features(128, 64)).spatial_shapes[-2:] == ((2, 1), (1, 1))


def test_images_of_a_batch_do_not_mix() -> None:
    encoder = MultiScaleDeformableEncoder(tiny_cfg(ENCODER__NUM_LAYERS=2), SHAPE).eval()
    inputs = features(64, 96)
    both = encoder(inputs).tokens
    for i in range(2):
        alone = encoder({name: x[i : i + 1] for name, x in inputs.items()}).tokens
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_pixel_embedding_adds_the_resized_finest_level() -> None:
    cfg = tiny_cfg(ENCODER__NUM_LAYERS=0)
    encoder, branch = MultiScaleDeformableEncoder(cfg, SHAPE), PixelEmbedding(cfg, SHAPE)
    inputs = features(64, 96)
    memory = encoder(inputs)
    lateral = F.conv2d(inputs["res2"], branch.lateral.weight)
    lateral = branch.lateral_norm(lateral)
    finest = memory.tokens[:, : 8 * 12].reshape(2, 8, 12, 64).permute(0, 3, 1, 2)
    fused = lateral + F.interpolate(finest, (16, 24), mode="bilinear", align_corners=False)
    fused = branch.output_norm(F.conv2d(fused, branch.output.weight, padding=1)).relu()
    expected = F.conv2d(fused, branch.mask_features.weight, branch.mask_features.bias)
    torch.testing.assert_close(branch(inputs, memory), expected)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"ENCODER__IN_FEATURES": ["res3", "p9"]}, KeyError, "p9"),
        ({"ENCODER__NUM_LEVELS": 2}, ValueError, "NUM_LEVELS 2 is less than the 3"),
        ({"ENCODER__IN_FEATURES": ["res5", "res3"]}, ValueError, r"fine to coarse.*\[32, 8\]"),
    ],
)
def test_wrong_levels_are_refused(
    overrides: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MultiScaleDeformableEncoder(tiny_cfg(**overrides), SHAPE)
