"""Faults of the data end commands with one line; other errors keep all that helps to find them."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from PIL import Image
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset

from maskdino.data import DataError
from maskdino.data.reading import read_image, read_label_map
from maskdino.engine.errors import TRAIN_LOOP, data_errors_in_one_line
from maskdino.engine.launch import free_port, launch


class Labels(Dataset):
    """One label map, read by a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> np.ndarray:
        return read_label_map(str(self.path), 3, 255)


class Pictures(Labels):
    """One picture; a broken one makes an error that has another one for its cause."""

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(str(self.path), "RGB")


class Bugs(Labels):
    """Our own mistake."""

    def __getitem__(self, index: int) -> np.ndarray:
        raise ZeroDivisionError("a bug")


def load(dataset: Dataset) -> None:
    """Loads all in one worker process."""
    list(DataLoader(dataset, num_workers=1))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A label map with a value that is no class."""
    path = tmp_path / "labels.png"
    Image.fromarray(np.full((4, 5), 7, np.uint8)).save(path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that was cut off."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def test_errors_of_loading_processes_lose_their_traceback(labels: Path, picture: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(Labels(labels))
    message = f"label map {labels} holds the values [7]; classes are 0 to 2, and 255 is ignored"
    assert str(caught.value) == message
    with pytest.raises(DataError) as caught:
        load(Pictures(picture))
    assert str(caught.value).startswith(f"cannot read image {picture}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError, match=r"Traceback(.|\n)*a bug"):
        load(Bugs(picture))
    assert str(DataError("two\nlines")) == "two\nlines"
    assert str(DataError("Caught DataError in a message")) == "Caught DataError in a message"


def test_one_line_for_data_alone(
    labels: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(TRAIN_LOOP)

    def train(dataset: Dataset) -> None:
        try:
            load(dataset)
        except Exception:
            logger.exception("Exception during training:")
            raise

    with pytest.raises(SystemExit) as caught, data_errors_in_one_line():
        train(Labels(labels))
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f"error: label map {labels} holds the values [7]; classes are 0 to 2, and 255 is ignored\n"
    )
    assert f"The data ended the training: label map {labels}" in caplog.text
    assert "Traceback" not in caplog.text
    with pytest.raises(ZeroDivisionError), data_errors_in_one_line():
        train(Bugs(labels))
    assert "Traceback" in caplog.text
    assert not logger.filters


def load_on_the_second(dataset: Dataset) -> None:
    """Loads on one process; the other one waits for it, as it does for gradients."""
    if comm.get_rank() == 1:
        load(dataset)
    torch.distributed.barrier()


def test_processes_end_together(labels: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        launch(load_on_the_second, Labels(labels), processes=2)
    assert caught.value.code == 1
    error = f"label map {labels} holds the values [7]; classes are 0 to 2, and 255 is ignored"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"


@pytest.mark.slow
def test_bugs_in_processes_keep_their_traceback(labels: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"Traceback(.|\n)*(a bug|closed by peer)"):
        launch(load_on_the_second, Bugs(labels), processes=2)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """This process is the only one of a torchrun; gets an entry when it leaves its group."""
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": free_port()}
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
    with pytest.raises(SystemExit) as caught:
        launch(load, Labels(labels), processes=1)
    assert caught.value.code == 1
    assert f"error: label map {labels} holds the values [7]" in capsys.readouterr().err
    assert not torchrun  # leaving may wait for others, which wait in a collective


@pytest.mark.parametrize("fails", [True, False])
def test_group_is_left_after_success_alone(torchrun: list[bool], fails: bool) -> None:
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        launch(divmod, 1, int(not fails), processes=1)
    assert torchrun == [True] * (not fails)


@pytest.mark.slow
def test_torchrun_ends_although_one_process_waits(
    labels: Path, tmp_path: Path, repository: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from maskdino.engine.launch import launch\n"
        "from tests.engine.test_errors import Labels, load_on_the_second\n"
        f"launch(load_on_the_second, Labels(Path({str(labels)!r})), processes=1)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
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
