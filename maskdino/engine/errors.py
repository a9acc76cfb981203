"""Faults of the data end a command with one line; all other errors keep their traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from maskdino.data import DataError

TRAIN_LOOP = "detectron2.engine.train_loop"  # logs, with its traceback, what ends a training


@contextmanager
def data_errors_in_one_line() -> Iterator[None]:
    """Ends the process with status 1 and "error: ..." on stderr where the data are at fault.

    Raises:
        SystemExit: instead of a `DataError`.
    """
    try:
        with data_errors_logged_in_one_line():
            yield
    except DataError as error:
        end_with(str(error))


@contextmanager
def data_errors_logged_in_one_line() -> Iterator[None]:
    """Keeps tracebacks of a `DataError` out of the log of a training; the error goes on."""
    logger = logging.getLogger(TRAIN_LOOP)
    logger.addFilter(_shorten)
    try:
        yield
    finally:
        logger.removeFilter(_shorten)


def end_with(message: str) -> NoReturn:
    """Says what is wrong, and ends the process with status 1."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    sys.exit(1)


def _shorten(record: logging.LogRecord) -> bool:
    """A filter of logged records: takes the traceback from those about a `DataError`."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, DataError):
        record.msg, record.args = "The data ended the training: %s", (error,)
        record.exc_info = record.exc_text = None
    return True
