"""What the commands share: their parsers, and one line for what the user can mend."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from maskdino.system.errors import UserError
from maskdino.system.files import FULL_OR_LOCKED
from maskdino.system.signals import INTERRUPTED

READER_GONE = 141  # exit status where output goes to a pipe that is closed, as shells have it


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser that shows a description, a module's docstring, as it is written."""
    return argparse.ArgumentParser(
        prog=os.path.basename(sys.argv[0]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class CommandError(UserError):
    """What a command refuses, or finds wrong: its text is all that the user needs."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line for what the user can mend, and for Ctrl-C.

    That is what the system refuses (`OSError`), a package that is not installed, and what a check
    refuses: a `UserError`, or a `KeyError`, `ValueError` or `ImportError` that a `raise`
    statement made. The same errors from an expression, and all others, are faults of the program:
    they keep their traceback. Where nobody reads the output any more (`| head`), there is no line.
    Serves as a decorator too.
    """
    try:
        with _said():
            yield
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(getattr(error, "status", INTERRUPTED))
    except BrokenPipeError:
        sys.exit(READER_GONE)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {_of_system(error)}")
    except UnicodeEncodeError as error:  # JSON and YAML can hold halves of characters
        sys.exit(f"error: {error.object!a} cannot be written in {error.encoding}: {error.reason}")
    except (KeyError, ValueError, ImportError) as error:
        if not was_raised(error):
            raise
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")


@contextmanager
def _said() -> Iterator[None]:
    """What is printed inside is written before it ends: else Python does it, beyond our reach.

    Characters that the encoding of the output lacks, as that of a pipe on Windows, are written as
    numbers: a name of a class ends no training.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (SystemExit, OSError):  # of --help; of printing itself
        _flush()
        raise
    _flush()


def _flush() -> None:
    """Writes what was printed; what cannot be written is given up, or Python would try again."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # it may be none of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _of_system(error: OSError) -> str:
    """What the system refuses: the file and the reason, without the reason's number."""
    if error.strerror is None or error.filename is None:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    text = f"{' -> '.join(names)}: {error.strerror}"
    return f"{text}; make room, or name another folder" if error.errno in FULL_OR_LOCKED else text


def was_raised(error: BaseException) -> bool:
    """Whether a check raised an error: a `raise` statement of this process, or a failed import.

    An error of another process, which is raised here once more with that process's traceback in
    its text or its cause, counts as a fault of the program.
    """
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("maskdino"):
        return True
    if "embedded null" in str(error):  # what Python says of paths with such a character
        return True
    if "Traceback" in f"{error} {error.__cause__}":
        return False
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return (last.line or "").startswith("raise ")
