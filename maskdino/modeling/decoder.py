"""Transformer decoder with iterative box refinement and look-forward-twice (DINO; section 3.1).

Shape key: B images, Q queries (noised ones first, when there are any), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from maskdino.modeling.attention import FeedForward, MultiScaleDeformableAttention, SelfAttention
from maskdino.modeling.layers import MLP, box_sine_embedding
from maskdino.structures import Memory, Queries

if TYPE_CHECKING:
    from maskdino.modeling.heads import PredictionHeads


@dataclass(frozen=True)
class DecoderState:
    """Queries before the first layer (then `content` is theirs) or after a layer (then normed)."""

    content: Tensor  # (B, Q, C), what the class and mask heads read
    boxes: (
        Tensor  # (B, Q, 4) cx, cy, w, h in [0, 1], with gradient to this layer and the one before
    )


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and feed-forward network, each with residual sum
    and LayerNorm.
    """

    def __init__(
        self,
        *,
        hidden_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_dim: int,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(hidden_dim=hidden_dim, num_heads=num_heads)
        self.self_norm = nn.LayerNorm(hidden_dim)
        self.cross_attn = MultiScaleDeformableAttention(
            hidden_dim=hidden_dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.cross_norm = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim=hidden_dim, feedforward_dim=feedforward_dim)
        self.ffn_norm = nn.LayerNorm(hidden_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        anchors: Tensor,
        memory: Memory,
        may_attend: Tensor | None,
    ) -> Tensor:
        """Content and position (B, Q, C), anchors (B, Q, 4) in [0, 1] to content (B, Q, C)."""
        content = self.self_norm(content + self.self_attn(content, position, may_attend))
        read = self.cross_attn(content + position, memory.tokens, memory.spatial_shapes, anchors)
        content = self.cross_norm(content + read)
        return self.ffn_norm(content + self.ffn(content))


class Decoder(nn.Module):
    """Refines queries layer by layer."""

    @configurable
    def __init__(
        self,
        *,
        num_layers: int,
        hidden_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_dim: int,
    ) -> None:
        super().__init__()
        self.channels_per_coordinate = hidden_dim // 2
        self.position_head = MLP(
            input_dim=2 * hidden_dim, hidden_dim=hidden_dim, output_dim=hidden_dim, num_layers=2
        )
        self.layers = nn.ModuleList(
            DecoderLayer(
                hidden_dim=hidden_dim,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                feedforward_dim=feedforward_dim,
            )
            for _ in range(num_layers)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.MASK_DINO
        return {
            "num_layers": node.DECODER.NUM_LAYERS,
            "hidden_dim": node.HIDDEN_DIM,
            "num_heads": node.DECODER.NUM_HEADS,
            "num_levels": node.ENCODER.NUM_LEVELS,
            "num_points": node.DECODER.NUM_POINTS,
            "feedforward_dim": node.DECODER.FEEDFORWARD_DIM,
        }

    def forward(
        self,
        queries: Queries,
        memory: Memory,
        heads: PredictionHeads,
        may_attend: Tensor | None = None,
        num_layers: int | None = None,
    ) -> list[DecoderState]:
        """Decodes.

        Args:
            queries: content and anchors.
            memory: the encoder's tokens.
            heads: the shared norm and box head.
            may_attend: (Q, Q) bool, True where a query (row) may see another (column); None for
                everywhere.
            num_layers: stop after this many layers; None for all.

        Returns:
            The state before the first layer and after each layer.
        """
        content, anchors = queries.content, queries.anchor_logits.float().sigmoid()
        # with gradient: the box of a layer also trains the layer before (look forward twice)
        entered = anchors
        states = [DecoderState(content, anchors)]
        for layer in self.layers[:num_layers]:
            position = self.position_head(
                box_sine_embedding(anchors, self.channels_per_coordinate).to(content.dtype)
            )
            content = layer(content, position, anchors, memory, may_attend)
            normed = heads.norm(content)
            states.append(DecoderState(normed, heads.refine(normed, entered)))
            entered = heads.refine(content, anchors)
            anchors = entered.detach()
        return states
