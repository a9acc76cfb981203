"""Files are written whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskdino.system import files
from maskdino.system.errors import WriteError
from maskdino.system.files import MARK, clear_left, write_errors, write_text, written_whole


@pytest.mark.parametrize("sync", [True, False])
def test_the_old_file_stays_until_the_new_one_is_whole(
    sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file.txt", []
    fsync = os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda number: synced.append(number) or fsync(number))
    path.write_text("old")
    with written_whole(path, sync=sync) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "new" and bool(synced) == sync
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(OSError, match="no space"), written_whole(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space left on device")
        assert (path.read_text() if path.exists() else None) == before
        assert len(list(tmp_path.iterdir())) == (before is not None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_no_room_is_one_line_that_says_what_to_do(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    message = rf"cannot write {path}: {os.strerror(number)}\. What was there .*--resume"
    with pytest.raises(WriteError, match=message) as error, written_whole(path):
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(error.value)
    with pytest.raises(WriteError, match=message), write_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(path))


def test_what_cannot_be_read_is_not_said_to_be_written(tmp_path: Path) -> None:
    elsewhere = tmp_path / "images" / "a.png"
    (tmp_path / "output").mkdir()
    with pytest.raises(PermissionError), write_errors(tmp_path / "output"):
        raise OSError(errno.EACCES, "Permission denied", str(elsewhere))


@pytest.mark.skipif(os.name != "posix", reason="no process is asked for on Windows")
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "best").mkdir()
    removed = [
        tmp_path / f"model_final.pth{MARK}{gone.pid}",
        tmp_path / "best" / f"model_best.pth{MARK}{gone.pid}",
        tmp_path / f"last_checkpoint{MARK}{os.getpid()}",  # in a container, numbers come again
        tmp_path / f"metrics.json{MARK}{10**30}",
    ]
    kept = [
        tmp_path / f"model_final.pth{MARK}{os.getppid()}",  # its writer runs
        tmp_path / f"model_final.pth{MARK}mine",
        tmp_path / "notes.tmp1",
        tmp_path / "model_final.pth",
    ]
    for path in removed + kept:
        path.write_text("")
    clear_left(tmp_path)
    assert [path.exists() for path in removed] == [False] * len(removed)
    assert [path.exists() for path in kept] == [True] * len(kept)


def test_text_is_written_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "Größe.txt"
    for text in ("1 µm\n", "2 µm\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="names of files differ on Windows")
@pytest.mark.parametrize("name", ["a" * 250 + ".json", "字" * 83 + ".json"])
def test_names_may_be_as_long_as_the_system_allows(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(os.name != "posix", reason="no such files on Windows")
def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 99) == b"text" and pipe.is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    if Path("/dev/full").is_char_device():
        with pytest.raises(WriteError, match="cannot write /dev/full: No space left"):
            write_text("/dev/full", "text")
        assert Path("/dev/full").is_char_device()
