"""Errors of the data end commands with one line; others keep all that helps to find them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from maskdino.data.reading import read_label_map
from maskdino.engine.launch import launch


class Labels:
    """One label map with a value that is no class."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> None:
        """Reads it."""
        read_label_map(str(self.path), 3, 255)


class Bugs(Labels):
    """Our own mistake."""

    def load(self) -> None:
        """Fails."""
        raise ZeroDivisionError("a bug")


def load(data: Labels) -> None:
    """Loads in this process."""
    data.load()


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A label map with a value that is no class."""
    path = tmp_path / "labels.png"
    Image.fromarray(np.full((4, 5), 7, np.uint8)).save(path)
    return path


@contextlib.contextmanager
def ends_with_the_line(labels: Path, capture: pytest.CaptureFixture) -> Iterator[None]:
    """The block ends the process with status 1, and says last, in one line, what is wrong."""
    with pytest.raises(SystemExit) as caught:
        yield
    assert caught.value.code == 1
    error = f"label map {labels} holds the values [7]; classes are 0 to 2, and 255 is ignored"
    assert capture.readouterr().err.splitlines()[-1] == f"error: {error}"


def test_one_line_for_data_alone(labels: Path, capsys: pytest.CaptureFixture) -> None:
    with ends_with_the_line(labels, capsys):
        launch(load, Labels(labels), processes=1)
    with pytest.raises(ZeroDivisionError):
        launch(load, Bugs(labels), processes=1)


def load_on_the_second(data: Labels) -> None:
    """Loads on one process; the other one waits for it, as it does for gradients."""
    if comm.get_rank() == 1:
        load(data)
    torch.distributed.barrier()


def test_processes_end_together(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with ends_with_the_line(labels, capsys):
        launch(load_on_the_second, Labels(labels), processes=2)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not [path for path in temporary.iterdir() if path.is_dir()]


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
def test_bugs_in_processes_keep_their_traceback(
    labels: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ChildFailedError):  # of either process: the other one loses this one
        launch(load_on_the_second, Bugs(labels), processes=2)
    said = capsys.readouterr().err
    assert "Process 1 failed:\nTraceback" in said
    assert said.endswith("ZeroDivisionError: a bug\n")


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """This process is the only one of a torchrun; gets an entry when it leaves its group."""
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
    for name, value in ({"MASTER_ADDR": "127.0.0.1"} | values).items():
        monkeypatch.setenv(name, str(value))
    left: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
        yield left
    torch.distributed.destroy_process_group()


def test_process_of_torchrun_ends_with_the_line(
    labels: Path, torchrun: list[bool], capsys: pytest.CaptureFixture
) -> None:
    with ends_with_the_line(labels, capsys):
        launch(load, Labels(labels), processes=1)
    assert not torchrun  # leaving may wait for others, which wait in a collective


@pytest.mark.parametrize("fails", [True, False])
def test_group_is_left_after_success_alone(torchrun: list[bool], fails: bool) -> None:
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        launch(divmod, 1, int(not fails), processes=1)
    assert torchrun == [True] * (not fails)


@pytest.mark.slow
def test_torchrun_ends_although_one_process_waits(
    labels: Path, tmp_path: Path, repository: Path, warm_python: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from maskdino.engine.launch import launch\n"
        "from tests.engine.test_launch import Labels, load_on_the_second\n"
        f"launch(load_on_the_second, Labels(Path({str(labels)!r})), processes=1)\n"
    )
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--log-dir", str(tmp_path / "logs")]
    ended = subprocess.run(
        [*command, str(script)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,  # the collective would give up after half an hour
    )
    assert ended.returncode == 1
    assert f"error: label map {labels} holds the values [7]" in ended.stderr
