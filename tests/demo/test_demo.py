"""The demo: what it finds, what it skips, and what of a video survives."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskdino.model import MaskDINO
from tests.helpers import tiny_cfg


@pytest.fixture(autouse=True)
def _demo_on_path(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    """The modules of the demo import one another as scripts do."""
    monkeypatch.syspath_prepend(str(repository / "demo"))


@pytest.fixture(scope="module")
def model_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line of a narrow model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": MaskDINO(cfg).state_dict()}, folder / "weights.pth")
    words = ["--config-file", str(folder / "config.yaml"), "--confidence-threshold", "0"]
    return [*words, "--max-detections", "2", "--opts", "MODEL.WEIGHTS", str(folder / "weights.pth")]


def run_demo(inputs: list[Path | str], output: Path, model: list[str], *more: str) -> int:
    """Runs the command in this process; returns its exit status."""
    import demo

    module = demo if hasattr(demo, "main") else sys.modules["demo"]
    return module.main(["--input", *map(str, inputs), "--output", str(output), *more, *model])


def save_picture(path: Path, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
    return path


def save_video(path: Path, frames: int = 6, size: tuple[int, int] = (48, 64)) -> Path:
    """A square that moves to the right, at 10 frames per second."""
    from video import VideoWriter

    writer = VideoWriter(path, 10)
    for i in range(frames):
        frame = np.zeros((*size, 3), np.uint8)
        frame[16:32, 4 * i : 4 * i + 16] = (250, 120, 0)
        writer.write(frame)
    writer.close()
    return path


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


def test_video_keeps_rate_size_and_number_of_frames(
    tmp_path: Path, model_arguments: list[str]
) -> None:
    from video import VideoReader

    video = save_video(tmp_path / "clip.mp4")
    status = run_demo([video], tmp_path / "out", model_arguments, "--batch-size", "4")
    assert status == 0
    reader = VideoReader.of_file(tmp_path / "out" / "clip.mp4")
    frames = list(reader)
    assert (reader.rate, len(frames), frames[0].shape) == (10, 6, (48, 64, 3))


def test_videos_that_cannot_be_read(
    tmp_path: Path, model_arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    fake = tmp_path / "fake.mp4"
    fake.write_text("no video")
    good = save_video(tmp_path / "good.mp4", frames=2)
    assert run_demo([fake, good], tmp_path / "out", model_arguments) == 1
    printed = capsys.readouterr()
    assert "fake.mp4: it is no video" in printed.err
    assert "1 of 2 files drawn" in printed.out
    assert run_demo([good], tmp_path / "out2", model_arguments, "--codec", "zzzz") == 1
    assert "no encoder for the codec zzzz" in capsys.readouterr().err


def test_interrupted_video_can_be_played(
    tmp_path: Path, model_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from video import VideoReader

    from maskdino.predictor import MaskDINOPredictor

    predict, calls = MaskDINOPredictor.__call__, []

    def interrupted(self: MaskDINOPredictor, images: list) -> list:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(MaskDINOPredictor, "__call__", interrupted)
    status = run_demo([save_video(tmp_path / "clip.mp4", 8)], tmp_path / "out", model_arguments)
    assert status == 130
    assert len(list(VideoReader.of_file(tmp_path / "out" / "clip.mp4"))) == 3


class FakeCapture:
    """Stands in for OpenCV's: frames, some of which cannot be read."""

    def __init__(self, readable: list[bool]) -> None:
        self._readable = iter(readable)

    def read(self) -> tuple[bool, np.ndarray | None]:
        if next(self._readable, False):
            return True, np.zeros((4, 6, 3), np.uint8)
        return False, None

    def release(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(
    ("readable", "broken", "missing", "message"),
    [
        ([True] * 6, [], 0, ""),
        ([True, False, True, False, False, True], [1, 3, 4], 0, "3 broken frames"),
        ([True, True, False, False, False, False], [], 4, "ends after frame 1"),
        ([True] * 5 + [False], [], 0, ""),  # the container's count was a guess
    ],
)
def test_broken_and_missing_frames(
    readable: list[bool], broken: list[int], missing: int, message: str
) -> None:
    from video import VideoReader

    reader = VideoReader("clip", 25.0, 6, _capture=FakeCapture(readable))
    frames = list(reader)
    assert [i for i, frame in enumerate(frames) if frame is None] == broken
    assert (reader.broken, reader.missing) == (broken, missing)
    assert message in reader.problem()
    assert bool(reader.problem()) == bool(message)


def test_codec_is_read_from_the_container(tmp_path: Path, shared_video: Path) -> None:
    from video import codec_of

    assert codec_of(save_video(tmp_path / "own.mp4")) == "mp4v"
    assert codec_of(shared_video) == "avc1"


@pytest.fixture
def shared_video(shared: object) -> Path:
    return shared("data", "video", "car-detection.mp4")


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
