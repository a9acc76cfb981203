"""What the backward pass of a training step computes again instead of keeping it.

`MODEL.MASK_DINO.RECOMPUTE` chooses between memory and time: "none" keeps everything, "cheap" does
not keep what is large for the time that it takes, "all" keeps the least. Gradients are the same.

There are two ways: `recomputed` calls a function as a whole again; `remade`, within `remaking`,
makes single tensors again, wherever they are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from maskdino.ops.constants import is_traced

T = TypeVar("T")
Made = TypeVar("Made", bound=Tensor | tuple[Tensor, ...])
LEVELS = ("none", "cheap", "all")


class Recomputing(nn.Module):
    """A module with parts that may be recomputed."""

    recompute = "none"  # one of LEVELS, by `set_recompute`

    def recomputes(self, *levels: str) -> bool:
        """Whether the module trains at one of these levels."""
        return self.training and self.recompute in levels


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


def recomputed(function: Callable[..., T], *args: object, when: bool = True) -> T:
    """Calls a function without random numbers; where `when` says so, the backward pass does again.

    Then the arguments alone are kept, or what they were `remade` of. It is called again as far as
    the last tensor that is needed: a product at its end, of which the inputs are needed and not the
    result, costs nothing.
    """
    if not when:
        return function(*args)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    memory = _current()
    if memory is None:
        return again(function, *args)
    # A checkpoint keeps its arguments, and looks among them for the device whose autocast it is to
    # enter again: it is given empty ones.
    devices = [x.new_empty(0) for x in args if isinstance(x, Tensor)]
    kept = [memory.find(x).to_be_read() if isinstance(x, Tensor) else x for x in args]
    given = [args]

    def call(*_: Tensor) -> T:
        if given:
            return function(*given.pop())
        return function(*(x.again() if isinstance(x, _Kept) else x for x in kept))

    return again(call, *devices)


def remaking(*, when: bool = True) -> AbstractContextManager[None]:
    """Within, autograd keeps of tensors that are `remade` what they are made of.

    In a checkpoint all that follows them would run again too.
    """
    return _remaking() if when else nullcontext()  # which compilers know


@contextmanager
def _remaking() -> Iterator[None]:
    memory = _Memory()
    token = _memory.set(memory)
    try:
        with saved_tensors_hooks(memory.pack, _Kept.get):
            yield
    finally:
        _memory.reset(token)
        memory.close()


def remade(make: Callable[..., Made], *inputs: Tensor) -> Made:
    """`make(*inputs)`; within `remaking`, the backward pass calls it again.

    Inputs may be remade themselves. `make` draws no random numbers.
    """
    memory = _current()
    return make(*inputs) if memory is None else memory.make(make, inputs)


def made_of(
    made: tuple[Tensor, ...], make: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> None:
    """As `remade`, of tensors that came about in another way than by `make`, which are equal.

    To be called before anybody reads them.
    """
    memory = _current()
    if memory is not None:
        memory.note(made, memory.recipe(make, inputs))


def _current() -> _Memory | None:
    """What `remaking` remembers: nothing outside, nor where compilers plan what is kept."""
    return None if is_traced() else _memory.get()


class _Recipe:
    """How tensors are made again; and these, as long as somebody is still to read them."""

    def __init__(self, make: Callable[..., Any], inputs: Sequence[_Kept], device: str) -> None:
        self._make, self._inputs = make, inputs
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._readers, self._left = Counter[int](), Counter[int]()
        self._made: dict[int, Tensor] = {}

    def to_be_read(self, number: int) -> None:
        """Counts a reader of one of the tensors."""
        if not self._readers:
            for x in self._inputs:
                x.to_be_read()
        self._readers[number] += 1

    def read(self, number: int) -> Tensor:
        """One of the tensors, for one reader."""
        if number not in self._made:
            results = self._again()
            self._made = {n: results[n].detach() for n in self._readers}
            self._left = self._readers.copy()
        made = self._made[number]
        self._left[number] -= 1
        if not self._left[number]:
            del self._made[number]
        return made

    def _again(self) -> tuple[Tensor, ...]:
        device, dtype, enabled = self._autocast
        # With gradients, as the first time: without, other kernels may compute.
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            return _as_several(self._make(*(x.again() for x in self._inputs)))


class _Kept:
    """What is kept of a tensor: itself, or its number among those of a recipe."""

    def __init__(self, tensor: Tensor, recipe: _Recipe | None = None, number: int = 0) -> None:
        self.tensor = tensor if recipe is None else None
        self._recipe, self._number = recipe, number
        self._shape, self._learned = tensor.shape, tensor.requires_grad

    def to_be_read(self) -> _Kept:
        """Says that somebody will call `get` or `again`."""
        if self._recipe is not None:
            self._recipe.to_be_read(self._number)
        return self

    def let_go(self, made: _Kept) -> None:
        """Keeps the tensor as another does, for one reader."""
        self.tensor, self._recipe, self._number = made.tensor, made._recipe, made._number
        self.to_be_read()

    def get(self) -> Tensor:
        """The tensor."""
        if self._recipe is None:
            assert self.tensor is not None
            return self.tensor
        return self._recipe.read(self._number).view(self._shape)

    def again(self) -> Tensor:
        """The tensor without its history, and with a gradient if it had one."""
        return self.get().detach().requires_grad_(self._learned)


class _Result(NamedTuple):
    """A tensor that can be made again, which nobody need keep for that."""

    storage: StorageWeakRef
    dtype: torch.dtype
    numel: int
    recipe: _Recipe
    number: int


class _Memory:
    """Which tensors can be made again, by where they lie."""

    def __init__(self) -> None:
        self._results: dict[int, _Result] = {}
        self._packed: list[_Kept] | None = None  # while something is made

    def recipe(self, make: Callable[..., Any], inputs: Sequence[Tensor]) -> _Recipe:
        return _Recipe(make, [self.find(x) for x in inputs], inputs[0].device.type)

    def make(self, make: Callable[..., Made], inputs: Sequence[Tensor]) -> Made:
        recipe = self.recipe(make, inputs)
        packed: list[_Kept] = []
        outer, self._packed = self._packed, packed
        made = make(*inputs)
        self._packed = outer
        self.note(_as_several(made), recipe)
        # Some functions, such as ReLU, keep what they return.
        for kept in packed:
            if kept.tensor is not None:
                kept.let_go(self.find(kept.tensor))
        return made

    def note(self, made: tuple[Tensor, ...], recipe: _Recipe) -> None:
        self._results = {p: x for p, x in self._results.items() if not x.storage.expired()}
        for number, x in enumerate(made):
            if x.is_contiguous() and x.numel():
                storage = StorageWeakRef(x.untyped_storage())
                result = _Result(storage, x.dtype, x.numel(), recipe, number)
                self._results[x.data_ptr()] = result

    def close(self) -> None:
        """Forgets all: autograd may hold on to its hooks."""
        self._results = {}

    def pack(self, tensor: Tensor) -> _Kept:
        kept = self.find(tensor).to_be_read()
        if self._packed is not None:
            self._packed.append(kept)
        return kept

    def find(self, tensor: Tensor) -> _Kept:
        result = self._results.get(tensor.data_ptr())
        if (
            result is None
            or result.storage.expired()
            or (result.dtype, result.numel) != (tensor.dtype, tensor.numel())
            or not tensor.is_contiguous()  # products keep views, in other shapes
        ):
            return _Kept(tensor)
        return _Kept(tensor, result.recipe, result.number)


def _as_several(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made


_memory: ContextVar[_Memory | None] = ContextVar("what can be made again", default=None)
