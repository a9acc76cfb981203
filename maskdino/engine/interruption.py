"""Ctrl-C and SIGTERM in a training: the step is finished, and its state can be saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from detectron2.utils import comm

logger = logging.getLogger(__name__)


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
        try:
            yield
        finally:
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
