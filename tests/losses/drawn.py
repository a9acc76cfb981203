"""Drawn predictions and objects for the tests of matching and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdino.ops.points import PointSampler
from maskdino.structures import Outputs, PackedMasks, Predictions, Targets

CLASSES, CHANNELS, SIZE = 4, 6, (9, 13)


class FixedPoints(PointSampler):
    """Gives the same points at each draw, so that a slow computation sees them too."""

    def __init__(self, number: int = 25) -> None:
        super().__init__(number, 1.0, 0.0)
        self.points = torch.rand(number, 2)

    def sample_uniform(self, number: int, device: torch.device) -> Tensor:
        return self.points.to(device).expand(number, -1, -1)

    def sample_uncertain(self, maps: Tensor) -> Tensor:
        return self.points.to(maps.device).expand(len(maps), -1, -1)


def drawn_targets(counts: Sequence[int], stuff: Sequence[int] = ()) -> Targets:
    """Objects with random masks; classes in `stuff` are no things."""
    number = sum(counts)
    labels = torch.randint(0, CLASSES, (number,))
    return Targets(
        labels=labels,
        boxes=torch.rand(number, 4) * 0.4 + 0.2,
        is_thing=~torch.isin(labels, torch.tensor(list(stuff), dtype=torch.int64)),
        has_mask=torch.ones(number, dtype=torch.bool),
        masks=PackedMasks.from_bool(torch.rand(number, *SIZE) < 0.5),
        counts=tuple(counts),
        names=tuple(f"drawn_{i}.png" for i in range(len(counts))),
    )


def drawn_predictions(
    outputs: int, images: int, queries: int, no_object: bool = False
) -> tuple[Predictions, Tensor]:
    """Predictions (O, B, Q, ...) and the pixel embedding (B, C, H, W), with gradients."""
    lead = (outputs, images, queries)
    predictions = Predictions(
        torch.randn(*lead, CLASSES + no_object).requires_grad_(),
        (torch.rand(*lead, 4) * 0.4 + 0.2).requires_grad_(),
        torch.randn(*lead, CHANNELS).requires_grad_(),
    )
    return predictions, torch.randn(images, CHANNELS, *SIZE).requires_grad_()


def named(predictions: Predictions, *names: str) -> Outputs:
    """Outputs with these endings of their losses' names."""
    return Outputs(predictions, names)
