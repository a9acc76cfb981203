"""What of a video survives, broken ones too, and what is said about the rest."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.demo.drawn import FakeCapture, frames_of, run_demo, save_noise, save_video


@pytest.mark.parametrize(
    ("read", "seen", "missing", "message"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 0, ""),
        ([0, None, 2, None, None, 5], [0, None, 2, None, None, 5], 0, "3 broken frames"),
        ([None, None, 2, 3, 4, 5], [None, None, 2, 3, 4, 5], 0, "like the one before: 0-1"),
        # Left out by the decoder, which tells of none, or of one.
        ([0, 1, 4, 5], [0, 1, None, None, 4, 5], 0, "2 broken frames"),
        ([0, 1, None, 4, 5], [0, 1, None, None, 4, 5], 0, "2 broken frames"),
        ([0, 1], [0, 1], 4, "ends after frame 1: 4 of 6"),
        ([0, 1, 255, 3, 4, 5], [0, 1, 255, 3, 4, 5], 0, ""),  # a broken time stamp
        ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], 0, ""),  # more than promised
    ],
)
def test_broken_and_missing_frames(
    read: list[int | None], seen: list[int | None], missing: int, message: str
) -> None:
    from video import VideoReader

    capture = FakeCapture(read)
    reader = VideoReader("clip", 25.0, 6, _capture=capture)
    frames = list(reader)
    assert [None if frame is None else frame[0, 0, 0] for frame in frames] == seen
    assert reader.broken == [i for i, frame in enumerate(frames) if frame is None]
    assert reader.missing == missing
    assert message in reader.problem()
    assert bool(reader.problem()) == bool(message)
    assert capture.released


def test_gaps_of_a_varying_rate_are_filled_but_not_reported() -> None:
    from video import VideoReader

    reader = VideoReader("clip", 25.0, 6, _capture=FakeCapture([0, 1, 2, 5, 6, 7]))
    assert [frame is None for frame in reader] == [False] * 3 + [True] * 2 + [False] * 3
    assert reader.problem() == ""


def damage_middle(content: bytearray, how: str) -> None:
    """Damages a file's content in place."""
    middle, length = len(content) // 2, len(content) // 6
    if how == "zeros":
        content[middle : middle + length] = bytes(length)
    elif how == "noise":
        content[middle : middle + length] = np.random.default_rng(1).bytes(length)
    elif how == "bits":
        for place in range(middle, middle + length, length // 30):
            content[place] ^= 255
    else:
        del content[middle:]


@pytest.mark.parametrize("how", ["zeros", "noise", "bits", "cut"])
def test_damaged_video(
    tmp_path: Path, model_arguments: list[str], capsys: pytest.CaptureFixture, how: str
) -> None:
    """What is whole is drawn, at the same rate, and the damage is told; other files go on."""
    clips = {"clip.mp4": "mp4v", "film.avi": "MJPG"}
    for name, codec in clips.items():
        content = save_noise(tmp_path / name, codec)
        damage_middle(content, how)
        (tmp_path / name).write_bytes(content)
    inputs = [tmp_path / name for name in clips]
    assert run_demo(inputs, tmp_path / "out", model_arguments) == 1
    printed = capsys.readouterr()
    rate, frames = frames_of(tmp_path / "out" / "film.mp4")
    assert rate == 10
    if how != "bits" or len(frames) < 12:  # some decoders make a picture of flipped bits
        assert 4 <= len(frames) < 12  # this container has no times: what is lost leaves no gap
        assert f"video {inputs[1]}: it ends after frame {len(frames) - 1}: " in printed.err
    if how == "cut":
        assert f"cannot read video {inputs[0]}: its index is not where it should be" in printed.err
        assert "1 of 2 files drawn" in printed.out
        return
    rate, frames = frames_of(tmp_path / "out" / "clip.mp4")
    assert (rate, len(frames), frames[0].shape) == (10, 12, (48, 64, 3))
    told = "decoder found damage near" if how == "bits" else "broken frames, drawn like the one"
    assert f"error: video {inputs[0]}: " in printed.err
    assert told in printed.err
    assert "2 of 2 files drawn" in printed.out


@pytest.mark.parametrize("size", [(47, 63), (49, 64), (1, 1)])
def test_odd_sizes_get_a_line_more(tmp_path: Path, size: tuple[int, int]) -> None:
    from video import VideoWriter

    with closing(VideoWriter(tmp_path / "clip.mp4", 10)) as writer:
        for value in (40, 200):
            writer.write(np.full((*size, 3), value, np.uint8))
    frames = frames_of(tmp_path / "clip.mp4")[1]
    for frame, value in zip(frames, (40, 200), strict=True):
        assert frame.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
        assert np.abs(frame.astype(int) - value).max() <= 4


def test_one_frame_with_a_strange_name(tmp_path: Path, model_arguments: list[str]) -> None:
    """FFmpeg knows protocols by their colons, and numbered pictures by %02d."""
    name = "12:30 50%02d 'año' 猫.mp4"
    (tmp_path / "ö ü").mkdir()
    save_video(tmp_path / "plain.mp4", 1).rename(tmp_path / "ö ü" / name)
    assert run_demo([tmp_path / "ö ü"], tmp_path / "out", model_arguments) == 0
    rate, frames = frames_of(tmp_path / "out" / name)
    assert (rate, [frame.shape for frame in frames]) == (10, [(48, 64, 3)])


def test_turned_video_is_drawn_upright(tmp_path: Path, model_arguments: list[str]) -> None:
    """A telephone held upright writes lying frames, and a matrix that turns them."""
    video = save_video(tmp_path / "clip.mp4", 2)
    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(x.to_bytes(4, "big", signed=True) for x in quarter)
    video.write_bytes(content)
    if frames_of(video)[1][0].shape != (64, 48, 3):
        pytest.skip(f"OpenCV {cv2.__version__} does not turn this clip")
    assert run_demo([video], tmp_path / "out", model_arguments) == 0
    assert frames_of(tmp_path / "out" / "clip.mp4")[1][0].shape == (64, 48, 3)


def test_videos_that_cannot_be_opened_or_written(
    tmp_path: Path, model_arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    good = save_video(tmp_path / "good.mp4", frames=2)
    unknown = tmp_path / "unknown.avi"
    unknown.write_bytes(save_noise(tmp_path / "known.avi", "MJPG").replace(b"MJPG", b"ZZZZ"))
    empty = tmp_path / "empty.avi"
    empty.touch()
    words = [unknown, empty, tmp_path / "gone.mp4"]
    assert run_demo(words, tmp_path / "out", model_arguments) == 1
    printed = capsys.readouterr().err
    assert "unknown.avi: OpenCV has no decoder for its codec ZZZZ" in printed
    assert "empty.avi: it is empty" in printed
    assert "gone.mp4 does not exist" in printed
    (tmp_path / "out" / "good.mp4").mkdir(parents=True)  # a folder stands where the file goes
    assert run_demo([good], tmp_path / "out", model_arguments) == 1
    assert (
        f"cannot write {tmp_path / 'out' / 'good.mp4'}: Is a directory" in capsys.readouterr().err
    )
    assert run_demo([good], good, model_arguments) == 1
    assert "File exists" in capsys.readouterr().err


def test_video_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    from video import VideoError, VideoWriter

    writer = VideoWriter(tmp_path / "clip.mp4", 10)
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.frames += 3  # frames that OpenCV took, and lost
    with pytest.raises(VideoError, match="holds 1 of 4 frames"):
        writer.close()


def test_codec_is_read_from_the_container(tmp_path: Path, shared_video: Path) -> None:
    from containers import codec_of

    assert codec_of(save_video(tmp_path / "own.mp4")) == "mp4v"
    assert codec_of(shared_video) == "avc1"


@pytest.fixture
def shared_video(shared: object) -> Path:
    return shared("data", "video", "car-detection.mp4")


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

    from maskdino.inference.predictor import MaskDINOPredictor

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
