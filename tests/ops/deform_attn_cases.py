"""Inputs and an obvious reference for the tests of deformable attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.sampling import bilinear


@dataclass(frozen=True)
class Case:
    """Sizes of one call; see :mod:`maskdino.ops.ms_deform_attn` for the letters."""

    shapes: tuple[tuple[int, int], ...] = ((4, 6), (3, 2), (1, 1))
    images: int = 2
    queries: int = 5
    heads: int = 3
    channels: int = 8
    points: int = 4

    @property
    def tokens(self) -> int:
        """S."""
        return sum(height * width for height, width in self.shapes)

    @property
    def flat_shapes(self) -> list[int]:
        """[H0, W0, H1, W1, ...]."""
        return [size for shape in self.shapes for size in shape]

    def value(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random features, (B, S, M, D)."""
        size = (self.images, self.tokens, self.heads, self.channels)
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def locations(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random locations inside and outside the maps, never on a line of pixel centers."""
        size = (self.images, self.queries, self.heads, len(self.shapes), self.points, 2)
        sides = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float64)[:, None]
        cells = torch.floor((torch.rand(size, dtype=torch.float64) * 1.6 - 0.3) * sides)
        inside_cell = 0.1 + 0.8 * torch.rand(size, dtype=torch.float64)
        return ((cells + 0.5 + inside_cell) / sides).to(dtype)

    def weights(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random weights of both signs, (B, Q, M, L, P)."""
        size = (self.images, self.queries, self.heads, len(self.shapes), self.points)
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def offsets_and_logits(
        self, dtype: torch.dtype = torch.float64, per_token: bool = False
    ) -> Tensor:
        """Random output of a linear layer; offsets of quarter pixels off the whole numbers."""
        queries = self.tokens if per_token else self.queries
        samples = self.heads * len(self.shapes) * self.points
        offsets = torch.randint(-3, 4, (self.images, queries, samples * 2)) + 0.3
        logits = torch.randn(self.images, queries, samples)
        return torch.cat((offsets, logits), dim=2).to(dtype)

    def reference(self, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random points (size 2) or boxes (size 4), (B, Q, size)."""
        return torch.rand(self.images, self.queries, size, dtype=torch.float64).to(dtype)


def slow_ms_deform_attn(
    value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable attention as written in the paper, one sample at a time, in float64."""
    num_images, num_queries, num_heads = locations.shape[:3]
    output = torch.zeros(num_images, num_queries, num_heads, value.shape[3], dtype=torch.float64)
    levels = value.double().split([h * w for h, w in shapes], dim=1)
    for b, q, m, level, p in torch.cartesian_prod(
        *(torch.arange(size) for size in locations.shape[:5])
    ).tolist():
        picture = levels[level][b, :, m].reshape(*shapes[level], -1)
        x, y = locations[b, q, m, level, p].tolist()
        output[b, q, m] += weights[b, q, m, level, p].double() * bilinear(picture, x, y)
    return output.flatten(2)


def slow_locations(
    case: Case, offsets_and_logits: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Locations and weights of the fused form, one sample at a time, in float64."""
    num_levels, points = len(case.shapes), case.points
    samples = case.heads * num_levels * points
    queries = offsets_and_logits.shape[1]
    size = (case.images, queries, case.heads, num_levels, points)
    offsets = offsets_and_logits[..., : 2 * samples].double().reshape(*size, 2)
    logits = offsets_and_logits[..., 2 * samples :].double().reshape(*size[:3], -1)
    centers = [
        ((i + 0.5) / w, (j + 0.5) / h) for h, w in case.shapes for j in range(h) for i in range(w)
    ]
    locations = torch.zeros(*size, 2, dtype=torch.float64)
    for b, q, m, level, p in torch.cartesian_prod(*(torch.arange(n) for n in size)).tolist():
        where = centers[q] if reference is None else reference[b, q].tolist()
        height, width = case.shapes[level]
        x, y = offsets[b, q, m, level, p].tolist()
        if len(where) == 4:
            x, y = x / points * where[2] * 0.5, y / points * where[3] * 0.5
        else:
            x, y = x / width, y / height
        locations[b, q, m, level, p, 0] = where[0] + x
        locations[b, q, m, level, p, 1] = where[1] + y
    return locations, logits.softmax(dim=3).reshape(size)
