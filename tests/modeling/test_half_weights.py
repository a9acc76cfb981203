"""Weights in autocast's type: the numbers of autocast, and what was there before comes back."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskdino.modeling.half_weights import _Converted, _has_layouts, half_weights
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


@pytest.mark.parametrize(("several", "nodes"), [(False, 1), (True, 3)])
def test_gradients_of_layers_wait_for_each_other_in_one_process_alone(
    several: bool, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    model = nn.ModuleDict({"part": nn.ModuleDict({"layers": layers})})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
    with torch.autocast("cpu", dtype=torch.bfloat16), half_weights(model, CPU):
        found = {linear.weight.grad_fn for layer in layers for linear in layer}
    assert len(found) == nodes


class Copies(TorchDispatchMode):
    """Counts operations that copy or make a clone."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.names[name] += name in ("clone", "copy_", "_to_copy", "_foreach_copy_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("own", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_channels_last_and_gradients_as_weights(own: torch.memory_format) -> None:
    """A launch for each kernel that is turned, one for all others, none by the engine."""
    shapes = ((8, 4, 3, 3), (8, 8, 1, 1), (4, 8, 3, 3), (4,))
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in (w for w in weights if w.dim() == 4):
        weight.data = weight.data.contiguous(memory_format=own)
    turned = [_has_layouts(weight) for weight in weights]
    again = own == torch.contiguous_format
    assert turned == [again, False, again, False]
    with Copies() as copies:
        halves = _Converted.apply(torch.bfloat16, turned, *weights)
    expected = Counter(_foreach_copy_=1, copy_=sum(turned))
    assert copies.names == expected
    assert all(torch.equal(h, w.bfloat16()) for h, w in zip(halves, weights, strict=True))
    for half in halves[:3]:
        assert half.is_contiguous(memory_format=torch.channels_last)
    # What cuDNN gives: gradients in the layout of the maps.
    last = [torch.randn_like(half, memory_format=torch.preserve_format) for half in halves]
    last[1] = last[1].as_strided((8, 8, 1, 1), (8, 1, 8, 8))
    with Copies() as copies:
        torch.autograd.backward(halves, last)
    assert copies.names == expected
    for weight, grad in zip(weights, last, strict=True):
        assert torch.equal(weight.grad, grad.float())
        assert weight.grad.stride() == weight.stride() or weight.shape[2:] == (1, 1)


def test_only_maps_on_a_gpu_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    model = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)])
    found = {}
    for kind in ("cpu", "cuda"):
        with half_weights(model, torch.device(kind), (), [model[1]]):
            found[kind] = [
                layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in model
            ]
    assert found == {"cpu": [False, False], "cuda": [False, True]}
