"""Tests of maskdino.engine.solver."""

import pytest
import torch
from torch import nn

from maskdino.config import load_config
from maskdino.engine.solver import build_gradient_clipper, build_optimizer


class Model(nn.Module):
    """One parameter of every kind that is treated on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.backbone.register_parameter("absolute_pos_embed", nn.Parameter(torch.ones(2)))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(2, 4)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.again = self.linear


def config(*overrides: str):
    return load_config(None, ["SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY", "0.05", *overrides])


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_four_groups_by_rate_and_decay(name: str) -> None:
    model = Model()
    optimizer = build_optimizer(config("SOLVER.OPTIMIZER", name), model)
    found = {
        (round(group["lr"], 6), group["weight_decay"]): sorted(map(id, group["params"]))
        for group in optimizer.param_groups
    }

    def ids(*parameters: nn.Parameter) -> list[int]:
        return sorted(map(id, parameters))

    convolution, norm = model.backbone
    assert found == {
        (0.01, 0.05): ids(convolution.weight, convolution.bias),
        (0.01, 0.0): ids(norm.weight, norm.bias, model.backbone.absolute_pos_embed),
        (0.1, 0.05): ids(model.linear.weight, model.linear.bias),
        (0.1, 0.0): ids(model.norm.weight, model.norm.bias, model.embedding.weight),
    }


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_fused_step_where_it_is_asked_for_and_there_is_one(
    name: str, device: str, asked: bool
) -> None:
    optimizer = build_optimizer(config("SOLVER.OPTIMIZER", name), Model().to(device), fused=asked)
    assert optimizer.defaults["fused"] is (asked and device == "cpu")


def test_biases_have_their_own_keys() -> None:
    cfg = config("SOLVER.WEIGHT_DECAY_BIAS", "0.01", "SOLVER.BIAS_LR_FACTOR", "2.0")
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    settings = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert settings == {(0.1, 0.05), (0.2, 0.01)}


@pytest.mark.parametrize(("nesterov", "moves"), [(False, [1.0, 1.5]), (True, [1.5, 1.75])])
def test_momentum_of_stochastic_descent(nesterov: bool, moves: list[float]) -> None:
    """Momentum 1/2, gradients of 1: velocities 1 and 1.5; Nesterov adds half of each to 1."""
    overrides = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.0")
    model = nn.Linear(1, 1, bias=False)
    cfg = config(*overrides, "SOLVER.NESTEROV", str(nesterov))
    optimizer = build_optimizer(cfg, model)
    expected = model.weight.item()
    for move in moves:
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        expected -= 0.1 * move
        assert model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_unknown_optimizer_and_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="'LION'; use 'ADAMW' or 'SGD'"):
        build_optimizer(config("SOLVER.OPTIMIZER", "LION"), Model())
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(config(), nn.Linear(1, 1).requires_grad_(False))


def gradients() -> list[nn.Parameter]:
    parameters = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.zeros(2)),
    ]
    parameters[0].grad = torch.tensor([3.0, 0.0, -4.0])
    parameters[1].grad = torch.tensor([12.0])
    return parameters


def clip(kind: str, value: float, enabled: bool = True) -> tuple[torch.Tensor, list[nn.Parameter]]:
    keys = ("ENABLED", str(enabled), "CLIP_TYPE", kind, "CLIP_VALUE", str(value))
    names = [f"SOLVER.CLIP_GRADIENTS.{word}" if i % 2 == 0 else word for i, word in enumerate(keys)]
    parameters = gradients()
    return build_gradient_clipper(config(*names))(parameters), parameters


@pytest.mark.parametrize(
    ("kind", "value", "enabled", "first", "second"),
    [
        ("full_model", 1.3, True, [0.3, 0.0, -0.4], [1.2]),
        ("full_model", 100.0, True, [3.0, 0.0, -4.0], [12.0]),
        ("norm", 2.5, True, [1.5, 0.0, -2.0], [2.5]),
        ("value", 3.5, True, [3.0, 0.0, -3.5], [3.5]),
        ("full_model", 1.3, False, [3.0, 0.0, -4.0], [12.0]),
    ],
)
def test_clipping(kind: str, value: float, enabled: bool, first: list, second: list) -> None:
    norm, parameters = clip(kind, value, enabled)
    assert norm.item() == pytest.approx(13.0)  # before clipping
    torch.testing.assert_close(parameters[0].grad, torch.tensor(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parameters[1].grad, torch.tensor(second), atol=1e-5, rtol=1e-5)
    assert parameters[2].grad is None


def test_bad_clipping() -> None:
    with pytest.raises(ValueError, match="'everything'; use 'full_model'"):
        clip("everything", 1.0)
    with pytest.raises(ValueError, match=r"positive, but is 0\.0"):
        clip("norm", 0.0)
