"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskdino.system.errors import WriteError

MARK = ".maskdino-"  # in names of files that are being written: NAME.maskdino-PROCESS
# What the system says where nothing, or nothing more, can be written, and where it may not be.
FULL_OR_LOCKED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
CANNOT_WRITE = (*FULL_OR_LOCKED, errno.EACCES)


@contextmanager
def written_whole(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yields the path of a file to write, which takes the place of `path` when the block ends well.

    A process that is killed, a full disk or an error in the block leave what was there before.

    A device or a named pipe, as /dev/stdout, is written to as it is: nothing can take its place.

    Args:
        path: of the file.
        sync: wait for the disk, so that it also survives a machine that stops; False: for thousands
            of small files, which can be made again.

    Raises:
        WriteError: there is no room, or no permission.
    """
    path = Path(path)
    if _is_special(path):
        with write_errors(path):
            yield path
        return
    # The end of a long name: systems allow 255 bytes, of which a character may need four.
    temporary = path.with_name(f"{path.name[-50:]}{MARK}{os.getpid()}")
    try:
        with write_errors(path):
            yield temporary
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            if sync:
                _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _is_special(path: Path) -> bool:
    """Whether a path is there, and neither a file nor a folder; or is a name of /dev for one."""
    return path.parent == Path("/dev") or (path.exists() and not (path.is_file() or path.is_dir()))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file of text, in UTF-8, whole or not at all; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder, where the system can."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Tells which file could not be written, and what to do, where the system says only why.

    The path is that of the file, or of the folder that all files written inside are in.

    Raises:
        WriteError: there is no room, or no permission.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        name = str(error.filename or path)
        inside = os.path.commonpath(map(os.path.abspath, (name, folder))) == os.path.abspath(folder)
        if error.errno not in CANNOT_WRITE or not inside:
            raise
        shown = name if path == folder else path  # not that of a temporary file
        raise WriteError(
            f"cannot write {shown}: {error.strerror}. What was there before is whole: make room, "
            "or mend the permissions, and start again (a training: with --resume)"
        ) from error


def clear_left(folder: str | os.PathLike) -> None:
    """Removes what processes that are gone were writing into a folder, and those in it."""
    for path in [*Path(folder).glob(f"*{MARK}*"), *Path(folder).glob(f"*/*{MARK}*")]:
        found = re.search(rf"{re.escape(MARK)}(\d+)$", path.name)
        if found is not None and not _is_another(int(found[1])):
            with suppress(OSError):
                path.unlink()


def _is_another(number: int) -> bool:
    """Whether a number is that of another process that runs."""
    if number == os.getpid() or os.name != "posix":  # Windows keeps files that are open
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True
