"""The demo: what it finds, what it skips, and how it overlaps reading and writing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.demo.drawn import run_demo, save_picture


def test_broken_pictures_are_named_and_the_others_drawn(
    tmp_path: Path, model_arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "in"
    save_picture(folder / "a.png")
    save_picture(folder / "b.jpg")
    (folder / "broken.png").write_text("no picture")
    (folder / "notes.txt").write_text("not asked for")
    status = run_demo([folder, tmp_path / "gone.png"], tmp_path / "out", model_arguments, "--json")
    printed = capsys.readouterr()
    assert status == 1
    assert "2 of 4 files drawn" in printed.out
    assert "broken.png" in printed.err
    assert "gone.png does not exist" in printed.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.png", "a.png.json", "b.jpg", "b.jpg.json"]
    drawn = np.array(Image.open(tmp_path / "out" / "a.png"))
    assert drawn.shape == (48, 64, 3)
    assert (drawn != 90).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "the device asked for is 'gpu', which is no device"),
        ("cuda:7", "the device asked for is cuda:7, but "),
    ],
)
def test_devices_that_do_not_exist(
    tmp_path: Path,
    model_arguments: list[str],
    device: str,
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    save_picture(tmp_path / "in" / "a.png")
    more = ("--device", device)
    assert run_demo([tmp_path / "in"], tmp_path / "out", model_arguments, *more) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1


def test_inputs(tmp_path: Path) -> None:
    from sources import find_inputs, output_paths

    first, second = save_picture(tmp_path / "a" / "x.png"), save_picture(tmp_path / "b" / "x.jpg")
    third = save_picture(tmp_path / "b" / "x.tif")
    found = find_inputs([str(tmp_path / "a"), str(tmp_path / "*" / "x.*"), "nowhere.png"])
    assert found == [first, second, third, Path("nowhere.png")]
    names = [path.name for path in output_paths(found, tmp_path / "out").values()]
    assert names == ["x.png", "x.jpg", "x_2.png", "nowhere.png"]
    with pytest.raises(ValueError, match="is an input"):
        output_paths([first], tmp_path / "a")
    with pytest.raises(ValueError, match="x.png exists, in the folder of an input"):
        output_paths([save_picture(tmp_path / "a" / "x.bmp")], tmp_path / "a")
    (tmp_path / "b" / "x.jpg.json").touch()
    (tmp_path / "b" / "x.jpg").rename(tmp_path / "b" / "x.jpeg")
    output_paths([tmp_path / "b" / "x.jpeg"], tmp_path / "b")
    with pytest.raises(ValueError, match="x.jpg.json exists"):
        output_paths([tmp_path / "b" / "x.jpeg"], tmp_path / "b", with_json=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture or video"):
        find_inputs([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no file fits"):
        find_inputs([str(tmp_path / "*.gif")])


def test_tracks_keep_their_numbers() -> None:
    from tracks import Tracks

    tracks = Tracks(patience=2)
    left, right = np.array([0.0, 0, 10, 10]), np.array([20.0, 0, 30, 10])
    labels = np.array([1, 1])
    assert tracks.update(np.stack([left, right]), labels) == [0, 1]
    assert tracks.update(np.stack([right + 2, left + 2]), labels) == [1, 0]
    assert tracks.update(np.stack([left + 3, left + 4]), np.array([1, 2])) == [0, 2]
    assert tracks.update(np.zeros((0, 4)), np.zeros(0, int)) == []
    # The left one was seen two frames ago, the right one three: it is forgotten.
    assert tracks.update(np.stack([right + 2, left + 3]), labels) == [3, 0]


def test_overlap_keeps_order_and_hands_on_errors() -> None:
    from overlap import Overlap

    written: list[int] = []
    Overlap(range(10), lambda batch: [sum(batch)], written.append, batch_size=3).run()
    assert written == [3, 12, 21, 9]

    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Overlap(failing(), list, written.append).run()

    def refuse(_: int) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        Overlap(range(1000), list, refuse).run()


def test_reading_working_and_writing_overlap() -> None:
    """Each of the three waits for another one to be ahead or behind: in turn they would hang."""
    from overlap import Overlap

    read_third, working_on_second = threading.Event(), threading.Event()

    def read() -> Iterator[int]:
        for i in range(4):
            if i == 2:
                read_third.set()
            yield i

    def work(batch: list[int]) -> list[int]:
        assert read_third.wait(timeout=30), "nothing was read while the first item was worked on"
        if batch == [1]:
            working_on_second.set()
        return batch

    def write(item: int) -> None:
        ahead = item > 0 or working_on_second.wait(timeout=30)
        assert ahead, "nothing was worked on while the first item was written"

    Overlap(read(), work, write).run()
