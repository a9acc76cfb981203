"""What layers are made of: self-attention, multi-scale deformable attention, feed-forward network.

Shape key: B images, Q queries, S tokens, C channels, M heads, L levels, P points.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdino.modeling.layers import linear, linear_relu, product, rounded, unseen
from maskdino.ops.ms_deform_attn import ms_deform_attn_fused
from maskdino.ops.recompute import remade
from maskdino.structures import SpatialShapes

ALIGNED = 8  # elements from which rows of a mask begin
ROWS_AT_ONCE = 1024  # whose hidden numbers a CPU keeps in its cache


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of an encoder or decoder layer."""

    hidden_dim: int  # C
    num_heads: int  # M
    num_levels: int  # L
    num_points: int  # P
    feedforward_dim: int

    def __post_init__(self) -> None:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"HIDDEN_DIM {self.hidden_dim} must be a multiple of the {self.num_heads} "
                "attention heads"
            )


class SelfAttention(nn.Module):
    """Multi-head self-attention whose positional embedding enters queries and keys, not values."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        hidden_dim, self.num_heads = sizes.hidden_dim, sizes.num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, content: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Content, position (B, Q, C) and a mask to (B, Q, C).

        The mask (Q, Q) is True where a query may see another, or is an `attention_bias`; None:
        everywhere.
        """
        parts = (2 * content.shape[-1], content.shape[-1])
        query_key_weight, value_weight = self.in_proj_weight.split(parts)
        query_key_bias, value_bias = self.in_proj_bias.split(parts)
        both = rounded(torch.add, content, position, to=self.in_proj_weight.dtype)
        query_key = F.linear(both, query_key_weight, query_key_bias)
        value = F.linear(content, value_weight, value_bias)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (*query_key.chunk(2, dim=-1), value)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def attention_bias(may_attend: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, which it would else make of a mask in each layer.

    Args:
        may_attend: (Q, Q) bool, True where a query (row) may see another (column).
        dtype: of the content.

    Returns:
        (Q, Q) of 0 and -inf, in the type in which attention computes. Rows begin where CUDA's
        kernels can read them, or they would copy it.
    """
    device, size = may_attend.device, len(may_attend)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    rows = torch.zeros(size, -(-size // ALIGNED) * ALIGNED, dtype=dtype, device=device)
    return rows[:, :size].masked_fill_(may_attend.logical_not(), float("-inf"))


DeformableAttention = Callable[[Tensor, SpatialShapes, Tensor, Tensor | None, int], Tensor]
_operators: list[DeformableAttention] = [ms_deform_attn_fused]


@contextmanager
def deformable_attention_by(operator: DeformableAttention) -> Iterator[None]:
    """Within, all layers compute deformable attention by another form of the operator.

    So programs are traced from a form that other runtimes know. One thread at a time.
    """
    _operators.append(operator)
    try:
        yield
    finally:
        _operators.pop()


class MultiScaleDeformableAttention(nn.Module):
    """Attention to a few points of every level, near a cell or in a box (Deformable DETR)."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        hidden_dim, num_heads = sizes.hidden_dim, sizes.num_heads
        num_levels, num_points = sizes.num_levels, sizes.num_points
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(hidden_dim, samples * 2)  # (head, level, point, xy)
        self.attention_weights = nn.Linear(hidden_dim, samples)  # logits (head, level, point)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Heads look in different directions, points at growing distances; all weights equal."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]  # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)

    @property
    def dtype(self) -> torch.dtype:
        """In which queries and tokens are read."""
        return self.value_proj.weight.dtype

    def offsets_and_logits(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of both linear layers as one; of a prepared network, made before."""
        if "joined_weight" in self._parameters:
            return self.get_parameter("joined_weight"), self.get_parameter("joined_bias")
        offsets, logits = self.sampling_offsets, self.attention_weights
        return (
            torch.cat([offsets.weight, logits.weight]),
            torch.cat([offsets.bias, logits.bias]),
        )

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        spatial_shapes: SpatialShapes,
        reference: Tensor | None,
    ) -> Tensor:
        """Reads the maps around each query.

        Args:
            queries: (B, Q, C), positions added.
            tokens: (B, S, C) of all levels.
            spatial_shapes: (height, width) of each level.
            reference: boxes (B, Q, 4) cx, cy, w, h in [0, 1]: samples lie at
                `center + offset / P * size / 2`. None when queries are the tokens: samples lie
                `offset` cells from the center of the token's own cell.

        Returns:
            (B, Q, C).
        """
        value, offsets_and_logits = remade(self._projected, queries, tokens)
        operator = _operators[-1]
        out = operator(value, spatial_shapes, offsets_and_logits, reference, self.num_points)
        return linear(self.output_proj, out)

    def _projected(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, S, M, C / M), and the offsets and logits of all samples."""
        value = linear(self.value_proj, tokens)
        value = value.unflatten(-1, (self.num_heads, -1))
        return value, product(queries, *self.offsets_and_logits())


class FeedForward(nn.Module):
    """Linear, ReLU, Linear."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.linear1 = nn.Linear(sizes.hidden_dim, sizes.feedforward_dim)
        self.linear2 = nn.Linear(sizes.feedforward_dim, sizes.hidden_dim)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        rows = x.flatten(0, -2)
        if x.device.type == "cpu" and unseen(self.linear1) and unseen(self.linear2):
            # Hidden numbers of a few rows stay in the cache.
            parts = [self._of_rows(part) for part in rows.split(ROWS_AT_ONCE)]
            return torch.cat(parts).unflatten(0, x.shape[:-1])
        return self._of_rows(rows).unflatten(0, x.shape[:-1])

    def _of_rows(self, rows: Tensor) -> Tensor:
        hidden = remade(partial(linear_relu, self.linear1), rows)
        return linear(self.linear2, hidden)
