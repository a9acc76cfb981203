"""Blocks of detectron2's ResNet in which what follows a convolution is one launch on a GPU.

A frozen norm or a bias, the residual sum and ReLU of a block each read and write a whole map; the
compiled library does them at once. In training that is each frozen norm's scale and shift, and the
backward pass needs the block's outputs alone, as PyTorch's ReLU in place does. In inference it is
the bias of a prepared network, into which norms are folded. All else runs as detectron2 wrote it.

Shape key: B images, C channels, H, W of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn

from maskdino.backbones.frozen_norm import FrozenNorm
from maskdino.integration.compat import change_class
from maskdino.ops.constants import is_traced
from maskdino.ops.ms_deform_attn import has_compiled
from maskdino.ops.recompute import recomputed

TYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedBasicBlock(BasicBlock):
    """Two convolutions and a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to a map of as many pixels by the stride."""
        convolutions = self.conv1, self.conv2
        if not _are_fused(x, *convolutions, self.shortcut):
            return super().forward(x)
        return _block(x, convolutions, self.shortcut)


class FusedBottleneckBlock(BottleneckBlock):
    """Three convolutions and a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to a map of as many pixels by the stride."""
        convolutions = self.conv1, self.conv2, self.conv3
        if not _are_fused(x, *convolutions, self.shortcut):
            return super().forward(x)
        return _block(x, convolutions, self.shortcut)


class FusedStem(BasicStem):
    """A convolution and a maximum."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H / 4, W / 4)."""
        if not _are_fused(x, self.conv1):
            return super().forward(x)
        if torch.is_autocast_enabled("cuda"):  # as the tensor cores want it: all maps follow
            dtype = torch.get_autocast_dtype("cuda")
            x = x.to(dtype, memory_format=torch.channels_last)
        return F.max_pool2d(_convolved(self.conv1, x, relu=True), 3, stride=2, padding=1)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    BottleneckBlock: FusedBottleneckBlock,
    BasicStem: FusedStem,
}


def fuse_blocks(module: nn.Module) -> nn.Module:
    """Makes each of detectron2's own blocks one of these (in place), and returns the module."""
    change_class(module, FUSED)
    return module


def recompute_first_stages(backbone: Backbone, level: str) -> None:
    """Lets a ResNet recompute its stem and its first stage at the level "all" (in place).

    Their maps are the largest, and their products the smallest. Names of weights stay. Other
    backbones stay as they are: those of timm have a key of their own,
    `MODEL.TIMM.ACTIVATION_CHECKPOINT`.
    """
    if isinstance(backbone, ResNet) and level == "all":
        for part in (backbone.stem, backbone.stages[0]):
            part.forward = partial(_recomputed, part)


def _recomputed(part: nn.Module, images: Tensor) -> Tensor:
    return recomputed(partial(type(part).forward, part), images, when=part.training)


def _block(x: Tensor, convolutions: Sequence[Conv2d], shortcut: Conv2d | None) -> Tensor:
    out = x
    for convolution in convolutions[:-1]:
        out = _convolved(convolution, out, relu=True)
    last = convolutions[-1]
    if shortcut is None:
        return _convolved(last, out, residual=x, relu=True)
    if last.norm is None and shortcut.norm is None:  # both biases at once
        bias = last.bias + shortcut.bias
        return _convolved(last, out, bias=bias, residual=_product(shortcut, x), relu=True)
    return _convolved(last, out, residual=_convolved(shortcut, x, relu=False), relu=True)


def _product(convolution: Conv2d, x: Tensor) -> Tensor:
    sizes = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return F.conv2d(x, convolution.weight, None, *sizes)


def _convolved(
    convolution: Conv2d,
    x: Tensor,
    *,
    relu: bool,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A convolution with its norm, or its or another bias; plus a residual; and perhaps ReLU."""
    made = _product(convolution, x)
    scale, shift = None, convolution.bias if bias is None else bias
    if convolution.norm is not None:
        scale, shift = convolution.norm.constants(torch.float32)
    if residual is not None:
        residual = residual.to(made.dtype)
    learned = made.requires_grad or (residual is not None and residual.requires_grad)
    if torch.is_grad_enabled() and learned:
        return torch.ops.maskdino.affine(made, scale, shift, residual, relu)
    torch.ops.maskdino.affine_(made, scale, shift, residual, relu)
    return made


def _are_fused(x: Tensor, *convolutions: Conv2d | None) -> bool:
    """Whether the library computes what follows all of these convolutions."""
    return (
        x.is_cuda
        and x.dtype in TYPES
        and not is_traced()
        and has_compiled("affine", x.device)
        and all(c is None or _is_simple(c) for c in convolutions)
    )


def _is_simple(convolution: nn.Module) -> bool:
    """Whether it has a frozen norm, or in inference a bias, and nobody looks into it."""
    if (
        type(convolution) is not Conv2d
        or convolution.activation is not None
        or _is_seen(convolution)
    ):
        return False
    norm, weight, bias = convolution.norm, convolution.weight, convolution.bias
    if weight.dtype not in TYPES:
        return False
    if torch.is_grad_enabled():
        return type(norm) is FrozenNorm and bias is None and not _is_seen(norm)
    return norm is None and bias is not None and bias.dtype in (torch.float32, weight.dtype)


def _is_seen(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None
