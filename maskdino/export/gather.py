"""Deformable attention by look-ups in one table, for engines whose bilinear sampling is wrong.

The numbers are those of `maskdino.ops.ms_deform_attn`, of operations that every engine has: the
four cells around a sample are rows of a table (`Gather` along the first axis), whose row 0 is what
lies outside of every map.

Shape key: B images, S tokens of all levels together, Q queries, M heads, D channels of a head,
L levels, P points per level and head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from maskdino.ops.ms_deform_attn import locations_and_weights
from maskdino.structures import SpatialShapes


def gather_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
) -> Tensor:
    """`ms_deform_attn_fused` without bilinear sampling as an operator."""
    locations, weights = locations_and_weights(
        value, spatial_shapes, offsets_and_logits, reference, num_points
    )
    return sample_by_gather(value, spatial_shapes, locations, weights).to(value.dtype)


def sample_by_gather(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Samples feature maps and sums the samples.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (H, W) of each level.
        locations: (B, Q, M, L, P, 2) x, y in [0, 1]; what is outside, NaN or infinite reads zero.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D) in the dtype of the locations.
    """
    images, tokens, heads, channels = value.shape
    table = value.to(locations.dtype).reshape(-1, channels)  # row (image, token, head)
    table = functional.pad(table, (0, 0, 1, 0))
    image_rows = torch.arange(images, device=value.device).view(-1, 1, 1, 1) * (tokens * heads)
    first_rows = 1 + image_rows + torch.arange(heads, device=value.device).view(-1, 1)
    output = weights.new_zeros(images, locations.shape[1], heads, channels)
    for level, (height, width) in enumerate(spatial_shapes):
        x, near_x = _pixels(locations[:, :, :, level, :, 0], width)
        y, near_y = _pixels(locations[:, :, :, level, :, 1], height)
        near = near_x & near_y
        left, top = x.floor(), y.floor()
        right_share, lower_share = x - left, y - top
        rows, shares = [], []  # of the table, and of the samples; (B, Q, M, P) for each corner
        for column, share_x in ((left, 1 - right_share), (left + 1, right_share)):
            for row, share_y in ((top, 1 - lower_share), (top + 1, lower_share)):
                known = near & (column >= 0) & (column < width) & (row >= 0) & (row < height)
                cell = row.to(torch.int64) * width + column.to(torch.int64)
                rows.append(torch.where(known, first_rows + cell * heads, 0))
                shares.append(share_x * share_y * weights[:, :, :, level])
        # One product of all corners: onnxruntime takes half the time that a sum for each takes.
        cells = functional.embedding(torch.cat(rows, dim=-1), table)  # (B, Q, M, 4P, D)
        with torch.autocast(value.device.type, enabled=False):
            output = output + (torch.cat(shares, dim=-1).unsqueeze(-2) @ cells).squeeze(-2)
        first_rows = first_rows + height * width * heads
    return output.flatten(2)


def _pixels(locations: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Locations along one axis in pixels, 0 at the center of the first one; and which are near.

    Samples that lie a pixel or more from every center are at 0, which any integer type holds.
    """
    pixels = locations * size - 0.5
    near = (pixels > -1) & (pixels < size)
    return torch.where(near, pixels, 0), near
