"""Ctrl-C and SIGTERM in a training: the step is finished, and its state can be saved."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.utils import comm

logger = logging.getLogger(__name__)

_outside: dict[signal.Signals, Any] = {}  # while a watch is installed: the handlers before it


class Interrupted(KeyboardInterrupt):
    """A signal ended the training; the text says where it stands.

    Attributes:
        status: of the process, 128 and the number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class SignalWatch:
    """Delays signals while a step is made, which must not be left half done.

    A second signal ends the step too. With several processes nothing is delayed: a step of one of
    them cannot be finished without the others.

    Attributes:
        number: of the signal that came; 0: none.
        in_step: whether a step is being made.
    """

    def __init__(self) -> None:
        self.number = 0
        self.in_step = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, signals come here."""
        if threading.current_thread() is not threading.main_thread() or comm.get_world_size() > 1:
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        _outside.update(before)
        try:
            yield
        finally:
            _outside.clear()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, a step is made; a signal that came meanwhile is raised at its end.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        self.in_step = True
        yield
        self.in_step = False
        if self.number:
            raise KeyboardInterrupt

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.number = bool(self.number), number
        if again or not self.in_step:
            raise KeyboardInterrupt
        logger.warning("Interrupted: this iteration is finished first; once more ends at once.")


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
