"""Each loss against its formula in plain numbers, and each pairwise cost against its loss."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdino.losses import functional as losses
from tests.ops.test_boxes import slow_giou
from tests.pretend_device import PretendDevice, missing_api

NUMBER = 6
Loss = Callable[[Tensor, Tensor], Tensor]


def drawn_boxes() -> torch.Tensor:
    return torch.rand(NUMBER, 4, dtype=torch.float64) * 0.4 + 0.2


def test_focal_loss() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64) * 3
    is_target = (torch.rand(3, 4) < 0.5).double()
    found = losses.focal_loss(logits, is_target)
    for i in range(3):
        for k in range(4):
            p = 1 / (1 + math.exp(-logits[i, k].item()))
            positive = -0.25 * (1 - p) ** 2 * math.log(p)
            negative = -0.75 * p**2 * math.log(1 - p)
            expected = positive if is_target[i, k] else negative
            assert found[i, k].item() == pytest.approx(expected, abs=1e-9)


def test_focal_cost_is_positive_minus_negative_loss() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64) * 2
    gain = losses.focal_loss(logits, torch.ones_like(logits)) - losses.focal_loss(
        logits, torch.zeros_like(logits)
    )
    torch.testing.assert_close(losses.focal_cost(logits), gain, atol=1e-6, rtol=0)


def test_l1_and_giou() -> None:
    a, b = drawn_boxes(), drawn_boxes()
    for i in range(NUMBER):
        x, y = a[i].tolist(), b[i].tolist()
        distance = sum(abs(p - q) for p, q in zip(x, y, strict=True))
        assert losses.l1_loss(a, b)[i].item() == pytest.approx(distance)
        corners = ([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] for cx, cy, w, h in (x, y))
        expected = 1 - slow_giou(*corners)
        assert losses.giou_loss(a, b)[i].item() == pytest.approx(expected, abs=1e-4)


def test_mask_losses() -> None:
    logits = torch.randn(NUMBER, 9, dtype=torch.float64) * 3
    labels = torch.rand(NUMBER, 9, dtype=torch.float64)
    bce, dice = losses.mask_bce_loss(logits, labels), losses.mask_dice_loss(logits, labels)
    for i in range(NUMBER):
        pairs = [
            (1 / (1 + math.exp(-x)), t)
            for x, t in zip(*map(list, (logits[i], labels[i])), strict=True)
        ]
        expected = -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in pairs) / 9
        assert bce[i].item() == pytest.approx(expected.item())
        overlap = sum(p * t for p, t in pairs)
        total = sum(p + t for p, t in pairs)
        assert dice[i].item() == pytest.approx((1 - (2 * overlap + 1) / (total + 1)).item())


def check_pairs(found: Tensor, predicted: Tensor, wanted: Tensor, loss: Loss) -> None:
    """Every entry (..., Q, N) is the loss of that pair; so the diagonal is the loss."""
    assert found.shape == (*predicted.shape[:-1], wanted.shape[-2])
    for lead in np.ndindex(*predicted.shape[:-2]):
        for i in range(predicted.shape[-2]):
            for j in range(wanted.shape[-2]):
                expected = loss(predicted[lead][i : i + 1], wanted[lead][j : j + 1])[0]
                torch.testing.assert_close(found[lead][i, j], expected)


@pytest.mark.parametrize("name", ["mask_bce", "mask_dice"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_costs_of_masks_are_the_losses_of_pairs(name: str, lead: tuple[int, ...]) -> None:
    cost, loss = getattr(losses, f"{name}_cost"), getattr(losses, f"{name}_loss")
    predicted = torch.randn(*lead, NUMBER, 20).double() * 4
    wanted = (torch.rand(*lead, NUMBER - 1, 20) < 0.5).double()
    check_pairs(cost(predicted, wanted), predicted, wanted, loss)
    assert cost(predicted, wanted[..., :0, :]).shape == (*lead, NUMBER, 0)


@pytest.mark.skipif(bool(missing_api()), reason=missing_api() or "never")
@pytest.mark.parametrize("name", ["mask_bce", "mask_dice"])
@pytest.mark.parametrize("points", [40, 21])
def test_on_a_gpu_points_are_added_in_groups(name: str, points: int) -> None:
    """To the same costs: groups of points that divide their number, or all at once."""
    cost = getattr(losses, f"{name}_cost")
    predicted = torch.randn(2, NUMBER, points).double() * 4
    wanted = (torch.rand(2, NUMBER - 1, points) < 0.5).double()
    with PretendDevice() as device:
        device.clear()
        found = cost(device.put(predicted), device.put(wanted))
        assert device.launches["sum"] == (3 if name == "mask_dice" else 2) - points % 2
        torch.testing.assert_close(found.cpu(), cost(predicted, wanted))


@pytest.mark.parametrize("loss", [losses.l1_loss, losses.giou_loss])
def test_losses_of_boxes_broadcast_to_pairs(loss: Loss) -> None:
    predicted, wanted = drawn_boxes(), drawn_boxes()[1:]
    check_pairs(loss(predicted[:, None], wanted), predicted, wanted, loss)
    assert loss(predicted[:, None], wanted[:0]).shape == (NUMBER, 0)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_extreme_logits_stay_finite(value: float) -> None:
    logits = torch.full((2, 3), value, requires_grad=True)
    for label in (0.0, 1.0):
        labels = torch.full((2, 3), label)
        total = sum(
            f(logits, labels).sum()
            for f in (losses.focal_loss, losses.mask_bce_loss, losses.mask_dice_loss)
        )
        assert total.isfinite() and torch.autograd.grad(total, logits)[0].isfinite().all()
    assert losses.focal_cost(logits.detach()).isfinite().all()
    assert losses.mask_bce_cost(logits.detach(), torch.ones(1, 3)).isfinite().all()
