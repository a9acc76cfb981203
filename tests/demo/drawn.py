"""Commands, pictures and videos for the tests of the demo."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def run_words(words: list[str], output: Path, model: list[str]) -> int:
    """Runs the command in this process; returns its exit status."""
    import demo

    module = demo if hasattr(demo, "main") else sys.modules["demo"]
    return module.main([*words, "--output", str(output), *model])


def run_demo(inputs: list[Path | str], output: Path, model: list[str], *more: str) -> int:
    """Runs the command with files."""
    return run_words(["--input", *map(str, inputs), *more], output, model)


def run_camera(output: Path, model: list[str], *more: str) -> int:
    """Runs the command with a camera."""
    return run_words(["--webcam", *more], output, model)


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


def save_noise(path: Path, codec: str, frames: int = 12) -> bytearray:
    """Writes a video of which every frame takes many bytes; returns the file's."""
    from video import VideoWriter

    noise = np.random.default_rng(0)
    with closing(VideoWriter(path, 10, codec)) as writer:
        for _ in range(frames):
            writer.write(noise.integers(0, 256, (48, 64, 3), np.uint8))
    return bytearray(path.read_bytes())


def frames_of(path: Path) -> tuple[float, list[np.ndarray]]:
    """Rate and frames of a video, by OpenCV alone."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return capture.get(cv2.CAP_PROP_FPS), frames


class FakeCapture:
    """Stands in for OpenCV's: what can be read, at 25 frames per second.

    Args:
        frames: numbers of the frames, which their times follow; None for one that cannot be read.
        camera: after the last frame, the first comes again.
        rate: frames per second that it claims.
    """

    def __init__(
        self, frames: Iterable[int | None], *, camera: bool = False, rate: float = 25
    ) -> None:
        self._frames = itertools.cycle(frames) if camera else iter(frames)
        self._properties = {cv2.CAP_PROP_FPS: rate, cv2.CAP_PROP_FRAME_COUNT: -1.0}
        self.released = False

    def isOpened(self) -> bool:  # OpenCV's name
        return True

    def set(self, *_: float) -> bool:
        return False

    def get(self, what: int) -> float:
        return self._properties.get(what, 0.0)

    def read(self) -> tuple[bool, np.ndarray | None]:
        number = next(self._frames, None)
        if number is None:
            return False, None
        self._properties[cv2.CAP_PROP_POS_MSEC] = number * 40.0
        return True, np.full((48, 64, 3), number, np.uint8)

    def release(self) -> None:
        self.released = True
