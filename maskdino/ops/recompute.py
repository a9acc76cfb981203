"""What the backward pass of a training step computes again instead of keeping it.

`MODEL.MASK_DINO.RECOMPUTE` chooses between memory and time: "none" keeps everything, "cheap" does
not keep what is large for the time that it takes, "all" keeps the least. Gradients are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
LEVELS = ("none", "cheap", "all")
Forget = Callable[..., None]


class Recomputing(nn.Module):
    """A module with parts that may be recomputed."""

    recompute = "none"  # one of LEVELS, by `set_recompute`

    def recomputes(self, *levels: str) -> bool:
        """Whether the module trains at one of these levels."""
        return self.training and self.recompute in levels


def recomputed(function: Callable[..., T], *args: object, when: bool = True) -> T:
    """Calls a function without random numbers; where `when` says so, the backward pass does again.

    Then the arguments alone are kept. It is called again as far as the last tensor that is needed:
    a product at its end, of which the inputs are needed and not the result, costs nothing.
    """
    if not when:
        return function(*args)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    devices = [x.on_device() for x in args if isinstance(x, Again)]
    if not devices:
        return again(function, *args)
    # A checkpoint looks among its arguments for the device whose autocast it is to enter again.
    return again(lambda *_: function(*args), *devices)


class Again:
    """Tensors that are handed over once; whoever asks again gets them made from less.

    So what is recomputed need not keep what it is given.
    """

    def __init__(self, tensors: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> None:
        """Tensors, and what makes them again: to the bit, and holding none of them."""
        self._tensors: Sequence[Tensor] = tensors
        self._make = make
        self._learned = [x.requires_grad for x in tensors]

    def on_device(self) -> Tensor:
        """An empty tensor where the tensors are; to be asked before they are handed over."""
        return self._tensors[0].new_empty(0)

    def __call__(self) -> Sequence[Tensor]:
        """The tensors; those that are made again have no history."""
        made, self._tensors = self._tensors, ()
        if made:
            return made
        with torch.no_grad():
            made = self._make()
        return [x.detach().requires_grad_(of) for x, of in zip(made, self._learned, strict=True)]


@contextmanager
def remade(make: Callable[[], Sequence[Tensor]], *, when: bool = True) -> Iterator[Forget]:
    """Within, autograd keeps all but some tensors, which the backward pass makes again.

        with remade(lambda: (layer(x),)) as forget:
            hidden = layer(x)
            out = other(hidden)
            forget(hidden)

    In a checkpoint `other` would run again too, if it keeps what it reads after it has run.

    Args:
        make: makes them again: to the bit, and holding none of them.
        when: False: everything is kept.

    Yields:
        What is called once, with the tensors in the order of `make`.
    """
    if not when:
        yield lambda *_: None
        return
    kept = _Kept(make)
    with saved_tensors_hooks(kept.keep, kept.get):
        yield kept.forget
    kept.close()


@dataclass
class _Slot:
    """What autograd keeps of a tensor: itself, or which of those that are made again it is."""

    tensor: Tensor | None
    number: int = 0
    shape: torch.Size = torch.Size()


class _Kept:
    """What autograd keeps of what was computed within `remade`."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self._make = make
        self._kept: list[tuple[Tensor, _Slot]] = []
        self._forgotten: Sequence[Tensor] = ()
        self._uses, self._left = Counter[int](), Counter[int]()
        self._made: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> _Slot:
        slot = _Slot(tensor)
        self._kept.append((tensor, slot))
        return slot

    def forget(self, *tensors: Tensor) -> None:
        device = tensors[0].device.type
        self._forgotten = tensors
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def close(self) -> None:
        places = {x.data_ptr(): (number, x) for number, x in enumerate(self._forgotten)}
        for kept, slot in self._kept:
            number, x = places.get(kept.data_ptr(), (0, None))
            # Products keep views, in other shapes.
            if x is not None and kept.dtype == x.dtype and kept.numel() == x.numel() > 0:
                slot.tensor, slot.number, slot.shape = None, number, kept.shape
                self._uses[number] += 1
        self._kept, self._forgotten = [], ()

    def get(self, slot: _Slot) -> Tensor:
        if slot.tensor is not None:
            return slot.tensor
        if slot.number not in self._made:
            self._made, self._left = dict(enumerate(self._again())), self._uses.copy()
        made = self._made[slot.number]
        self._left[slot.number] -= 1
        if not self._left[slot.number]:
            del self._made[slot.number]
        return made.view(slot.shape)

    def _again(self) -> list[Tensor]:
        device, dtype, enabled = self._autocast
        # With gradients, as the first time: without, other kernels may compute.
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            return [x.detach() for x in self._make()]


def set_recompute(model: nn.Module, level: str) -> None:
    """Sets the level of all modules that recompute.

    Raises:
        ValueError: if there is no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"MODEL.MASK_DINO.RECOMPUTE is {level!r}; it must be one of {LEVELS}")
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recompute = level
