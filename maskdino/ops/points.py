"""Masks at points: samples of feature maps, of packed masks, of mask logits never kept as maps.

Shape key: B images, C channels, H, W pixels of a map, M masks, P points. Points are (x, y) in
[0, 1] of the canvas, in float32 or more: rounded to half, they would lie up to a quarter of a pixel
from where the ground truth is read.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops.ms_deform_attn import has_compiled
from maskdino.structures import PackedMasks

MAP_ELEMENTS_AT_ONCE = 1 << 24  # mask logits that exist at one time (64 MiB of float32)
LABELS_AT_ONCE = 1 << 21  # samples of packed masks made at one time (some 80 bytes each)
# Numbers of a temporary tensor. A CPU keeps so many in its cache, and asks the system for no new
# memory; a GPU starts fewer kernels with more.
CPU_NUMBERS_AT_ONCE, NUMBERS_AT_ONCE = 1 << 18, 1 << 26


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
        (B, C, P), in the wider of the dtypes of maps and points.
    """
    dtype = torch.promote_types(maps.dtype, points.dtype)
    return F.grid_sample(
        maps.to(dtype),
        _grid(points, dtype),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    ).squeeze(2)


def _grid(points: Tensor, dtype: torch.dtype) -> Tensor:
    """Points (B, P, 2) as `grid_sample` wants them, (B, 1, P, 2) from -1 to 1."""
    return torch.rsub(points, -1, alpha=-2).to(dtype).unsqueeze(1)  # 2 x - 1 in one launch


def sample_packed_masks(masks: PackedMasks, index: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of packed masks: what `sample_maps` gives for float masks, never made.

    Args:
        masks: N masks.
        index: (M,) int64, which mask each row of points looks at.
        points: (M, P, 2), or (1, P, 2) for points that all rows share.

    Returns:
        (M, P) in [0, 1], in the points' dtype.
    """
    if points.dtype == torch.float32 and has_compiled("sample_packed_masks", points.device):
        return torch.ops.maskdino.sample_packed_masks(masks.bits, masks.size[1], index, points)
    at_once = max(1, LABELS_AT_ONCE // max(1, points.shape[1]))
    indices = index.split(at_once)
    places = [points] * len(indices) if points.shape[0] == 1 else points.split(at_once)
    return torch.cat(
        [
            _sample_packed_masks(masks, part, of_part)
            for part, of_part in zip(indices, places, strict=True)
        ]
    )


def _sample_packed_masks(masks: PackedMasks, index: Tensor, points: Tensor) -> Tensor:
    row, weight_y = _neighbors(points[..., 1], masks.size[0])  # (2, M or 1, P)
    column, weight_x = _neighbors(points[..., 0], masks.size[1])
    byte = (row * masks.bits.shape[2])[:, None] + (column >> 3)  # (2, 2, M or 1, P)
    shift = (7 - (column & 7)).to(torch.uint8)
    pixels = (masks.bits.flatten(1)[index[:, None], byte] >> shift) & 1  # (2, 2, M, P)
    return ((pixels * weight_x).sum(1) * weight_y).sum(0)


def _neighbors(coordinates: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cells on both sides of coordinates (...) in [0, 1] along an axis, and their bilinear weights.

    Returns:
        index (2, ...) int64 within the axis, and weight (2, ...), zero for cells beyond the axis.
    """
    position = coordinates * size - 0.5
    low = position.floor()
    cell = torch.stack([low, low + 1])
    inside = cell.clamp(0, size - 1)
    return inside.long(), (1 - (position - cell).abs()) * (inside == cell)


class PointSampler:
    """Draws the points at which masks are compared (PointRend; appendix B.1)."""

    def __init__(self, num_points: int, oversample_ratio: float, importance_ratio: float) -> None:
        """Sets the numbers.

        Args:
            num_points: P.
            oversample_ratio: candidates for each point of a loss.
            importance_ratio: share of the P points that are the most uncertain candidates.

        Raises:
            ValueError: if there are fewer candidates than points to choose.
        """
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_ratio)
        if self.num_candidates < self.num_uncertain:
            raise ValueError(
                f"{self.num_candidates} candidates are fewer than the {self.num_uncertain} to "
                "choose"
            )

    def sample_uniform(self, number: int, device: torch.device) -> Tensor:
        """(number, P, 2) uniform points."""
        return torch.rand(number, self.num_points, 2, device=device)

    def sample_uncertain(self, maps: Tensor) -> Tensor:
        """Points for the loss of each mask: most of them where the prediction is the least certain.

        The uncertainty of a candidate is that of the logit interpolated at it, and not an
        interpolation of the uncertainties of the cells around it (PointRend). Between two cells of
        logits -1 and 1, both quite certain, runs the border of the mask: the interpolated logit is
        0 there, as uncertain as can be; the mean of the cells' uncertainties would not show it.

        Args:
            maps: (M, H, W) mask logits.

        Returns:
            (M, P, 2).
        """
        number, device = maps.shape[0], maps.device
        parts = maps.split(items_at_once(2 * self.num_candidates, device))
        points = joined([self._most_uncertain(part) for part in parts])
        rest = torch.rand(number, self.num_points - self.num_uncertain, 2, device=device)
        return torch.cat([points, rest], dim=1)

    def _most_uncertain(self, maps: Tensor) -> Tensor:
        """Of candidates drawn for maps (m, H, W): (m, num_uncertain, 2)."""
        candidates = torch.rand(maps.shape[0], self.num_candidates, 2, device=maps.device)
        # The uncertainty is minus this: the largest are the smallest.
        certainty = sample_maps(maps.unsqueeze(1), candidates).squeeze(1).abs_()  # (m, candidates)
        chosen = certainty.topk(self.num_uncertain, dim=1, largest=False, sorted=False).indices
        return candidates.gather(1, chosen[..., None].expand(-1, -1, 2))


def items_at_once(numbers: int, device: torch.device) -> int:
    """How many items, of so many numbers each in a temporary tensor, are computed together."""
    at_once = CPU_NUMBERS_AT_ONCE if device.type == "cpu" else NUMBERS_AT_ONCE
    return max(1, at_once // max(1, numbers))


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts, one after the other along a dimension; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


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
    def forward(ctx, mask_embeddings, pixel_embedding, choose_points):
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
            at_once = items_at_once(points[-1][:1].numel(), maps.device)
            logits += [
                sample_maps(few.unsqueeze(1), places).squeeze(1)
                for few, places in zip(maps.split(at_once), points[-1].split(at_once), strict=True)
            ]
        logits, points = joined(logits), joined(points)
        ctx.save_for_backward(embeddings, features, points)
        ctx.size, ctx.dtypes = size, (mask_embeddings.dtype, pixel_embedding.dtype)
        ctx.mark_non_differentiable(points)
        return logits, points

    @staticmethod
    def backward(ctx, grad_logits, _):
        embeddings, features, points = ctx.saved_tensors
        at_once = _maps_at_once(ctx.size)
        if features.device.type == "cpu":
            at_once = min(at_once, items_at_once(ctx.size.numel() // 4, features.device))
        grad_features, grad_embeddings = None, []
        for part, grads, places in zip(
            embeddings.split(at_once),
            grad_logits.split(at_once),
            points.split(at_once),
            strict=True,
        ):
            grad_maps = _spread(grads, places, ctx.size).flatten(1).to(features.dtype)
            grad_embeddings.append(torch.mm(grad_maps, features.t()))
            of_part = torch.mm(part.t(), grad_maps)
            if grad_features is None:
                grad_features = of_part
            else:  # sums are not rounded to half
                grad_features = grad_features.to(grad_logits.dtype).add_(of_part)
        grad_embeddings = joined(grad_embeddings).to(ctx.dtypes[0])
        return grad_embeddings, grad_features.unflatten(1, ctx.size).to(ctx.dtypes[1]), None


def _spread(values: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """The transpose of `sample_maps`: values (m, P) at points (m, P, 2) to maps (m, H, W)."""
    if torch.are_deterministic_algorithms_enabled():
        return _spread_in_order(values, points, size)
    maps = values.new_empty(()).expand(values.shape[0], 1, *size)  # only its shape matters
    grad_maps, _ = torch.ops.aten.grid_sampler_2d_backward(
        values[:, None, None], maps, _grid(points, values.dtype), 0, 0, False, [True, False]
    )
    return grad_maps.squeeze(1)


def _spread_in_order(values: Tensor, points: Tensor, size: torch.Size) -> Tensor:
    """`_spread` with sums in an order that is the same each time; the kernel above has none."""
    row, weight_y = _neighbors(points[..., 1], size[0])  # (2, m, P)
    column, weight_x = _neighbors(points[..., 0], size[1])
    mask = torch.arange(len(values), device=values.device)[:, None]
    place = (mask * size[0] + row)[:, None] * size[1] + column  # (2, 2, m, P)
    parts = (values * weight_y)[:, None] * weight_x
    maps = values.new_zeros(len(values) * size[0] * size[1])
    return maps.index_put((place,), parts, accumulate=True).view(-1, *size)


def _maps_at_once(size: torch.Size) -> int:
    return max(1, MAP_ELEMENTS_AT_ONCE // max(1, size[0] * size[1]))
