"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from maskdino.system import files
from maskdino.system.files import written_whole


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
