"""Streams of a camera that speaks RTSP and asks for a password, and that breaks off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from maskdino.inference import streams
from maskdino.inference.streams import ATTEMPTS, Stream
from maskdino.inference.video import VideoError, VideoReader
from tests.inference.rtsp import Camera, pictures_of

pytest.importorskip("av")

FRAMES = 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip") / "clip.ts"


@pytest.fixture
def camera(clip: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Camera]:
    """With 30 pictures at 10 Hz."""
    monkeypatch.setattr(streams, "WAIT", 0.01)
    monkeypatch.setattr(streams, "LATENESS", 60.0)  # the machine may be slow
    with Camera(pictures_of(clip, FRAMES)) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield it
        it.ended.set()
        it.shutdown()


def read(stream: Stream) -> tuple[list[np.ndarray], list[float], str]:
    """Images, times, and the message of the end."""
    images, times, message = [], [], ""
    with closing(stream):
        try:
            for image, seconds in stream:
                images.append(image)
                times.append(seconds)
        except VideoError as error:
            message = str(error)
    return images, times, message


def test_a_live_camera(camera: Camera, clip: Path) -> None:
    """Each picture arrives, as it is in the file; when the camera is gone, attempts end."""
    camera.limits, camera.rest = [FRAMES], 0
    stream = Stream(camera.address)
    assert (stream.frames, stream.rate) == (None, 10)
    images, times, message = read(stream)
    with closing(VideoReader(clip)) as reader:
        wanted = [image for image, _ in reader]
    assert len(images) == len(wanted) == FRAMES
    assert all((a == b).all() for a, b in zip(images, wanted, strict=True))
    assert times == sorted(times)
    assert f"/live broke off (it ended), and {ATTEMPTS} attempts" in message
    assert "secret" not in message and "\n" not in message
    assert camera.asked.count("PLAY") == 1 + ATTEMPTS
    assert stream.reopened == ATTEMPTS


@pytest.mark.parametrize("silent", [0, 1])
def test_a_camera_that_breaks_off_is_opened_again(
    camera: Camera, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the connection ends, or nothing more comes: what came is kept, to the last picture.

    That may be lost: its end is told by the beginning of the next.
    """
    monkeypatch.setattr(streams, "PATIENCE", 2.0)
    camera.silent, camera.limits, camera.rest = silent, [15, FRAMES], 0
    stream = Stream(camera.address)
    images, times, message = read(stream)
    assert 15 + FRAMES - 2 <= len(images) <= 15 + FRAMES
    assert len({image.tobytes() for image in images[:13]}) == 13
    assert times == sorted(times) and stream.reopened == 1 + ATTEMPTS
    assert "5 attempts" in message and camera.silent == 0


def test_a_recording_goes_on_where_it_was(camera: Camera) -> None:
    """It tells its length, and begins where it is asked to: no picture is lost or comes twice."""
    camera.length, camera.limits = True, [14]
    stream = Stream(camera.address)
    assert stream.frames == FRAMES
    images, times, message = read(stream)
    assert message == "" and stream.reopened == 1
    np.testing.assert_allclose(times, np.arange(FRAMES) / 10, atol=0.002)
    assert len({image.tobytes() for image in images}) == FRAMES


def test_a_recording_that_falls_silent(camera: Camera, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the decoder still held when the connection broke is kept, at its time."""
    monkeypatch.setattr(streams, "PATIENCE", 2.0)
    camera.length, camera.limits, camera.silent, camera.rest = True, [14], 1, 0
    _, times, message = read(Stream(camera.address))
    assert "5 attempts" in message and len(times) >= 13
    np.testing.assert_allclose(times, np.arange(len(times)) / 10, atol=0.002)


def test_a_wrong_password(camera: Camera) -> None:
    with pytest.raises(VideoError, match=r"cannot open rtsp://127\S*/live: .*401") as error:
        Stream(camera.address.replace("secret", "other"))
    assert "other" not in str(error.value)
