"""How long parts of a computation take, on a GPU without a wait for it."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from contextvars import ContextVar
from typing import Any

import torch

_running: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Clock:
    """Measures parts that follow each other, of what the thread does inside the `with` block.

    On a GPU these are the times at which it gets there, by its events.

    Args:
        device: that computes.
        part: name of the part with which the block begins.
    """

    def __init__(self, device: torch.device, part: str) -> None:
        self._device, self._first = device, part
        self._marks: list[tuple[str, Any]] = []  # parts, and times or events at which they begin

    def __enter__(self) -> Clock:
        self._token = _running.set(self)
        self.mark(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        self.mark("")
        _running.reset(self._token)

    def mark(self, part: str) -> None:
        """Begins a part, and ends the one before."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            # Of this device, which need not be the current one.
            now.record(torch.cuda.current_stream(self._device))
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Seconds by part, after the block. Waits for a GPU, in any thread."""
        total: defaultdict[str, float] = defaultdict(float)
        pairs = list(itertools.pairwise(self._marks))
        if self._device.type != "cuda":
            for (part, begin), (_, end) in pairs:
                total[part] += end - begin
            return total
        with torch.cuda.device(self._device):
            self._marks[-1][1].synchronize()
            for (part, begin), (_, end) in pairs:
                total[part] += begin.elapsed_time(end) / 1000
        return total


def begin(part: str) -> None:
    """Begins a part of what a clock measures in this thread; does nothing where none does."""
    clock = _running.get()
    if clock is not None:
        clock.mark(part)
