"""Tensors that depend on sizes alone, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", bound=Tensor | tuple[Tensor, ...])
_holders: list[list[object]] = []


def is_traced() -> bool:
    """Whether a program is made of what is computed, which others then run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@contextmanager
def holding_constants() -> Iterator[list[object]]:
    """Collects the constants used inside: whoever keeps the list keeps them in memory.

    A CUDA graph reads them where they were, whatever the caches have dropped since.
    """
    held: list[object] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders[:] = [holder for holder in _holders if holder is not held]  # others may be equal


def constant_of_shape(function: Callable[..., Value]) -> Callable[..., Value]:
    """Caches tensors that depend on sizes and device alone; traced programs compute them anew."""
    cached = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def constant(*args: object) -> Value:
        if is_traced():
            return function(*args)
        # Whoever asks first, the tensors must be of use in training too.
        with torch.inference_mode(False), torch.no_grad():
            value = cached(*args)
        for held in _holders:
            held.append(value)
        return value

    return constant
