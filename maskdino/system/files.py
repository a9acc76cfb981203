"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yields the path of a file to write, which takes the place of `path` when the block ends well.

    A process that is killed, a full disk or an error in the block leave what was there before.

    Args:
        path: of the file.
        sync: wait for the disk, so that it also survives a machine that stops; False: for thousands
            of small files, which can be made again.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
