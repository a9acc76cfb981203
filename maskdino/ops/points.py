"""Masks at points: samples of feature maps, of packed masks, of mask logits never kept as maps.

Shape key: B images, C channels, H, W pixels of a map, M masks, P points. Points are (x, y) in
[0, 1] of the canvas.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.structures import PackedMasks

MAP_ELEMENTS_AT_ONCE = 1 << 24  # mask logits that exist at one time (64 MiB of float32)


def mask_logits(mask_embeddings: Tensor, pixel_embedding: Tensor) -> Tensor:
    """Equation 1: mask (B, M, C) and pixel embedding (B, C, H, W) to logits (B, M, H, W)."""
    return torch.bmm(mask_embeddings, pixel_embedding.flatten(2)).unflatten(
        2, pixel_embedding.shape[2:]
    )


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps, zero outside (`align_corners=False`).

    Args:
        maps: (B, C, H, W).
        points: (B, P, 2).

    Returns:
        (B, C, P), in the maps' dtype.
    """
    grid = (2 * points - 1).to(maps.dtype).unsqueeze(1)  # (B, 1, P, 2)
    return F.grid_sample(
        maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    ).squeeze(2)


def sample_packed_masks(masks: PackedMasks, index: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of packed masks: what `sample_maps` gives for float masks, never made.

    Args:
        masks: N masks.
        index: (M,) int64, which mask each row of points looks at.
        points: (M, P, 2), or (1, P, 2) for points that all rows share.

    Returns:
        (M, P) float32 in [0, 1].
    """
    height, width = masks.size
    x, y = (points * points.new_tensor([width, height]) - 0.5).unbind(-1)  # (M or 1, P)
    x0, y0 = x.floor(), y.floor()
    fraction_x, fraction_y = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    bits = masks.bits.flatten()
    rows = masks.bits.shape[2]
    base = (index * (height * rows))[:, None]  # (M, 1)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x0 + dx, y0 + dy
            weight = (fraction_x if dx else 1 - fraction_x) * (fraction_y if dy else 1 - fraction_y)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            byte = (row.clamp(0, height - 1) * rows + (column.clamp(0, width - 1) >> 3)) + base
            pixel = (bits[byte] >> (7 - (column & 7)).to(torch.uint8)) & 1
            total = total + pixel * (weight * inside)
    return total


class PointSampler:
    """Draws the points at which masks are compared (PointRend; appendix B.1)."""

    def __init__(self, num_points: int, oversample_ratio: float, importance_ratio: float) -> None:
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_ratio)
        if self.num_candidates < self.num_uncertain:
            raise ValueError(
                f"{self.num_candidates} candidates are fewer than the {self.num_uncertain} to "
                "choose"
            )

    def uniform(self, number: int, device: torch.device) -> Tensor:
        """(number, P, 2) uniform points."""
        return torch.rand(number, self.num_points, 2, device=device)

    def uncertain(self, maps: Tensor) -> Tensor:
        """Points for the loss of each mask: most of them where the prediction is the least certain.

        Args:
            maps: (M, H, W) mask logits.

        Returns:
            (M, P, 2).
        """
        number, device = maps.shape[0], maps.device
        candidates = torch.rand(number, self.num_candidates, 2, device=device)
        doubt = -sample_maps(maps.unsqueeze(1), candidates).squeeze(1).abs()  # (M, candidates)
        chosen = doubt.topk(self.num_uncertain, dim=1, sorted=False).indices
        points = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        rest = torch.rand(number, self.num_points - self.num_uncertain, 2, device=device)
        return torch.cat([points, rest], dim=1)


def mask_logits_at_points(
    mask_embeddings: Tensor, pixel_embedding: Tensor, choose_points: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mask logits at points that are chosen by looking at the mask.

    Maps are made a few at a time and forgotten. The backward pass needs none of them, because a
    sample is linear both in the embedding and in the map.

    Args:
        mask_embeddings: (M, C).
        pixel_embedding: (C, H, W) of the one image.
        choose_points: gets maps (m, H, W) and gives their points (m, P, 2).

    Returns:
        logits (M, P) float32 and points (M, P, 2), in the order of the embeddings.
    """
    return _MaskLogitsAtPoints.apply(mask_embeddings, pixel_embedding, choose_points)


class _MaskLogitsAtPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask_embeddings, pixel_embedding, choose_points):  # noqa: ANN001, ANN205
        device = pixel_embedding.device.type
        half = torch.is_autocast_enabled(device) and mask_embeddings.dtype != torch.float64
        dtype = (
            torch.get_autocast_dtype(device)
            if half
            else torch.promote_types(mask_embeddings.dtype, torch.float32)
        )
        embeddings, features = mask_embeddings.to(dtype), pixel_embedding.to(dtype).flatten(1)
        size = pixel_embedding.shape[1:]
        logits, points = [], []
        for part in embeddings.split(_maps_at_once(size)):
            maps = torch.mm(part, features).unflatten(1, size)
            maps = maps.to(torch.promote_types(dtype, torch.float32))
            points.append(choose_points(maps))
            logits.append(sample_maps(maps.unsqueeze(1), points[-1]).squeeze(1))
        logits, points = torch.cat(logits), torch.cat(points)
        ctx.save_for_backward(embeddings, features, points)
        ctx.size, ctx.dtypes = size, (mask_embeddings.dtype, pixel_embedding.dtype)
        ctx.mark_non_differentiable(points)
        return logits, points

    @staticmethod
    def backward(ctx, grad_logits, _):  # noqa: ANN001, ANN205
        embeddings, features, points = ctx.saved_tensors
        at_once = _maps_at_once(ctx.size)
        grad_features = torch.zeros_like(features, dtype=grad_logits.dtype)
        grad_embeddings = []
        for part, grads, places in zip(
            embeddings.split(at_once),
            grad_logits.split(at_once),
            points.split(at_once),
            strict=True,
        ):
            grad_maps = _spread(grads, places, ctx.size).flatten(1).to(features.dtype)
            grad_embeddings.append(torch.mm(grad_maps, features.t()))
            grad_features += torch.mm(part.t(), grad_maps)
        grad_embeddings = torch.cat(grad_embeddings).to(ctx.dtypes[0])
        return grad_embeddings, grad_features.unflatten(1, ctx.size).to(ctx.dtypes[1]), None


def _spread(values: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """The transpose of `sample_maps`: values (m, P) at points (m, P, 2) to maps (m, H, W)."""
    grid = (2 * points - 1).to(values.dtype).unsqueeze(1)
    maps = values.new_zeros(values.shape[0], 1, *size)  # only its shape matters
    grad_maps, _ = torch.ops.aten.grid_sampler_2d_backward(
        values[:, None, None], maps, grid, 0, 0, False, [True, False]
    )
    return grad_maps.squeeze(1)


def _maps_at_once(size: torch.Size) -> int:
    return max(1, MAP_ELEMENTS_AT_ONCE // max(1, size[0] * size[1]))
