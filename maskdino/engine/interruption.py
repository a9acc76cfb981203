"""Ctrl-C and SIGTERM in a training: the step is finished, and its state can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.utils import comm

from maskdino.system.signals import ENDING

_outside: dict[signal.Signals, Any] = {}  # while a watch is installed: the handlers before it


class Interrupted(KeyboardInterrupt):
    """A signal ended the training; the text says where it stands, `number` which it was."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number


class SignalWatch:
    """Delays signals while a step is made, which must not be left half done.

    A second signal ends the step too. Several processes end after the same step: each tells the
    others, along with its losses, that a signal came (`TrainStep`). Between steps they leave an
    evaluation alone, all at once. Whoever started them passes the first signal on, maybe once more
    than the terminal did, and ends them all at the second.

    Attributes:
        number: of the signal that came; 0: none.
        in_step: whether a step is being made.
    """

    def __init__(self) -> None:
        self.number = 0
        self.in_step = False
        self._in_evaluation = False

    @property
    def came(self) -> bool:
        """Whether a signal came to this process."""
        return bool(self.number)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, signals come here."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in ENDING}
        _outside.update(before)
        try:
            yield
        finally:
            _outside.clear()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def step(self, agreed: Callable[[], bool | None]) -> Iterator[None]:
        """Inside, a step is made; a signal that came meanwhile is raised at its end.

        Args:
            agreed: whether a signal came to any of several processes, as all of them say after the
                step; None: they did not ask, and nothing is known of the others.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        self.in_step = True
        yield
        ends = agreed() if comm.get_world_size() > 1 else self.came
        self.in_step = ends is None
        if ends or (ends is None and self.came):
            raise KeyboardInterrupt

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, an evaluation is made, which a signal ends at once.

        Raises:
            KeyboardInterrupt: a signal has come, to any of several processes.
        """
        if any(comm.all_gather(self.came)):
            raise KeyboardInterrupt
        self._in_evaluation = True
        try:
            yield
        finally:
            self._in_evaluation = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, several = self.came, comm.get_world_size() > 1
        if again and several:
            return
        self.number = number
        if again or (self._in_evaluation if several else not self.in_step):
            raise KeyboardInterrupt
        if comm.is_main_process():
            # Logging may be what the signal interrupts, and cannot be entered twice.
            os.write(2, b"Interrupted: this iteration is finished first; once more ends at once.\n")


def _hold_termination() -> None:
    if _outside:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _deliver_termination() -> None:
    if _outside:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_when_told() -> None:
    """Takes the handler of SIGTERM from a process that was forked inside a training.

    Cityscapes' loader and `panopticapi` make pools of processes and abandon them: they would wait
    forever for processes that delay a signal, or raise an exception while they hold a lock. A
    signal between the fork and this function would be lost, so it is held meanwhile.
    """
    if _outside:
        signal.signal(signal.SIGTERM, _outside[signal.SIGTERM])
        _deliver_termination()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_termination,
        after_in_parent=_deliver_termination,
        after_in_child=_end_when_told,
    )
