"""Transformer decoder with iterative box refinement and look-forward-twice (DINO; section 3.1).

Shape key: B images, Q queries (noised ones first, when there are any), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from maskdino.modeling.attention import (
    FeedForward,
    LayerSizes,
    MultiScaleDeformableAttention,
    SelfAttention,
    attention_bias,
)
from maskdino.modeling.layers import MLP, add_norm, box_sine_embedding, copy_of
from maskdino.ops.boxes import bounded_logits
from maskdino.ops.recompute import Recomputing, recomputed
from maskdino.structures import Memory, Queries

if TYPE_CHECKING:
    from maskdino.modeling.heads import PredictionHeads


@dataclass(frozen=True)
class DecoderState:
    """What predictions are made of, before the first layer or after a layer.

    Attributes:
        content: (B, Q, C), for the class and mask heads: before the first layer the content queries
            as they are, after a layer its output, normed.
        boxes: (B, Q, 4) cx, cy, w, h in [0, 1], with gradient to this layer and the one before.
    """

    content: Tensor
    boxes: Tensor


class DecoderLayer(Recomputing):
    """Self-attention, deformable cross-attention, feed-forward; each with sum and LayerNorm."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attn = SelfAttention(sizes)
        self.self_norm = nn.LayerNorm(sizes.hidden_dim)
        self.cross_attn = MultiScaleDeformableAttention(sizes)
        self.cross_norm = nn.LayerNorm(sizes.hidden_dim)
        self.ffn = FeedForward(sizes)
        self.ffn_norm = nn.LayerNorm(sizes.hidden_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        anchors: Tensor,
        memory: Memory,
        mask: Tensor | None,
    ) -> Tensor:
        """Content and position (B, Q, C), anchors (B, Q, 4) in [0, 1] to content (B, Q, C)."""
        seen = self.self_attn(content, position, mask)
        content, _, queries, _ = add_norm(self.self_norm, content, seen, position)
        args = queries, memory.tokens, memory.spatial_shapes, anchors
        read = recomputed(self.cross_attn, *args, when=self.recomputes("cheap", "all"))
        content, read, *_ = add_norm(self.cross_norm, content, read, read=True)
        return add_norm(self.ffn_norm, content, self.ffn(read)).tokens


class Decoder(nn.Module):
    """Refines queries layer by layer."""

    @configurable
    def __init__(self, *, num_layers: int, sizes: LayerSizes) -> None:
        """Makes the layers.

        Args:
            num_layers: number of layers.
            sizes: of each layer; it looks at the `num_levels` finest levels of the memory.
        """
        super().__init__()
        hidden_dim, self.num_levels = sizes.hidden_dim, sizes.num_levels
        self.channels_per_coordinate = hidden_dim // 2
        self.position_head = MLP(
            input_dim=2 * hidden_dim, hidden_dim=hidden_dim, output_dim=hidden_dim, num_layers=2
        )
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(num_layers))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.DECODER.

        Raises:
            ValueError: if it asks for more levels than the encoder has.
        """
        node, encoded = cfg.MODEL.MASK_DINO.DECODER, cfg.MODEL.MASK_DINO.ENCODER.NUM_LEVELS
        if not 0 <= node.NUM_LEVELS <= encoded:
            raise ValueError(
                f"DECODER.NUM_LEVELS is {node.NUM_LEVELS}; it must be 1 to ENCODER.NUM_LEVELS "
                f"({encoded}), or 0 for all"
            )
        sizes = LayerSizes(
            hidden_dim=cfg.MODEL.MASK_DINO.HIDDEN_DIM,
            num_heads=node.NUM_HEADS,
            num_levels=node.NUM_LEVELS or encoded,
            num_points=node.NUM_POINTS,
            feedforward_dim=node.FEEDFORWARD_DIM,
        )
        return {"num_layers": node.NUM_LAYERS, "sizes": sizes}

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        heads: PredictionHeads,
        may_attend: Tensor | None = None,
        num_layers: int | None = None,
        *,
        last_alone: bool = False,
    ) -> list[DecoderState]:
        """Decodes.

        Args:
            queries: content and anchors.
            memory: the encoder's tokens.
            heads: the shared norm and box head.
            may_attend: (Q, Q) bool, True where a query (row) may see another (column); None for
                everywhere.
            num_layers: stop after this many layers; None for all.
            last_alone: nobody asks for what layers before the last one predict.

        Returns:
            The state before the first layer and after each layer; with `last_alone` only the last.
        """
        memory = memory.finest(self.num_levels)
        mask = None if may_attend is None else attention_bias(may_attend, queries.content.dtype)
        content, anchor_logits = queries.content, queries.anchor_logits.float()
        anchors, anchor_logits = anchor_logits.sigmoid(), bounded_logits(anchor_logits)
        # The same numbers, with gradient: a layer's box also trains the layer before (look forward
        # twice).
        entered_logits = anchor_logits
        states = [DecoderState(content, anchors)]
        layers = self.layers[:num_layers]
        tokens = memory.tokens
        if layers:  # else each layer would convert them, and keep its copy
            tokens = tokens.to(cast(DecoderLayer, layers[0]).cross_attn.dtype)
        embedding = self.channels_per_coordinate, self.position_head.dtype
        sines: Tensor | None = None  # of the anchors, where they are there already
        for number, layer in enumerate(layers, start=1):
            if sines is None:
                sines = box_sine_embedding(anchors, *embedding)
            read = Memory(copy_of(memory.tokens, tokens), memory.spatial_shapes)
            content = layer(content, self.position_head(sines), anchors, read, mask)
            if last_alone:
                refined = heads.norm(content) if number == len(layers) else content
                anchors, anchor_logits, sines = heads.next_boxes(refined, anchor_logits, *embedding)
                states = [DecoderState(refined, anchors)]
                continue
            normed = heads.norm(content)
            box_logits = heads.box_logits(
                torch.stack([normed, content]), torch.stack([entered_logits, anchor_logits])
            )
            boxes, entered = box_logits.sigmoid()
            states.append(DecoderState(normed, boxes))
            entered_logits = bounded_logits(box_logits[1])
            anchors, anchor_logits = entered.detach(), entered_logits.detach()
            sines = None
        return states
