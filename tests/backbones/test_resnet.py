"""Fused blocks of a ResNet against detectron2's, on a device that computes on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from maskdino.backbones import resnet
from maskdino.backbones.frozen_norm import keep_frozen_norms
from maskdino.backbones.resnet import FusedBottleneckBlock, fuse_blocks
from maskdino.modeling.half_weights import half_weights
from maskdino.modeling.prepared import Prepared
from maskdino.ops import _library
from maskdino.ops.recompute import recomputed
from tests.pretend_backward import backward
from tests.pretend_device import CUDA, OnDevice, PretendDevice, missing_api
from tests.test_pretend_device import entered

pytestmark = [
    pytest.mark.skipif(bool(missing_api()), reason=missing_api()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
    pytest.mark.skipif(not _library.has("affine"), reason="the library lacks the operator"),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    monkeypatch.setattr(OnDevice, "backward", backward, raising=False)
    with entered() as device:
        yield device


def drawn_blocks(norm: str = "FrozenBN") -> nn.Sequential:
    """All that detectron2 has, with and without a shortcut."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        BasicStem(3, 8, norm=norm),
        BasicBlock(8, 8, norm=norm),
        BasicBlock(8, 12, stride=2, norm=norm),
        BottleneckBlock(12, 16, bottleneck_channels=4, norm=norm),
        BottleneckBlock(16, 16, bottleneck_channels=4, norm=norm, num_groups=2, stride_in_1x1=True),
    )
    for module in blocks.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.weight.detach().uniform_(0.5, 1.5)
            module.running_mean.normal_()
            module.bias.detach().normal_()
    return keep_frozen_norms(blocks)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def stepped(device: PretendDevice, blocks: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of a step."""
    made = blocks(device.put(images()))
    (made * made).sum().backward()
    return made.detach().numbers, {
        name: p.grad.numbers for name, p in blocks.named_parameters() if p.grad is not None
    }


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    assert (found - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("frozen", [0, 1, 2, 5])
def test_outputs_and_gradients_are_detectron2s(device: PretendDevice, frozen: int) -> None:
    """Also where the first blocks are frozen."""
    blocks = drawn_blocks()
    for block in blocks[:frozen]:
        block.requires_grad_(False)
    if frozen == 5:
        blocks[4].conv3.weight.requires_grad_()
    fused = device.put(fuse_blocks(copy.deepcopy(blocks)))
    blocks = device.put(blocks)
    made, grads = stepped(device, fused)
    assert not {"addcmul", "relu", "relu_", "add_"} & device.launches.keys()
    assert device.launches["affine"] + device.launches["affine_"] == 13
    expected, expected_grads = stepped(device, blocks)
    assert_close(made, expected)
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name])


def kept_bytes(device: PretendDevice, blocks: nn.Module) -> int:
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made = blocks(device.put(images()))
    assert made.requires_grad
    return sum(kept.values())


def test_no_more_is_kept_for_the_backward_pass(device: PretendDevice) -> None:
    blocks, fused = device.put(drawn_blocks()), device.put(fuse_blocks(drawn_blocks()))
    for each in (blocks, fused):
        each(device.put(images()))  # makes what frozen norms keep
    assert 0 < kept_bytes(device, fused) <= kept_bytes(device, blocks)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_blocks(device: PretendDevice, norm: str, dtype: torch.dtype) -> None:
    """Folded norms leave biases: each is part of one launch, those of a sum together."""
    exact = drawn_blocks(norm).eval()(images())
    blocks = device.put(fuse_blocks(drawn_blocks(norm))).eval()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        network = Prepared().of(blocks, (), CUDA)
        assert network is not blocks
        network(device.put(images()))
        device.clear()
        made = network(device.put(images()))
    assert device.launches["affine_"] == 11 and device.launches["add"] == 2
    assert not {"relu", "relu_", "add_"} & device.launches.keys()
    error = (made.numbers.float() - exact).norm() / exact.norm()
    assert made.dtype == dtype and error < (1e-5 if dtype == torch.float32 else 0.02)


def test_training_in_half_precision_is_channels_last(device: PretendDevice) -> None:
    """From the stem on; gradients of weights lie as these do."""
    autocast = torch.autocast("cuda", dtype=torch.bfloat16)
    with autocast:
        expected, expected_grads = stepped(device, device.put(fuse_blocks(drawn_blocks())))
    blocks = device.put(fuse_blocks(drawn_blocks()))
    layouts = []
    for module in blocks.modules():
        if isinstance(module, BasicStem | BasicBlock | BottleneckBlock):
            module.register_forward_hook(lambda *args: layouts.append(args[-1]))
    with autocast, half_weights(blocks, CUDA, (), [blocks]):
        made = blocks(device.put(images()))
    (made * made).sum().backward()
    assert len(layouts) == 5
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in layouts)
    assert made.dtype == torch.bfloat16
    assert_close(made.numbers, expected, 0.01)
    for name, weight in blocks.named_parameters():
        assert weight.grad.dtype == torch.float32 and weight.grad.is_contiguous()
        assert_close(weight.grad.numbers, expected_grads[name], 0.01)


def test_recomputed_blocks_have_the_same_gradients(device: PretendDevice) -> None:
    """Also when the weights that were converted are gone."""
    found = []
    for recompute in (False, True):
        blocks = device.put(fuse_blocks(drawn_blocks()))
        for block in blocks[: 3 * recompute]:
            block.forward = partial(recomputed, partial(type(block).forward, block))
        autocast = torch.autocast("cuda", dtype=torch.bfloat16)
        with autocast, half_weights(blocks, CUDA, (), [blocks]):
            made = blocks(device.put(images()))
        device.clear()
        (made * made).sum().backward()
        assert (device.launches["affine"] > 0) == recompute
        found.append({name: p.grad.numbers for name, p in blocks.named_parameters()})
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, 0.01)


class Subclass(BottleneckBlock):
    """Of somebody else."""


def unfused(how: str) -> nn.Module:
    blocks = drawn_blocks("BN" if how == "trained norms" else "FrozenBN")
    block = blocks[3]
    if how == "subclass":
        block.__class__ = Subclass
    elif how == "hook":
        block.conv2.register_forward_hook(lambda *_: None)
    elif how == "hook of a norm":
        block.conv2.norm.register_forward_pre_hook(lambda *_: None)
    elif how == "activation":
        block.conv1.activation = nn.Tanh()
    elif how == "patched":
        block.conv1.forward = block.conv1.forward
    elif how == "other norm":
        block.conv1.norm = FrozenBatchNorm2d(4)
    elif how == "double":
        blocks.double()
    return fuse_blocks(blocks)[3]


UNFUSED = ("subclass", "hook", "hook of a norm", "activation", "patched", "other norm", "double")


@pytest.mark.parametrize("how", [*UNFUSED, "trained norms"])
def test_what_runs_as_it_is(device: PretendDevice, how: str) -> None:
    block = device.put(unfused(how))
    x = torch.randn(1, 12, 4, 4, dtype=block.conv1.weight.dtype)
    block(device.put(x))
    assert "affine" not in device.launches and device.launches["relu_"] == 3
    assert isinstance(block, FusedBottleneckBlock) != (how == "subclass")


def test_without_the_operator_all_runs_as_it_is(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = device.put(fuse_blocks(drawn_blocks()))
    made, grads = stepped(device, blocks)
    blocks.zero_grad()
    monkeypatch.setattr(resnet, "has_compiled", lambda *_: False)
    device.clear()
    expected, expected_grads = stepped(device, blocks)
    assert device.launches["addcmul"] == 13 and "affine" not in device.launches
    assert_close(made, expected)
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name])


def test_names_of_weights_stay() -> None:
    blocks = drawn_blocks()
    names = list(blocks.state_dict())
    assert list(fuse_blocks(blocks).state_dict()) == names
    assert isinstance(blocks[1], BasicBlock) and isinstance(blocks[3], FusedBottleneckBlock)
