"""One run in a folder at a time, and none over another by mistake."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskdino.cli import train
from maskdino.engine import run_folder
from maskdino.engine.run_folder import LOCK, RunError, check_folder, locked, removed_if_unused
from maskdino.system.files import MARK
from tests.engine.stand_in import tiny_config

HOLD = """
import sys
from maskdino.engine.run_folder import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has locked a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(line == "locked\n" for line in iter(process.stdout.readline, ""))
    return process


def test_a_folder_in_use_is_refused_and_a_dead_owner_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = hold(tmp_path)
    try:
        message = rf"in use by another run \(process {other.pid}, machine"
        with pytest.raises(RunError, match=message), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    left = tmp_path / f"model_0000009.pth{MARK}{other.pid}"
    left.write_text("half")
    kept = tmp_path / f"predictions.json{MARK}{os.getppid()}"
    kept.write_text("still written")
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert f"The run before (process {other.pid}" in caplog.text
    assert not left.exists() and kept.exists()
    caplog.clear()
    with locked(tmp_path):
        pass
    assert not caplog.text


def test_a_lock_is_held_while_its_text_is_read(tmp_path: Path, warm_python: str) -> None:
    """Closing a second handle of a file frees the locks of its process."""
    with locked(tmp_path):
        command = [warm_python, "-c", HOLD, str(tmp_path)]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "in use by another run" in result.stderr


def test_a_run_is_not_replaced(tmp_path: Path) -> None:
    check_folder(tmp_path, resume=False)
    for name in ("model_0000009.pth", "metrics.json", "last_checkpoint"):
        path = tmp_path / name
        path.write_text("")
        with pytest.raises(RunError, match=rf"{name}.*--resume.*OUTPUT_DIR.*--overwrite") as error:
            check_folder(tmp_path, resume=False)
        assert "\n" not in str(error.value)
        check_folder(tmp_path, resume=True)
        path.unlink()
    (tmp_path / "model_final.pth").write_text("")
    (tmp_path / "notes.txt").write_text("")
    check_folder(tmp_path, resume=False, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", LOCK]


def test_only_a_folder_that_nobody_uses_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "out"
    for lock, left in (("", []), ('{"process": 1}', ["above"])):
        with pytest.raises(KeyboardInterrupt), removed_if_unused(folder):
            folder.mkdir(parents=True)
            (folder / LOCK).write_text(lock)
            raise KeyboardInterrupt
        assert [path.name for path in tmp_path.iterdir()] == left
    assert (folder / LOCK).read_text() == lock


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to OUTPUT_DIR .*file/out \(Not a directory"):
        check_folder(tmp_path / "file" / "out", resume=False)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match=r"Read-only file system\): give another folder"):
        check_folder(tmp_path, resume=False)


def test_the_command_asks_before_it_replaces_a_run(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(tiny_config(tmp_path / "out", "SOLVER.MAX_ITER", 2).dump())
    words = ["--config-file", str(config)]
    train.main(words)
    final = tmp_path / "out" / "model_final.pth"
    before = final.stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"^error: OUTPUT_DIR .*/out holds a run \(.*--overwrite$"):
        train.main(words)
    assert final.stat().st_mtime_ns == before
    train.main([*words, "--resume"])
    train.main(
        [*words, "--eval-only", "DATASETS.TEST", "('nuclei_val',)", "MODEL.WEIGHTS", str(final)]
    )
    train.main([*words, "--overwrite"])
    assert final.stat().st_mtime_ns != before
