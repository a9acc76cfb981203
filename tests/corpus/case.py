"""A case of the corpus: files that somebody might bring, a command, and the outcome it must have.

A traceback is for faults of the program alone: malformed input ends in a message that begins with
"error: " and names file, key or id, and value; or the command works, with the right result. Nothing
in a file is executed, nothing hangs, nothing goes wrong in silence.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from maskdino.cli.common import errors_in_one_line

PREFIX = "corpus_"  # of the names of registered datasets
TRAP = "trap"  # the file that code in an input would leave
PATIENCE = 120  # seconds
LOGGERS = ("fvcore", "detectron2", "maskdino")


@dataclass(frozen=True)
class Ran:
    """What a command did.

    Attributes:
        folder: that the case wrote its files to.
        status: of the process that it would have been.
        out: what it printed on both streams, the log included.
        message: the line or lines that it ended with, where the status is not 0.
        escaped: the traceback of what was no error of the user; "": none.
    """

    folder: Path
    status: int
    out: str
    message: str
    escaped: str


@dataclass(frozen=True)
class Refused:
    """The command ends in one message.

    Attributes:
        words: regular expressions that it matches: the file, the key or id, the value.
        lines: how many it may have; lists of what is wrong have several.
    """

    words: tuple[str, ...]
    lines: int = 1

    def fault(self, ran: Ran) -> str:
        """What is wrong with the outcome; "": nothing."""
        if ran.status == 0:
            return "silent: it was not refused"
        if not re.match(r"(\S+ )?error: ", ran.message):
            return f"unclear: {ran.message[:300]!r}"
        if ran.message.count("\n") >= self.lines:
            return f"unclear: {ran.message.count(chr(10)) + 1} lines: {ran.message[:500]!r}"
        missing = [word for word in self.words if not re.search(word, ran.message, re.DOTALL)]
        return f"unclear: {missing} is not in {ran.message[:400]!r}" if missing else ""


@dataclass(frozen=True)
class Works:
    """The command does what was asked for.

    Attributes:
        check: looks at the result; it asserts.
        said: a regular expression for a warning.
    """

    check: Callable[[Ran], None] | None = None
    said: str = ""

    def fault(self, ran: Ran) -> str:
        """What is wrong with the outcome; "": nothing."""
        if ran.status:
            return f"refused: {ran.message[:400]!r}"
        if self.said and not re.search(self.said, ran.out):
            return f"silent: nothing said {self.said!r}"
        try:
            if self.check is not None:
                self.check(ran)
        except AssertionError as error:
            return f"silent: {str(error)[:400]}"
        return ""


@dataclass(frozen=True)
class Either:
    """Refused, or working: what damage at random does is not known before."""

    outcomes: tuple[Refused, Works]

    def fault(self, ran: Ran) -> str:
        """What is wrong with the outcome; "": nothing."""
        refused, works = self.outcomes
        return works.fault(ran) if ran.status == 0 else refused.fault(ran)


Outcome = Refused | Works | Either


def by_way(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """Outcomes of ways that were given as names of arguments, which have no hyphens."""
    return {way.replace("_", "-"): outcome for way, outcome in outcomes.items()}


@dataclass(frozen=True)
class Case:
    """One input for one command.

    Attributes:
        kind: of input: "annotations", "images", ...
        way: the command, by its name in `tests.corpus.ways.WAYS`.
        name: of what is wrong.
        write: writes the input to a folder, and returns the words of the command.
        outcome: that it must have.
    """

    kind: str
    way: str
    name: str
    write: Callable[[Path], list[str]]
    outcome: Outcome

    @property
    def id(self) -> str:
        """Its name in a list of all."""
        return f"{self.kind}-{self.way}-{self.name}".replace(" ", "_")


Command = Callable[[list[str]], object]


def judge(case: Case, command: Command, folder: Path) -> str:
    """Runs a command in this process as a program would.

    Returns:
        What is wrong with the outcome: "KIND: details"; "": nothing.
    """
    before = os.getcwd()
    os.chdir(folder)
    try:
        with _logs_restored(), _as_a_program() as streams:
            return fault(case, _ran(folder, case, command, streams))
    finally:
        os.chdir(before)
        for catalog in (DatasetCatalog, MetadataCatalog):
            for name in [x for x in catalog.list() if x.startswith(PREFIX)]:
                catalog.remove(name)


def _ran(folder: Path, case: Case, command: Command, streams: io.StringIO) -> Ran:
    message, status, escaped = "", 0, ""
    words = case.write(folder)
    sys.argv = [case.way, *words]
    begin = streams.tell()
    try:
        with _patience(), errors_in_one_line():
            status = int(command(words) or 0)  # type: ignore[call-overload]
            message = streams.getvalue()[begin:].strip() if status else ""
            message = message[message.rfind("error: ") :] if "error: " in message else message
    except SystemExit as end:
        code = end.code
        status = code if isinstance(code, int) else int(code is not None)
        printed = f"\n{streams.getvalue()[begin:].strip()}"
        last = max(printed.rfind("\nerror: "), printed.rfind(" error: "), 0)
        message = code if isinstance(code, str) else printed[last:].strip()
    except BaseException:  # noqa: BLE001 - whatever escapes is what is looked for
        status, escaped = 1, traceback.format_exc()
    return Ran(folder, status, streams.getvalue()[begin:], message, escaped)


def fault(case: Case, ran: Ran) -> str:
    """What is wrong with what a command did: "KIND: details"; "": nothing."""
    if (ran.folder / TRAP).exists():
        return "executed: the input ran code"
    if "PatienceError" in ran.escaped:
        return f"hang: more than {PATIENCE} s: {ran.escaped[-500:]}"
    if ran.escaped:
        return f"traceback: {ran.escaped}"
    if "Traceback (most recent call last)" in ran.out + ran.message:
        return f"traceback: {ran.out[-2000:]} {ran.message}"
    return case.outcome.fault(ran)


def sample(cases: Iterable[Case], every: int) -> list[Case]:
    """Each `every`-th case of each kind and way, the first included; always the same ones."""
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for case in cases:
        key = case.kind, case.way
        if seen[key] % every == 0:
            chosen.append(case)
        seen[key] += 1
    return chosen


class PatienceError(BaseException):
    """A command took too long."""


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Ends what does not end by itself, where there are such signals."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise PatienceError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _as_a_program() -> Iterator[io.StringIO]:
    """Inside, both streams are written to one text."""
    streams, words = io.StringIO(), sys.argv
    try:
        with (
            contextlib.redirect_stdout(streams),
            contextlib.redirect_stderr(streams),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield streams
    finally:
        sys.argv = words


@contextlib.contextmanager
def _logs_restored() -> Iterator[None]:
    """Afterwards the logs go where they went before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(list(x.handlers), x.level, x.propagate) for x in loggers]
    for logger in loggers:
        logger.handlers = []
    setup_logger.cache_clear()
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            for handler in logger.handlers:
                handler.close()
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
        setup_logger.cache_clear()
