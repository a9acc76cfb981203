"""Weights in autocast's type for a training step, those of a part converted at once.

Autocast converts each weight when it is read, and its gradient on the way back. With some 300 of
them these are most of a step's conversions, and a launch each. Here one launch converts the weights
of a part, such as the decoder, and one their gradients: the same numbers. Where several processes
train, parts are layers: gradients are sent while those of layers before are computed.

On a GPU tensor cores want maps channels-last, and cuDNN turns what is not, each time it reads it:
maps, weights and gradients. Maps follow the kernels. So these are converted into that layout, a
launch each, and their gradients back into that of the weights, which the engine keeps as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from maskdino.modeling.attention import SelfAttention

# Whoever calls these converts the weights to autocast's type, and uses them for nothing else.
CONVERTING = (nn.Linear.forward, nn.Conv2d.forward, Conv2d.forward, SelfAttention.forward)
# Modules of others may leave autocast for a while, and then need their weights as they are.
KNOWN_PACKAGES = ("torch", "detectron2", "maskdino")
LAYER_DEPTH = 3  # names of one layer begin with the same words: "encoder.layers.0"

Place = tuple[nn.Module, str]  # of a weight: its module, and its name there


@contextmanager
def half_weights(
    model: nn.Module,
    device: torch.device,
    leave: Iterable[nn.Module] = (),
    maps: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Within, where autocast is on, modules hold converted weights in the place of their own.

    One thread at a time. What is computed again for the backward pass, when this is over, reads the
    weights themselves, which autocast then converts.

    Args:
        model: whose children may be of others.
        device: where it is.
        leave: modules within that compute in the type of their weights.
        maps: modules whose convolutions, on a GPU, are to make their maps channels-last.
    """
    if not torch.is_autocast_enabled(device.type) or torch.compiler.is_compiling():
        yield
        return
    dtype, before = torch.get_autocast_dtype(device.type), dict[Place, nn.Parameter]()
    turned = {m for part in maps for m in part.modules()} if device.type == "cuda" else set()
    try:
        parts = defaultdict[str, dict[Place, nn.Parameter]](dict)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        for place, (layer, weight) in convertible_weights(model, leave).items():
            parts[layer if several else layer.partition(".")[0]][place] = weight
        for weights in parts.values():
            before |= weights
            last = [module in turned and _has_layouts(w) for (module, _), w in weights.items()]
            converted = _Converted.apply(dtype, last, *weights.values())
            for (module, name), weight in zip(weights, converted, strict=True):
                module._parameters[name] = weight
        yield
    finally:
        for (module, name), weight in before.items():
            module._parameters[name] = weight


def convertible_weights(
    model: nn.Module, leave: Iterable[nn.Module] = ()
) -> dict[Place, tuple[str, nn.Parameter]]:
    """The float32 weights that autocast would convert, each with the name of its layer.

    Args:
        model: whose children may be of others.
        leave: modules within that compute in the type of their weights.
    """
    # Compiled ones convert where they compute.
    compiled = (module for module in model.modules() if module._compiled_call_impl is not None)
    left = {part for module in (*leave, *compiled) for part in module.modules()}
    found: dict[Place, tuple[str, nn.Parameter]] = {}
    for child_name, child in model.named_children():
        if any(type(m).__module__.split(".")[0] not in KNOWN_PACKAGES for m in child.modules()):
            continue
        for name, module in child.named_modules(prefix=child_name):
            if module in left or type(module).forward not in CONVERTING:
                continue
            layer = ".".join(name.split(".")[:LAYER_DEPTH])
            for key, weight in module._parameters.items():
                if weight is not None and weight.dtype == torch.float32:
                    found[module, key] = (layer, weight)
    return found


def _has_layouts(weight: Tensor) -> bool:
    """Whether it is a contiguous kernel that has another form channels-last."""
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return weight.dim() == 4 and weight.is_contiguous() and not last


class _Converted(torch.autograd.Function):
    """Tensors in another type, in one launch each way but for those in another layout."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, last: Sequence[bool], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.last = last
        converted = _copied(weights, dtype, last, torch.channels_last)
        ctx.mark_non_differentiable(
            *(c for c, w in zip(converted, weights, strict=True) if not w.requires_grad)
        )
        return tuple(converted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [
            (grad, last) for grad, last in zip(grads, ctx.last, strict=True) if grad is not None
        ]
        tensors, last = [grad for grad, _ in there], [turned for _, turned in there]
        full = iter(_copied(tensors, torch.float32, last, torch.contiguous_format))
        return None, None, *(None if grad is None else next(full) for grad in grads)


def _copied(
    sources: Sequence[Tensor],
    dtype: torch.dtype,
    turned: Sequence[bool],
    layout: torch.memory_format,
) -> list[Tensor]:
    """Copies, some of them in a layout."""
    copies, alike = [], []
    for x, turn in zip(sources, turned, strict=True):
        dense = x.is_contiguous()
        plain = torch.contiguous_format if dense else torch.preserve_format
        made = torch.empty_like(x, dtype=dtype, memory_format=layout if turn else plain)
        copies.append(made)
        # Tensors of other strides would be copied one by one, and all others with them.
        if (dense and made.is_contiguous()) or made.stride() == x.stride():
            alike.append((made, x))
        else:
            made.copy_(x)
    if alike:
        torch._foreach_copy_([made for made, _ in alike], [x for _, x in alike])
    return copies
