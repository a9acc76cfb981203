"""Averaged weights (EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from maskdino.system.signals import uninterrupted


class WeightAverage:
    """The exponential moving average of a model's weights (EMA).

    Floating-point parameters and buffers are averaged; others are copied. Early steps keep less of
    the old average, (1 + step) / (10 + step), so that a short training forgets where it began.

    Args:
        model: the model, not wrapped; the average starts at its weights.
        decay: share of the old average that a step keeps at most, in [0, 1).

    Raises:
        ValueError: if ``decay`` lies outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY is {decay}; it must lie in [0, 1).")
        self._model = model
        self._decay = decay
        self.restored = False
        self._is_applied = False
        self._average: dict[str, Tensor] = {}
        # Pairs of lists, of the average's and the model's tensors: a step has no time to look
        # hundreds of names up.
        self._floating: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._others: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Starts over at the model's present weights.

        Must be called where a model's tensors have been replaced, as moving it to a device does.
        Loading weights, and training, fill those there are.
        """
        current = self._model.state_dict()
        self._average = {
            name: value.detach().clone(memory_format=torch.preserve_format)
            for name, value in current.items()
        }
        self._floating, self._others = ([], []), ([], [])
        for name, value in current.items():
            averages, values = self._floating if value.is_floating_point() else self._others
            averages.append(self._average[name])
            values.append(value)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the model's present weights, after a step counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._floating, 1.0 - decay)
        for average, value in zip(*self._others, strict=True):
            average.copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again."""
        try:
            self._exchange()
            yield
        finally:
            if self._is_applied:
                self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        with uninterrupted():  # what is saved after Ctrl-C must not be half exchanged
            for name, value in self._model.state_dict().items():
                kept = value.clone()
                value.copy_(self._average[name])
                self._average[name].copy_(kept)
            self._is_applied = not self._is_applied

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged weights, under the model's names."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Sets the averaged weights; or a ValueError, if they are not those of the model."""
        if not isinstance(state, dict):
            raise ValueError(f'"ema" holds no averaged weights, but {type(state).__name__}')
        for name, value in self._average.items():
            given = state.get(name)
            if not isinstance(given, Tensor):
                raise ValueError(f'"ema", the average of weights, lacks {name}')
            if given.shape != value.shape or given.is_complex() or not given.isfinite().all():
                raise ValueError(
                    f'"ema", the average of weights, has a {name} of shape {tuple(given.shape)} '
                    f"and {given.dtype}; it must have shape {tuple(value.shape)} and finite values"
                )
        for name, value in self._average.items():
            value.copy_(state[name])
        self.restored = True


def build_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """The average that SOLVER.EMA asks for, or None; errors as of `WeightAverage`."""
    ema = cfg.SOLVER.EMA
    return WeightAverage(model, ema.DECAY) if ema.ENABLED else None
