"""Weights in autocast's type: the numbers of autocast, and what was there before comes back."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from maskdino.modeling.half_weights import half_weights
from tests.helpers import drawn_batch, tiny_model

CPU = torch.device("cpu")
SIZES = ((64, 64), (48, 80))


def step(monkeypatch: pytest.MonkeyPatch, *, converted: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step in bfloat16."""
    torch.manual_seed(1)
    model = tiny_model(RECOMPUTE="all").train()
    model.backbone.stem.requires_grad_(False)
    own = dict(model.named_parameters())
    torch.manual_seed(2)
    batch = drawn_batch(SIZES, (3, 2))
    with monkeypatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        if not converted:
            patch.setattr("maskdino.model.half_weights", lambda *_: contextlib.nullcontext())
        losses = model(batch)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert all(value is own[name] for name, value in model.named_parameters())
    return total.detach(), {name: p.grad for name, p in own.items() if p.grad is not None}


def test_losses_and_gradients_are_those_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    total, grads = step(monkeypatch, converted=True)
    expected, expected_grads = step(monkeypatch, converted=False)
    assert torch.equal(total, expected)
    assert grads.keys() == expected_grads.keys()
    assert not any("stem" in name for name in grads)
    differing = 0
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        # Weights that are used before and after query selection sum their gradients in bfloat16.
        assert (grad - expected_grads[name]).norm() <= 0.02 * expected_grads[name].norm(), name
        differing += not torch.equal(grad, expected_grads[name])
    assert differing < len(grads) / 10


class Foreign(nn.Module):
    """Of a package that may leave autocast."""

    __module__ = "other.package"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x)


def test_what_is_converted() -> None:
    model = nn.ModuleDict(
        {
            "layer": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1)),
            "left": nn.Linear(4, 4),
            "wide": nn.Linear(4, 4).double(),
            "foreign": Foreign(),
        }
    )
    with half_weights(model, CPU):
        assert model["layer"][0].weight.dtype == torch.float32  # autocast is off
    with (
        pytest.raises(KeyError, match="raised"),
        torch.autocast("cpu", dtype=torch.bfloat16),
        half_weights(model, CPU, [model["left"]]),
    ):
        kinds = {name: m.weight.dtype for name, m in model.named_modules() if hasattr(m, "weight")}
        assert kinds == {
            "layer.0": torch.bfloat16,
            "layer.1": torch.float32,
            "layer.2": torch.bfloat16,
            "left": torch.float32,
            "wide": torch.float64,
            "foreign.linear": torch.float32,
        }
        raise KeyError("raised")
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values())
