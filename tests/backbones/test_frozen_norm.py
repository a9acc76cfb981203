"""Frozen batch norm against detectron2's."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskdino.backbones import build_backbone
from maskdino.backbones.frozen_norm import FrozenNorm, keep_frozen_norms
from tests.helpers import tiny_cfg


def drawn_norm(channels: int = 5) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels, eps=1e-3)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(channels) + 0.5)
    return norm


class Counter(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not func.is_view and "detach" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_values_and_gradients_are_detectron2s(requires_grad: bool) -> None:
    theirs = drawn_norm()
    ours = FrozenNorm.of(theirs)
    assert isinstance(ours, FrozenBatchNorm2d)
    x = torch.randn(2, 5, 4, 3, requires_grad=requires_grad)
    expected = theirs(x)
    for _ in range(2):
        torch.testing.assert_close(ours(x), expected)
    if requires_grad:
        weights = torch.randn_like(expected)
        (found,) = torch.autograd.grad((ours(x) * weights).sum(), x)
        (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
        torch.testing.assert_close(found, wanted)


def test_one_operation_once_the_constants_are_known() -> None:
    norm, x = FrozenNorm.of(drawn_norm()), torch.randn(1, 5, 2, 2, requires_grad=True)
    norm(x)
    with Counter() as counter:
        norm(x)
    assert counter.number == 1


def test_half_precision_is_rounded_once() -> None:
    norm = FrozenNorm.of(drawn_norm())
    x = torch.randn(1, 5, 8, 8).bfloat16().requires_grad_()
    found = norm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, norm(x.float()).bfloat16(), atol=0.03, rtol=0.01)
    first = norm.constants(torch.bfloat16)
    assert norm(x.float()).dtype == torch.float32  # constants of each dtype
    assert norm.constants(torch.bfloat16) is first  # a CUDA graph may read them


def test_constants_follow_the_weights() -> None:
    """Loaded, replaced, copied and changed in place."""
    norm, x = FrozenNorm.of(drawn_norm()), torch.randn(1, 5, 2, 2, requires_grad=True)
    before = norm(x)
    other = drawn_norm()
    norm.load_state_dict(other.state_dict())
    torch.testing.assert_close(norm(x), other(x))
    assert not torch.allclose(norm(x), before)
    copied = copy.deepcopy(norm)
    copied.bias.add_(3)
    torch.testing.assert_close(copied(x), other(x) + 3)
    norm.bias.add_(1)
    torch.testing.assert_close(norm(x), other(x) + 1)
    for value in (2.0, 3.0):  # another tensor, as after a move to another device
        norm.bias = other.bias.new_full((5,), value)
        torch.testing.assert_close(norm(x), other(x) - other.bias.view(-1, 1, 1) + value)
    norm.double()
    expected = (other(x) - other.bias.view(-1, 1, 1) + 3).double()
    torch.testing.assert_close(norm(x.double()), expected, atol=1e-5, rtol=0)


def test_nothing_else_is_replaced() -> None:
    body = nn.Sequential(nn.Sequential(drawn_norm(), nn.BatchNorm2d(5)), drawn_norm())
    names, first = list(body.state_dict()), body[0][0]
    weight = first.weight
    assert keep_frozen_norms(body) is body
    assert type(body[0][0]) is FrozenNorm and type(body[1]) is FrozenNorm
    assert type(body[0][1]) is nn.BatchNorm2d
    assert list(body.state_dict()) == names and body[0][0].weight is weight


def test_resnets_have_them() -> None:
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    norms = [m for m in build_backbone(cfg).modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 53 and all(type(norm) is FrozenNorm for norm in norms)
