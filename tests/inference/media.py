"""Images and videos for tests, and what OpenCV, which did not write them, reads of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image


def save_image(path: Path, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
    return path


def save_video(path: Path, frames: int = 6, rate: float = 10) -> Path:
    """A square that moves to the right."""
    from maskdino.inference.video import VideoWriter

    with closing(VideoWriter(path, rate)) as writer:
        for i in range(frames):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[16:32, 4 * i : 4 * i + 16] = (250, 120, 0)
            writer.write(frame, i / rate)
    return path


def save_noise(path: Path, codec: str, frames: int = 30, **options: str) -> bytearray:
    """Writes a video of which every frame takes many bytes, at 10 Hz; returns the file's."""
    import av

    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10, width=64, height=48)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 6
        for _ in range(frames):
            values = noise.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    return bytearray(path.read_bytes())


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


def frames_of(path: Path) -> tuple[float, list[np.ndarray]]:
    """Frames per second and frames (H, W, 3) RGB of a video, by OpenCV."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return capture.get(cv2.CAP_PROP_FPS), frames


class FakeCapture:
    """Stands in for OpenCV's camera, and for the clock, which each image moves by 1/8 s.

    Args:
        values: gray values of the images; None for one that cannot be read. After the last one
            nothing can be read, and the clock moves by a second.
    """

    def __init__(self, values: Iterable[int | None]) -> None:
        self._values, self.seconds, self.released = iter(values), 100.0, False
        self.clock = SimpleNamespace(monotonic=lambda: self.seconds, sleep=lambda _: None)

    def isOpened(self) -> bool:  # OpenCV's name
        return True

    def set(self, *_: float) -> bool:
        return False

    def read(self) -> tuple[bool, np.ndarray | None]:
        value = next(self._values, -1)
        self.seconds += 1 if value == -1 else 1 / 8
        if value is None or value < 0:
            return False, None
        return True, np.full((48, 64, 3), value, np.uint8)

    def release(self) -> None:
        self.released = True
