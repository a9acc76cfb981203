"""Reading, inference and writing at the same time, in three threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
PATIENCE = 0.1  # seconds between looks at whether to stop


class Overlap(Generic[Item, Result]):
    """Runs `work` here, while one thread reads what comes next and another writes what is done.

    Order is kept, and at most a few batches wait at any time. On an error or Ctrl-C reading stops,
    and what was worked on is still written, so that a caller can close its file properly.
    """

    def __init__(
        self,
        read: Iterable[Item],
        work: Callable[[list[Item]], Iterable[Result]],
        write: Callable[[Result], None],
        *,
        batch_size: int = 1,
    ) -> None:
        """
        Args:
            read: yields items; runs in its own thread.
            work: turns a batch into results; runs in the thread that calls `run`.
            write: takes one result; runs in its own thread.
            batch_size: items that are worked on together; the last batch may be smaller.
        """
        self._read, self._work, self._write, self._batch_size = read, work, write, batch_size
        self._waiting: queue.Queue = queue.Queue(maxsize=2 * batch_size)
        self._done: queue.Queue = queue.Queue(maxsize=2 * batch_size)
        self._stop = threading.Event()
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Returns when all is written.

        Raises:
            BaseException: whatever the first of the three raised, once the threads have ended.
        """
        reader = threading.Thread(target=self._reading, name="reading", daemon=True)
        writer = threading.Thread(target=self._writing, name="writing", daemon=True)
        reader.start()
        writer.start()
        try:
            self._working()
        finally:
            self._stop.set()
            self._done.put(_END)
            reader.join()
            writer.join()
        if self._errors:
            raise self._errors[0]

    def _working(self) -> None:
        batch: list[Item] = []
        while not self._errors:
            try:
                item = self._waiting.get(timeout=PATIENCE)
            except queue.Empty:
                continue
            if item is not _END:
                batch.append(item)
            if batch and (item is _END or len(batch) == self._batch_size):
                for result in self._work(batch):
                    self._done.put(result)
                batch = []
            if item is _END:
                return

    def _reading(self) -> None:
        try:
            for item in self._read:
                if not self._offer(item):
                    return
            self._offer(_END)
        except BaseException as error:  # noqa: BLE001  handed to the thread that called `run`
            self._errors.append(error)

    def _offer(self, item: object) -> bool:
        """Waits for room; False when all is to stop."""
        while not self._stop.is_set():
            try:
                self._waiting.put(item, timeout=PATIENCE)
                return True
            except queue.Full:
                continue
        return False

    def _writing(self) -> None:
        while (result := self._done.get()) is not _END:
            if self._errors:
                continue  # nobody may wait for room that does not come
            try:
                self._write(result)
            except BaseException as error:  # noqa: BLE001  handed to the thread that called `run`
                self._errors.append(error)
