"""Frames of videos and cameras: read with what is broken counted, written at the same rate."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from containers import count_error, why_unreadable
from damage import MAX_FAILURES

# What goes wrong is reported here, once: OpenCV and FFmpeg need not tell, too.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "8")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2  # reads the variables when it is imported
import numpy as np

DEFAULT_RATE = 25.0  # frames per second, where a file or camera names none
MILLISECONDS = 1000.0  # a "rate" that is the unit of time stamps, in files of browsers
GUESS_ERROR = 2  # frames; where OpenCV guesses how many there are
CAMERA_PATIENCE = 5.0  # seconds in which a camera may give no picture
CODEC = "mp4v"  # MPEG-4, which every build of OpenCV with FFmpeg can write


class VideoError(OSError):
    """A video that cannot be read or written; the message names it and says why."""


@dataclass
class VideoReader:
    """Yields frames (H, W, 3) uint8 RGB; None for a frame that cannot be decoded.

    A decoder may leave out what it cannot decode; then the time stamps have a gap, and as many
    frames are taken to be lost as fit into it. So a video of varying rate keeps its length, too.

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
    _live: bool = field(default=False, repr=False)
    _count_error: int | None = field(default=0, repr=False)  # of `frames`; None: a mere guess

    @staticmethod
    def of_file(path: Path) -> VideoReader:
        """Opens a file.

        Raises:
            VideoError: it is missing, no video, or its codec is not known here.
        """
        if not path.is_file():
            raise VideoError(f"video {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        try:
            path.open("rb").close()
        except OSError as error:
            raise VideoError(f"cannot read video {path}: {error.strerror}") from error
        # From the root on: FFmpeg takes what stands before a colon for a protocol.
        capture = cv2.VideoCapture(str(path.absolute()))
        if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) < 1:
            raise VideoError(f"cannot read video {path}: {why_unreadable(path)}")
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return VideoReader(
            str(path),
            _rate(capture),
            frames if frames > 0 else None,
            _capture=capture,
            _count_error=count_error(path),
        )

    @staticmethod
    def of_camera(number: int) -> VideoReader:
        """Opens a camera, 0 the first.

        Raises:
            VideoError: there is none.
        """
        capture = cv2.VideoCapture(number)
        if not capture.isOpened():
            raise VideoError(_why_no_camera(number))
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest picture, not the oldest
        return VideoReader(f"camera {number}", _rate(capture), None, _capture=capture, _live=True)

    def __iter__(self) -> Iterator[np.ndarray | None]:
        try:
            yield from self._of_camera() if self._live else self._of_file()
        finally:
            self._capture.release()

    def _of_camera(self) -> Iterator[np.ndarray]:
        """Frames without end; a picture that is lost on the way is made good by the next one."""
        last = time.monotonic()
        while time.monotonic() - last <= CAMERA_PATIENCE:
            readable, frame = self._capture.read()
            if readable:
                yield np.ascontiguousarray(frame[..., ::-1])
                last = time.monotonic()  # not before: whoever takes the frame may be slow
            else:
                time.sleep(0.01)
        raise VideoError(f"{self.name} gave no picture for {CAMERA_PATIENCE:g} s")

    def _of_file(self) -> Iterator[np.ndarray | None]:
        number = whole = failures = 0
        unread: list[int] = []  # lost for certain, whatever time stamps say
        last = math.nan
        while failures < MAX_FAILURES:
            readable, frame = self._capture.read()
            if not readable:
                # Frames after it may be whole; if none is, the file was cut off.
                failures += 1
                if number + failures > (self.frames or 0):
                    break
                continue
            now = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            lost = max(failures, self._gap(now - last))
            unread += range(number, number + failures)
            self.broken += range(number, number + lost)
            yield from [None] * lost
            yield np.ascontiguousarray(frame[..., ::-1])
            number, whole, failures, last = number + lost + 1, whole + 1, 0, now
        if whole >= (self.frames or 0) or self._count_error is None:
            self.broken = unread  # no frame is known to be lost: the gaps may be meant
        missing = (self.frames or 0) - number
        tolerance = GUESS_ERROR if self._count_error is None else self._count_error
        self.missing = missing if missing > tolerance else 0

    def _gap(self, seconds: float) -> int:
        """How many frames fit between two that were read one after the other."""
        if not seconds * self.rate > 1.5:  # also for NaN
            return 0
        frames = round(seconds * self.rate) - 1
        # A time stamp that is itself broken may claim days.
        return frames if frames < (self.frames or 60 * self.rate) else 0

    def problem(self) -> str:
        """What was wrong with the frames, or ""."""
        parts = []
        if self.broken:
            number = len(self.broken)
            parts.append(
                f"{number} broken frame{'s' * (number > 1)}, drawn like the one before: "
                f"{ranges(self.broken)}"
            )
        if self.missing:
            parts.append(
                f"it ends after frame {self.frames - self.missing - 1}: {self.missing} of "
                f"{self.frames} frames are missing, there or in between"
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

        Codecs, and OpenCV for all of them, know even sizes only: an odd edge gets one more line,
        like its last.

        Raises:
            VideoError: the codec is missing, or the folder cannot be written.
        """
        height, width = frame.shape[:2]
        if self._writer is None:
            self._size = (width, height)
            self._writer = self._open()
        if (width, height) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        even = np.pad(frame, ((0, self._size[1] % 2), (0, self._size[0] % 2), (0, 0)), "edge")
        self._writer.write(np.ascontiguousarray(even[..., ::-1]))
        self.frames += 1

    def close(self) -> None:
        """Completes the file.

        Raises:
            VideoError: frames did not arrive in it, which OpenCV does not tell when they are
                written.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        arrived = int(cv2.VideoCapture(str(self.path.absolute())).get(cv2.CAP_PROP_FRAME_COUNT))
        if arrived < self.frames:
            raise VideoError(
                f"{self.path} holds {max(arrived, 0)} of {self.frames} frames: is the disk full?"
            )

    def _open(self) -> cv2.VideoWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("wb").close()
        except OSError as error:
            raise VideoError(f"cannot write {self.path}: {error.strerror}") from error
        fourcc = cv2.VideoWriter.fourcc(*self.codec)
        width, height = (edge + edge % 2 for edge in self._size)
        writer = cv2.VideoWriter(str(self.path.absolute()), fourcc, self.rate, (width, height))
        if not writer.isOpened():
            self.path.unlink(missing_ok=True)
            raise VideoError(
                f"cannot write {self.path}: OpenCV has no encoder for the codec {self.codec} in "
                f"{self.path.suffix} files of {width} x {height} pixels; try --codec {CODEC}"
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


def ranges(numbers: Iterable[int], most: int = 10) -> str:
    """Increasing integers as text: "3, 5-8"; at most so many ranges."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [f"{low}" if low == high else f"{low}-{high}" for low, high in found[:most]]
    return ", ".join([*shown, "..."] if len(found) > most else shown)


def _rate(capture: cv2.VideoCapture) -> float:
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if math.isfinite(rate) and 0 < rate < MILLISECONDS else DEFAULT_RATE


def _why_no_camera(number: int) -> str:
    if not sys.platform.startswith("linux"):
        return f"there is no camera {number}, or another program uses it"
    device = Path(f"/dev/video{number}")
    if device.exists():
        reason = "is no camera, is used by another program, or you may not read it"
        return f"cannot open camera {number}: {device} {reason}"
    others = ", ".join(map(str, sorted(device.parent.glob("video*")))) or "none"
    return f"cannot open camera {number}: there is no {device} (there are: {others})"
