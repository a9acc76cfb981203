"""``metrics.json``: the scalars of a training, each iteration once, whatever ended the program."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from maskdino.system.files import write_errors, written_whole

WINDOW = 20  # iterations of running medians


class MetricsFile(EventWriter):
    """Writes a line of JSON for each iteration that is logged, as detectron2's `JSONWriter`.

    A line is on the disk before the checkpoint of its iteration, so none is missing where a run
    goes on, and those of iterations that it makes again are left out first.

    Args:
        path: of the file, which a resumed run extends.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._last = -1  # iteration of the last line
        self._scalars: dict[str, float] = {}  # what it says
        self._begin = self._end = 0  # where it is, in bytes
        self._path.touch()

    def start(self, iteration: int) -> None:
        """Leaves out lines of this iteration and later ones, and what was cut off, or is no line.

        Raises:
            WriteError: the file cannot be written.
        """
        before = self._path.read_bytes() if self._path.is_file() else b""
        lines = [line for line in before.splitlines(True) if _is_before(iteration, line)]
        kept = b"".join(lines)
        if kept != before:
            with written_whole(self._path) as temporary:
                temporary.write_bytes(kept)
        self._last, self._scalars = iteration - 1, {}
        self._begin = self._end = len(kept)

    def write(self) -> None:
        """Writes what is new; more of the last iteration, such as an evaluation, joins its line.

        Raises:
            WriteError: there is no room.
        """
        for iteration, new in latest_scalars():
            if iteration > self._last:
                self._put(iteration, new, self._end)
            elif iteration == self._last and not new.keys() <= self._scalars.keys():
                self._put(iteration, self._scalars | new, self._begin)

    def _put(self, iteration: int, scalars: dict[str, float], begin: int) -> None:
        line = json.dumps({**scalars, "iteration": iteration}, sort_keys=True).encode() + b"\n"
        if begin < self._end:  # a line that the disk has must not be lost on the way
            with written_whole(self._path) as temporary:
                temporary.write_bytes(self._path.read_bytes()[:begin] + line)
        else:
            with write_errors(self._path), open(self._path, "r+b") as file:
                file.seek(begin)
                file.write(line)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        self._last, self._scalars = iteration, scalars
        self._begin, self._end = begin, begin + len(line)


def latest_scalars() -> list[tuple[int, dict[str, float]]]:
    """The last value of each scalar by name, with others of its iteration, in their order."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    latest = get_event_storage().latest_with_smoothing_hint(WINDOW)
    for name, (value, iteration) in latest.items():
        found[iteration][name] = float(value)
    return sorted(found.items())


def _is_before(iteration: int, line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < iteration
    except (ValueError, LookupError, TypeError):
        return False
