"""The decoder: boxes of each layer, and which parameters they train (look forward twice)."""

import pytest
import torch

from maskdino.modeling.decoder import Decoder
from maskdino.modeling.heads import PredictionHeads
from maskdino.modeling.layers import box_sine_embedding
from maskdino.ops.boxes import inverse_sigmoid
from maskdino.structures import Memory, Queries
from tests.helpers import CHANNELS, tiny_cfg

SHAPES = ((4, 5), (2, 3), (1, 2), (1, 1))
LAYERS = 4


@pytest.fixture
def parts() -> tuple[Decoder, PredictionHeads, Queries, Memory]:
    """Decoder of four layers whose box head moves boxes, with drawn inputs."""
    cfg = tiny_cfg(DECODER__NUM_LAYERS=LAYERS)
    decoder, heads = Decoder(cfg), PredictionHeads(cfg)
    torch.nn.init.normal_(heads.box_head.layers[-1].weight, std=0.3)
    queries = Queries(torch.randn(2, 6, CHANNELS), torch.randn(2, 6, 4))
    return decoder, heads, queries, Memory(torch.randn(2, 29, CHANNELS), SHAPES)


def test_each_layer_follows_the_equations(
    parts: tuple[Decoder, PredictionHeads, Queries, Memory],
) -> None:
    decoder, heads, queries, memory = parts
    states = decoder(queries, memory, heads)
    assert len(states) == LAYERS + 1
    content, anchors = queries.content, queries.anchor_logits.sigmoid()
    torch.testing.assert_close(states[0].content, content)
    torch.testing.assert_close(states[0].boxes, anchors)
    for layer, state in zip(decoder.layers, states[1:], strict=True):
        position = decoder.position_head(box_sine_embedding(anchors, CHANNELS // 2))
        attended = content + layer.self_attn(content, position, None)
        content = layer.self_norm(attended)
        read = layer.cross_attn(content + position, memory.tokens, SHAPES, anchors)
        content = layer.cross_norm(content + read)
        content = layer.ffn_norm(content + layer.ffn(content))
        normed = heads.norm(content)
        torch.testing.assert_close(state.content, normed)
        boxes = (heads.box_head(normed) + inverse_sigmoid(anchors)).sigmoid()
        torch.testing.assert_close(state.boxes, boxes)
        anchors = (heads.box_head(content) + inverse_sigmoid(anchors)).sigmoid()


def test_boxes_look_forward_twice(
    parts: tuple[Decoder, PredictionHeads, Queries, Memory],
) -> None:
    """The box of layer i trains layer i and, through the anchor, layer i - 1.

    Content carries gradient through all layers. It is cut between the layers here, so that what
    arrives came through the anchors alone.
    """
    decoder, heads, queries, memory = parts
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
    states = decoder(queries, memory, heads)
    for i in range(1, LAYERS + 1):
        for number, layer in enumerate(decoder.layers, start=1):
            gradient = torch.autograd.grad(
                states[i].boxes.sum(),
                layer.ffn.linear1.weight,
                retain_graph=True,
                allow_unused=True,
            )[0]
            trained = gradient is not None and bool(gradient.abs().sum() > 0)
            assert trained == (number in (i, i - 1)), f"box of layer {i}, layer {number}"


def test_anchors_enter_attention_without_gradient(
    parts: tuple[Decoder, PredictionHeads, Queries, Memory],
) -> None:
    decoder, heads, queries, memory = parts
    entered = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[2]))
    decoder(queries, memory, heads)
    assert len(entered) == LAYERS and not any(x.requires_grad for x in entered)


def test_learned_anchors_are_trained() -> None:
    cfg = tiny_cfg()
    decoder, heads = Decoder(cfg), PredictionHeads(cfg)
    anchor_logits = torch.randn(1, 6, 4, requires_grad=True)
    queries = Queries(torch.randn(1, 6, CHANNELS), anchor_logits)
    states = decoder(queries, Memory(torch.randn(1, 29, CHANNELS), SHAPES), heads)
    states[1].boxes.sum().backward()
    assert anchor_logits.grad.abs().sum() > 0


@pytest.mark.parametrize("number", [0, 1, 3])
def test_decoding_stops_early(
    number: int, parts: tuple[Decoder, PredictionHeads, Queries, Memory]
) -> None:
    decoder, heads, queries, memory = parts
    all_states = decoder(queries, memory, heads)
    states = decoder(queries, memory, heads, num_layers=number)
    assert len(states) == number + 1
    torch.testing.assert_close(states[-1].content, all_states[number].content)


def test_coarse_levels_can_be_left_out() -> None:
    """DECODER.NUM_LEVELS 2 reads the two finest of the four levels, and no other."""
    cfg = tiny_cfg(DECODER__NUM_LEVELS=2)
    decoder, heads = Decoder(cfg), PredictionHeads(cfg)
    queries = Queries(torch.randn(1, 6, CHANNELS), torch.randn(1, 6, 4))
    tokens = torch.randn(1, 29, CHANNELS, requires_grad=True)
    state = decoder(queries, Memory(tokens, SHAPES), heads)[-1]
    state.content.square().sum().backward()
    assert tokens.grad[:, :26].abs().sum() > 0
    assert tokens.grad[:, 26:].abs().sum() == 0
    with pytest.raises(ValueError, match=r"DECODER.NUM_LEVELS is 5; it must be 1 to .*\(4\)"):
        Decoder(tiny_cfg(DECODER__NUM_LEVELS=5))


def test_hidden_queries_have_no_influence(
    parts: tuple[Decoder, PredictionHeads, Queries, Memory],
) -> None:
    """With the last two queries unseen by the first four, these decode as if they were alone."""
    decoder, heads, queries, memory = parts
    may_attend = torch.ones(6, 6, dtype=torch.bool)
    may_attend[:4, 4:] = False
    masked = decoder(queries, memory, heads, may_attend)[-1]
    alone = Queries(queries.content[:, :4], queries.anchor_logits[:, :4])
    expected = decoder(alone, memory, heads)[-1]
    torch.testing.assert_close(masked.content[:, :4], expected.content, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.boxes[:, :4], expected.boxes, atol=1e-5, rtol=1e-5)


def test_heads_start_at_the_prior_and_leave_anchors() -> None:
    heads = PredictionHeads(tiny_cfg())
    torch.testing.assert_close(heads.class_head.bias.sigmoid(), torch.full((5,), 0.01))
    anchors = torch.randn(3, 4)
    assert torch.equal(heads.box_logits(torch.randn(3, CHANNELS), anchors), anchors)
    assert (
        PredictionHeads(tiny_cfg(LOSS__CLASSIFICATION="cross_entropy")).class_head.out_features == 6
    )
