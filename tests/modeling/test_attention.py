"""Self-attention and deformable attention against loops over heads, levels and points."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maskdino.modeling.attention import LayerSizes, MultiScaleDeformableAttention, SelfAttention
from tests.sampling import bilinear

SHAPES = ((5, 6), (3, 2))
CHANNELS, HEADS, POINTS = 16, 4, 2
SIZES = LayerSizes(
    hidden_dim=CHANNELS,
    num_heads=HEADS,
    num_levels=len(SHAPES),
    num_points=POINTS,
    feedforward_dim=32,
)


def slow_self_attention(
    layer: SelfAttention, content: Tensor, position: Tensor, may_attend: Tensor | None
) -> Tensor:
    """One image (Q, C), query by query and head by head."""
    weights = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    inputs = (content + position, content + position, content)
    query, key, value = (x @ w.t() + b for x, w, b in zip(inputs, *weights, strict=True))
    width = CHANNELS // HEADS
    out = torch.zeros_like(content)
    for i in range(len(content)):
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            seen = [j for j in range(len(content)) if may_attend is None or may_attend[i, j]]
            scores = torch.stack([query[i, part] @ key[j, part] / math.sqrt(width) for j in seen])
            shares = scores.exp() / scores.exp().sum()
            out[i, part] = sum(s * value[j, part] for s, j in zip(shares, seen, strict=True))
    return out @ layer.out_proj.weight.t() + layer.out_proj.bias


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_self_attention(masked: bool) -> None:
    layer = SelfAttention(SIZES)
    torch.nn.init.normal_(layer.in_proj_bias)
    content, position = torch.randn(2, 2, 5, CHANNELS)
    may_attend = (torch.rand(5, 5) < 0.5) | torch.eye(5, dtype=torch.bool) if masked else None
    found = layer(content, position, may_attend)
    for image in range(2):
        expected = slow_self_attention(layer, content[image], position[image], may_attend)
        torch.testing.assert_close(found[image], expected, atol=1e-5, rtol=1e-5)


def slow_deformable(
    layer: MultiScaleDeformableAttention, query: Tensor, tokens: Tensor, reference: Tensor
) -> Tensor:
    """One query (C) at a box or, if only a center is given, at a pixel center."""
    width = CHANNELS // HEADS
    value = tokens @ layer.value_proj.weight.t() + layer.value_proj.bias
    offsets = query @ layer.sampling_offsets.weight.t() + layer.sampling_offsets.bias
    logits = query @ layer.attention_weights.weight.t() + layer.attention_weights.bias
    offsets = offsets.reshape(HEADS, len(SHAPES), POINTS, 2)
    shares = logits.reshape(HEADS, -1).softmax(1).reshape(HEADS, len(SHAPES), POINTS)
    out = torch.zeros(CHANNELS)
    for head in range(HEADS):
        part, begin = slice(head * width, (head + 1) * width), 0
        for level, (rows, columns) in enumerate(SHAPES):
            area = value[begin : begin + rows * columns, part].reshape(rows, columns, width)
            begin += rows * columns
            for point in range(POINTS):
                move = offsets[head, level, point]
                if len(reference) == 4:
                    move = move / POINTS * reference[2:] * 0.5
                else:
                    move = move / torch.tensor([columns, rows])
                x, y = (reference[:2] + move).tolist()
                out[part] += shares[head, level, point] * bilinear(area, x, y)
    return out @ layer.output_proj.weight.t() + layer.output_proj.bias


@pytest.fixture
def deformable() -> MultiScaleDeformableAttention:
    layer = MultiScaleDeformableAttention(SIZES)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.3)
    torch.nn.init.normal_(layer.value_proj.bias)
    return layer


@torch.no_grad()
def test_attention_in_boxes(deformable: MultiScaleDeformableAttention) -> None:
    tokens, queries = torch.randn(2, 36, CHANNELS), torch.randn(2, 3, CHANNELS)
    boxes = torch.rand(2, 3, 4)
    found = deformable(queries, tokens, SHAPES, boxes)
    for image in range(2):
        for i in range(3):
            expected = slow_deformable(
                deformable, queries[image, i], tokens[image], boxes[image, i]
            )
            torch.testing.assert_close(found[image, i], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_around_cells(deformable: MultiScaleDeformableAttention) -> None:
    tokens, queries = torch.randn(1, 36, CHANNELS), torch.randn(1, 36, CHANNELS)
    found = deformable(queries, tokens, SHAPES, None)
    token = 0
    for rows, columns in SHAPES:
        for i in range(rows):
            for j in range(columns):
                center = torch.tensor([(j + 0.5) / columns, (i + 0.5) / rows])
                expected = slow_deformable(deformable, queries[0, token], tokens[0], center)
                torch.testing.assert_close(found[0, token], expected, atol=1e-4, rtol=1e-4)
                token += 1


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="HIDDEN_DIM 10 must be a multiple of the 4"):
        LayerSizes(hidden_dim=10, num_heads=4, num_levels=1, num_points=1, feedforward_dim=16)


@torch.no_grad()
def test_a_new_layer_looks_around_evenly() -> None:
    """Eight heads in eight directions of a square, points at growing distances, equal weights."""
    layer = MultiScaleDeformableAttention(replace(SIZES, num_heads=8))
    queries = torch.randn(3, CHANNELS)
    assert not layer.attention_weights(queries).any()
    found = layer.sampling_offsets(queries).view(3, 8, len(SHAPES), POINTS, 2)
    square = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(square):
        for point in range(POINTS):
            expected = torch.tensor([x, y]) * (point + 1.0)
            here = found[:, head, :, point]
            torch.testing.assert_close(here, expected.expand_as(here), atol=1e-5, rtol=0)
