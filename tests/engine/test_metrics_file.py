"""metrics.json has each iteration once, whatever ended the program."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from maskdino.engine import metrics_file
from maskdino.engine.metrics_file import MetricsFile
from maskdino.system.errors import WriteError


def lines(path: Path) -> list[dict]:
    """What a reader gets."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(writer: MetricsFile | JSONWriter, begin: int, end: int, period: int = 2) -> None:
    """Logs as a training does."""
    with EventStorage(begin) as storage:
        for iteration in range(begin, end):
            storage.iter = iteration
            storage.put_scalar("loss", 1 / (1 + iteration))
            storage.put_scalar("lr", iteration, smoothing_hint=False)
            if iteration == 3:
                storage.put_scalar("AP", math.nan, smoothing_hint=False)
            if (iteration + 1) % period == 0:
                writer.write()
        writer.write()
        writer.close()


def test_the_content_is_detectron2s(tmp_path: Path) -> None:
    log(MetricsFile(tmp_path / "ours"), 0, 7)
    log(JSONWriter(str(tmp_path / "theirs")), 0, 7)
    assert (tmp_path / "ours").read_text() == (tmp_path / "theirs").read_text()


@pytest.mark.parametrize("left", ["", '{"iteration": 6, "lo', '{"iteration": 2}\nno JSON\n[1]\n'])
def test_a_run_that_goes_on_has_each_iteration_once(left: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    log(MetricsFile(path), 0, 8)
    path.write_text(path.read_text() + left)
    writer = MetricsFile(path)
    writer.start(5)  # the checkpoint of iteration 4
    kept = [1, 3] + [2] * ("2}" in left)
    assert [line["iteration"] for line in lines(path)] == kept
    log(writer, 5, 10)
    assert [line["iteration"] for line in lines(path)] == [*kept, 5, 7, 9]
    assert list(tmp_path.iterdir()) == [path]


def test_an_evaluation_joins_the_line_of_its_iteration(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    writer = MetricsFile(path)
    writer.start(0)
    with EventStorage() as storage:
        storage.put_scalar("loss", 3.0)
        writer.write()
        assert lines(path) == [{"iteration": 0, "loss": 3.0}]  # before the checkpoint
        storage.put_scalar("AP", 40.0, smoothing_hint=False)
        writer.write()
        assert lines(path) == [{"iteration": 0, "loss": 3.0, "AP": 40.0}]
        storage.iter = 1
        storage.put_scalar("loss", 2.0)
        writer.write()
        writer.write()
    assert [line["iteration"] for line in lines(path)] == [0, 1]
    assert lines(path)[0]["AP"] == 40.0


def test_a_kill_as_an_evaluation_joins_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    writer = MetricsFile(path)
    with EventStorage() as storage:
        storage.put_scalar("loss", 3.0)
        writer.write()
        storage.put_scalar("AP", 40.0, smoothing_hint=False)

        def kill(number: int) -> None:
            os.truncate(number, os.fstat(number).st_size - 5)  # half of it is on the disk
            raise SystemExit

        monkeypatch.setattr(metrics_file.os, "fsync", kill)
        with pytest.raises(SystemExit):
            writer.write()
    assert lines(path) == [{"iteration": 0, "loss": 3.0}]


def test_a_full_disk_leaves_whole_lines_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    writer = MetricsFile(path)
    writer.start(0)
    with EventStorage() as storage:
        storage.put_scalar("loss", 3.0)
        writer.write()
        storage.iter = 1
        storage.put_scalar("loss", 2.0)
        with monkeypatch.context() as patch:

            def full(_: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(metrics_file.os, "fsync", full)
            message = rf"cannot write {path}: No space left.*make room.*--resume"
            with pytest.raises(WriteError, match=message):
                writer.write()
        writer.write()  # there is room again: over what was written of the line
    assert [line["iteration"] for line in lines(path)] == [0, 1]
