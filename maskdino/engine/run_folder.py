"""The folder of a run: one run at a time, and no run over another by mistake."""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from maskdino.checkpoint.reading import LAST
from maskdino.system.errors import UserError
from maskdino.system.files import clear_left
from maskdino.system.words import counted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # POSIX
    msvcrt = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "run.lock"
LOGGERS = ("fvcore", "detectron2", "maskdino")
FAR = 1 << 30  # the byte to lock on Windows, which refuses to read it: far behind the text
# What a run leaves that another would go on with, or mix with its own.
LEFT_BY_RUNS = ("model_*.pth", "metrics.json", LAST, "ema/*.pth", "best/*.pth", "best/history.json")


class RunError(UserError):
    """A folder cannot be used for a run: the message names it, and says what to do."""


def check_folder(folder: str | os.PathLike, *, resume: bool, overwrite: bool = False) -> None:
    """Checks that a training may write to a folder; with `overwrite` removes what a run left there.

    Args:
        folder: OUTPUT_DIR.
        resume: the run that is there goes on.
        overwrite: it is given up.

    Raises:
        RunError: the folder cannot be written, or holds a run that would be replaced.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"cannot write to OUTPUT_DIR {folder} ({error.strerror or error}): give another folder "
            "as OUTPUT_DIR, or mend its permissions"
        ) from error
    if resume:
        return
    left = [path for pattern in LEFT_BY_RUNS for path in folder.glob(pattern)]
    if left and not overwrite:
        raise RunError(
            f"OUTPUT_DIR {folder} holds a run ({left[0].relative_to(folder)}): go on with "
            "--resume, give another OUTPUT_DIR, or replace it with --overwrite"
        )
    if left:
        with locked(folder):  # not that of a run that is still at work
            for path in left:
                path.unlink(missing_ok=True)
        logger.warning("removed %s of the run that was in %s", counted(len(left), "file"), folder)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, no other process can lock the folder; the system frees it when this one ends.

    Temporary files of runs that were killed are removed.

    Raises:
        RunError: another process has locked it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError) as error:
            owner = _owner(path.read_text(encoding="utf-8", errors="replace"))
            raise RunError(
                f"OUTPUT_DIR {folder} is in use by another run ({owner}): wait for its end, or "
                "give another OUTPUT_DIR"
            ) from error
        except OSError as error:  # file systems without locks
            logger.warning("%s cannot be locked (%s): run nothing else there.", folder, error)
        # Through this handle: closing another one would free the lock.
        file.seek(0)
        before = _owner(file.read())
        if before:
            logger.warning("The run before (%s) was killed; its lock is taken over.", before)
        clear_left(folder)
        file.truncate(0)
        now = datetime.datetime.now().isoformat(timespec="seconds")
        json.dump({"process": os.getpid(), "machine": socket.gethostname(), "since": now}, file)
        file.flush()
        try:
            yield
        finally:
            # Left empty rather than removed: another process may have opened it to wait.
            file.truncate(0)


@contextmanager
def removed_if_unused(folder: str | os.PathLike) -> Iterator[None]:
    """On an error, removes a folder that is made inside, if nothing but a free lock is in it.

    So it does with the folders above it that are made inside.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty, or never made
            lock = folder / LOCK
            if made and os.listdir(folder) == [LOCK] and not lock.stat().st_size:
                lock.unlink()
            for path in made:
                path.rmdir()
        raise


class _LogStream:
    """A log file; on a full disk, lines are left out, and the training goes on."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._is_told = False

    def write(self, text: str) -> None:
        """Writes at once; what cannot be written is left out, which is said once."""
        try:
            os.write(self._descriptor, text.encode())
        except OSError as error:
            if not self._is_told:
                sys.stderr.write(
                    f"cannot write {self.name}: {error.strerror}. The training goes on without "
                    "its log until there is room: make some before the next checkpoint\n"
                )
            self._is_told = True

    def flush(self) -> None:
        """There is nothing to do."""


def open_logs(folder: str | os.PathLike) -> None:
    """Logs to the console and to ``log.txt`` in a folder, each process to a file of its own."""
    streams: dict[str, _LogStream] = {}
    for name in LOGGERS:
        known = set(logging.getLogger(name).handlers)
        for handler in setup_logger(str(folder), comm.get_rank(), name=name).handlers:
            path = getattr(getattr(handler, "stream", None), "name", "")
            is_new = handler not in known and isinstance(handler, logging.StreamHandler)
            if is_new and str(path).startswith(os.path.join(folder, "log.txt")):
                if path not in streams:
                    streams[path] = _LogStream(path)
                handler.setStream(streams[path])


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        raise OSError("this system has no locks")


def _owner(text: str) -> str:
    """Who wrote a lock, for messages; "": nobody."""
    try:
        entry = json.loads(text or "{}")
        return ", ".join(f"{key} {value}" for key, value in entry.items())
    except (ValueError, AttributeError):
        return "unknown"
