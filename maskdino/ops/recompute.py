"""What the backward pass of a training step computes again instead of keeping it.

`MODEL.MASK_DINO.RECOMPUTE` chooses between memory and time: "none" keeps everything, "cheap" does
not keep what takes few products, "all" not what encoder layers hold either. Gradients are the same.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
LEVELS = ("none", "cheap", "all")


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
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


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
