"""Group norms of maps, with what stands before and behind them.

PyTorch norms in float32 what autocast computed in half precision, contiguous what was
channels-last, with one block of threads for a group. The compiled library reads and writes maps as
the products around them do, in two launches.

Shape key: B images, C channels, H, W of a map.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdino.modeling.layers import is_hooked, rounded
from maskdino.ops.constants import is_traced
from maskdino.ops.ms_deform_attn import has_compiled

MAP_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_norm(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    to: torch.dtype | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    coarse: Tensor | None = None,
) -> Tensor:
    """Group norm, then ReLU or the sum with a coarser map.

    Args:
        norm: where it is fused, results are rounded once.
        x: (B, C, H, W).
        to: the type that the next product reads, and of the result where it is fused.
        shift: (C,), added to x before, where nothing is learned.
        relu: whether ReLU follows.
        coarse: (B, C, h, w), resized bilinearly to H x W and added.

    Returns:
        (B, C, H, W), on a GPU in half precision channels-last.
    """
    if not _is_fused(norm, x) or (shift is not None and torch.is_grad_enabled()):
        normed = norm(x if shift is None else x + shift[:, None, None])
        if coarse is None:
            return F.relu(normed) if relu else normed
        size = x.shape[2:]
        resized = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return rounded(torch.add, normed, resized, to=to or normed.dtype)
    if to is None:
        to = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    if x.dtype != torch.float32:  # in float32 sums of other layouts would show: see `prepared`
        x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.maskdino.group_norm(
        x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, relu, coarse, to
    )[0]


def projected(projection: nn.Module, x: Tensor) -> Tensor:
    """A convolution and its group norm, which adds the bias where both are fused.

    Args:
        projection: `nn.Sequential` of the two, or what somebody put in its place.
        x: (B, channels, H, W).
    """
    if not isinstance(projection, nn.Sequential) or len(projection) != 2 or is_hooked(projection):
        return projection(x)
    convolution, norm = projection
    if not _is_fused(norm, x):
        return projection(x)
    if not is_plain(convolution):
        return group_norm(norm, convolution(x))
    made = convolution._conv_forward(x, convolution.weight, None)
    return group_norm(norm, made, shift=convolution.bias)


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of 1 x 1, (B, C, H, W) to (B, channels, H, W).

    Channels last on a GPU it is a product of rows, which adds the bias by itself.
    """
    rows = x.permute(0, 2, 3, 1)
    if not (x.is_cuda and is_plain(convolution) and rows.is_contiguous()):
        return convolution(x)
    return F.linear(rows, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def is_plain(convolution: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution need not be called: gradients, tracers and hooks see it by itself."""
    return (
        type(convolution) is nn.Conv2d
        and not (torch.is_grad_enabled() or is_traced())
        and not is_hooked(convolution)
    )


def _is_fused(norm: nn.Module, x: Tensor) -> TypeGuard[nn.GroupNorm]:
    return (
        x.is_cuda
        and x.dtype in MAP_TYPES
        and type(norm) is nn.GroupNorm
        and norm.weight is not None
        and norm.weight.dtype == torch.float32
        and not (is_traced() or is_hooked(norm))
        and has_compiled("group_norm", x.device)
    )
