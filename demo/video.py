"""Frames of videos and cameras: read with what is broken counted, written at the same rate."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Broken frames are counted and reported here: FFmpeg need not tell of each.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "8")

import cv2  # noqa: E402  reads the variable when it is imported
import numpy as np  # noqa: E402

DEFAULT_RATE = 25.0  # frames per second, where a file or camera names none
GUESSED_FRAMES = 2  # the frame counts of containers may be wrong by so many
CODEC = "mp4v"  # MPEG-4, which every build of OpenCV with FFmpeg can write
# How MP4, QuickTime and AVI, then Matroska and WebM, name the codec of a video track.
_FOUR_LETTERS = re.compile(rb"(?:stsd.{12}|strf.{20})([A-Za-z0-9 ._-]{4})", re.DOTALL)
_MATROSKA_START = bytes.fromhex("1a45dfa3")
_MATROSKA = re.compile(rb"V_[A-Z0-9/_]{2,30}")
_SEARCHED_BYTES = 1 << 22  # at either end of a file


class VideoError(OSError):
    """A video that cannot be read or written; the message names it and says why."""


@dataclass
class VideoReader:
    """Yields frames (H, W, 3) uint8 RGB; None for a frame that cannot be decoded.

    Attributes:
        name: path, or number of the camera.
        rate: frames per second.
        frames: how many the file promises; None where it does not tell.
        broken: numbers of the frames that could not be decoded, from 0.
        missing: frames that were promised after the last one that could be read.
    """

    name: str
    rate: float
    frames: int | None
    broken: list[int] = field(default_factory=list)
    missing: int = 0
    _capture: cv2.VideoCapture = field(default=None, repr=False)

    @staticmethod
    def of_file(path: Path) -> VideoReader:
        """Opens a file.

        Raises:
            VideoError: it is missing, no video, or its codec is not known here.
        """
        if not path.is_file():
            raise VideoError(f"video {path} does not exist")
        capture = cv2.VideoCapture(str(path))
        if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) < 1:
            codec = codec_of(path)
            known = f"OpenCV has no decoder for its codec {codec}" if codec else "it is no video"
            raise VideoError(f"cannot read video {path}: {known}")
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return VideoReader(
            str(path), _rate(capture), frames if frames > 0 else None, _capture=capture
        )

    @staticmethod
    def of_camera(number: int) -> VideoReader:
        """Opens a camera, 0 the first.

        Raises:
            VideoError: there is none.
        """
        capture = cv2.VideoCapture(number)
        if not capture.isOpened():
            raise VideoError(f"there is no camera {number}, or another program uses it")
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest picture, not the oldest
        return VideoReader(f"camera {number}", _rate(capture), None, _capture=capture)

    def __iter__(self) -> Iterator[np.ndarray | None]:
        number, failures = 0, []
        while self.frames is None or number < self.frames:
            readable, frame = self._capture.read()
            if readable:
                self.broken += failures
                yield from [None] * len(failures)
                failures = []
                yield np.ascontiguousarray(frame[..., ::-1])
            elif self.frames is None:
                break
            else:
                # Frames after it may be whole; if none is, the file was cut off.
                failures.append(number)
            number += 1
        self.missing = len(failures) if len(failures) > GUESSED_FRAMES else 0
        self._capture.release()

    def problem(self) -> str:
        """What was wrong with the frames, or ""."""
        parts = []
        if self.broken:
            shown = ", ".join(map(str, self.broken[:10])) + (
                ", ..." if len(self.broken) > 10 else ""
            )
            parts.append(f"{len(self.broken)} broken frames show the one before them: {shown}")
        if self.missing:
            parts.append(
                f"it ends after frame {self.frames - self.missing - 1}, the last "
                f"{self.missing} of {self.frames} frames cannot be read"
            )
        return "; ".join(parts)


class VideoWriter:
    """Writes frames into a file that can be played once it is closed, also after an error."""

    def __init__(self, path: Path, rate: float, codec: str = CODEC) -> None:
        """
        Args:
            path: .mp4 or whatever the codec goes with.
            rate: frames per second.
            codec: four letters.
        """
        if len(codec) != 4:
            raise VideoError(f"codec {codec!r} must have four letters, as mp4v or avc1")
        self.path, self.rate, self.codec, self.frames = path, rate, codec, 0
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame (H, W, 3) uint8 RGB; the first one determines the size.

        Raises:
            VideoError: the codec is missing, or the folder cannot be written.
        """
        height, width = frame.shape[:2]
        if self._writer is None:
            self._size = (width, height)
            self._writer = self._open()
        if (width, height) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))
        self.frames += 1

    def close(self) -> None:
        """Completes the file."""
        if self._writer is not None:
            self._writer.release()

    def _open(self) -> cv2.VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fourcc = cv2.VideoWriter.fourcc(*self.codec)
        writer = cv2.VideoWriter(str(self.path), fourcc, self.rate, self._size)
        if not writer.isOpened():
            raise VideoError(
                f"cannot write {self.path}: OpenCV has no encoder for the codec {self.codec} in "
                f"{self.path.suffix} files, or the folder is not writable; try --codec {CODEC}"
            )
        return writer


class LiveWriter:
    """Repeats or drops frames so that the file of a camera plays as fast as life was."""

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer
        self._begin: float | None = None

    def write(self, frame: np.ndarray) -> None:
        """Writes the frame as often as time asks for, perhaps not at all."""
        self._begin = self._begin or time.monotonic()
        due = int((time.monotonic() - self._begin) * self._writer.rate) + 1
        for _ in range(due - self._writer.frames):
            self._writer.write(frame)


def codec_of(path: Path) -> str:
    """The name of a file's video codec as its container states it; "" if it states none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        content = file.read(_SEARCHED_BYTES)
        file.seek(max(len(content), size - _SEARCHED_BYTES))
        content += file.read(_SEARCHED_BYTES)
    if content.startswith(_MATROSKA_START):
        track = _MATROSKA.search(content)
        return track[0].decode("ascii") if track else ""
    sound = {"mp4a", "ac-3", "ec-3", "alac", "sowt", "twos", "lpcm", ".mp3", "tx3g", "text", "tmcd"}
    letters = (match[1].decode("ascii") for match in _FOUR_LETTERS.finditer(content))
    return next((four for four in letters if four not in sound), "")


def _rate(capture: cv2.VideoCapture) -> float:
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if math.isfinite(rate) and 0 < rate <= 1000 else DEFAULT_RATE
