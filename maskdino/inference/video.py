"""Frames of videos and cameras with their times, and drawn videos that keep these times.

Files go through PyAV (`pip install av`), which brings FFmpeg and an H.264 encoder; cameras through
OpenCV. Images are (H, W, 3) uint8 RGB; times are seconds from the first frame on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

TimedImage = tuple[np.ndarray, float]

DEFAULT_RATE = 25.0  # frames per second, where a file or camera names none
MAX_RATE = 1000  # files of browsers give their unit of time as a rate
TIME_UNIT = Fraction(1, 120_000)  # seconds; all usual rates, 24/1.001 to 60, are a multiple of it
MICROSECONDS = 1_000_000  # in one second
CAMERA_PATIENCE = 5.0  # seconds in which a camera may give no image
SILENT = 0  # of what OpenCV says
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers for the colors and the range of HD video


class VideoError(OSError):
    """A video that cannot be read or written; the message names it and says why."""


def require_pyav() -> ModuleType:
    """The package `av`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("videos need PyAV: pip install av") from error
    return av


def ffmpeg_reason(error: Exception) -> str:
    """What went wrong, without the path that FFmpeg and Python add."""
    return getattr(error, "strerror", None) or str(error)


def rate_of(stream: VideoStream) -> float:
    """Frames per second, on average; the usual rate where there is none that makes sense."""
    rate = float(stream.average_rate or DEFAULT_RATE)
    return rate if 0 < rate < MAX_RATE else DEFAULT_RATE


def upright(frame: VideoFrame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8 RGB, turned as it is meant."""
    # PyAV up to 16 reads the frame's own color space only if that of the result is named.
    image = frame.reformat(format="rgb24", dst_colorspace="ITU601").to_ndarray()
    return np.ascontiguousarray(np.rot90(image, frame.rotation // 90))


class VideoReader:
    """The frames of a file, turned upright; damaged ones are left out.

    Attributes:
        name: of the file, without its folder.
        rate: frames per second, on average.
        frames: how many the file promises; None where it does not tell.
        decoded: frames that were read so far.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens a file.

        Raises:
            ModuleNotFoundError: PyAV is not installed.
            VideoError: the file is missing, no video, or its codec is not known.
        """
        av, path = require_pyav(), Path(path)
        if not path.is_file():
            raise VideoError(f"video {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        self.name, self.decoded, self._failed = path.name, 0, 0
        self._decoding_error: type[Exception] = av.error.FFmpegError
        try:
            if path.stat().st_size == 0:
                raise VideoError("it is empty")
            # From the root on: FFmpeg takes what stands before a colon for a protocol.
            self._container: InputContainer = av.open(str(path.absolute()))
            if not self._container.streams.video:
                raise VideoError("it has no video track")
            self._stream = self._container.streams.video[0]
            if self._stream.codec_context is None:
                raise VideoError("PyAV has no decoder for its codec")
        except av.error.InvalidDataError as error:
            raise VideoError(f"cannot read video {path}: it is none, or is damaged") from error
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(f"cannot read video {path}: {ffmpeg_reason(error)}") from error
        self.frames: int | None = self._stream.frames or None
        self.rate = rate_of(self._stream)

    def __iter__(self) -> Iterator[TimedImage]:
        """Images and their times, which increase from 0."""
        seconds = 0.0
        for frame in self._whole_frames():
            if self.decoded > 0:
                seconds = self._time(frame, seconds)
            self.decoded += 1
            yield upright(frame), seconds

    @property
    def skipped(self) -> int:
        """Frames that could not be decoded or, once all is read, were promised but not found."""
        return max(self._failed, (self.frames or 0) - self.decoded)

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def _whole_frames(self) -> Iterator[VideoFrame]:
        """The frames that are decoded without an error."""
        for packet in self._packets():
            try:
                frames = packet.decode()
            except self._decoding_error:
                self._failed += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._failed += 1
                else:
                    yield frame

    def _packets(self) -> Iterator[Packet]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_discard and self.frames:
                    self.frames -= 1  # whoever cut the video left it out
                yield packet
        except self._decoding_error:
            self._failed += 1  # what comes after it cannot be found

    def _time(self, frame: VideoFrame, last: float) -> float:
        """The time of a frame; if that of the file makes no sense, as at a constant rate."""
        begin, length = self._stream.start_time or 0, self._container.duration
        if frame.time is not None:
            seconds = frame.time - begin * float(self._stream.time_base)
            if last < seconds <= (math.inf if length is None else length / MICROSECONDS):
                return seconds
        return last + 1 / self.rate


class VideoWriter:
    """Writes an MP4 file in H.264, which gets its name when it is complete."""

    def __init__(self, path: Path, rate: float = DEFAULT_RATE) -> None:
        """Starts a file; nothing is written before the first image.

        Args:
            path: ends in .mp4; its folder is made.
            rate: frames per second, on average.

        Raises:
            ModuleNotFoundError: PyAV is not installed.
            VideoError: a folder has the name of the file.
        """
        self._av = require_pyav()
        if path.is_dir():
            raise VideoError(f"cannot write {path}: it is a folder")
        self.path, self.frames = path, 0
        self._rate = Fraction(rate).limit_denominator(1 << 16)
        self._part = path.with_stem(f"{path.stem}.part")
        self._output: tuple[OutputContainer, VideoStream] | None = None

    def write(self, image: np.ndarray, seconds: float) -> None:
        """Appends an image; the first one determines the size.

        H.264 has even sizes only: an odd edge gets one more line, like its last.

        Args:
            image: (H, W, 3) uint8 RGB.
            seconds: when it comes, after the one before.

        Raises:
            VideoError: the file cannot be written.
        """
        height, width = image.shape[:2]
        even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        with self._errors():
            container, stream = self._output or self._open(*even.shape[:2])
            frame = self._av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
                stream.width, stream.height, "yuv420p", dst_colorspace="ITU709"
            )
            frame.pts, frame.time_base = round(seconds / TIME_UNIT), TIME_UNIT
            container.mux(stream.encode(frame))
        self.frames += 1

    def close(self) -> None:
        """Completes the file; without an image there is none.

        Raises:
            VideoError: the file cannot be written.
        """
        if self._output is None:
            return
        container, stream = self._output
        with self._errors():
            container.mux(stream.encode(None))
            container.close()
            os.replace(self._part, self.path)
        self._output = None

    def _open(self, height: int, width: int) -> tuple[OutputContainer, VideoStream]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        container = self._av.open(str(self._part.absolute()), "w", format="mp4")
        stream = container.add_stream("h264", rate=self._rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = TIME_UNIT
        context.max_b_frames = 0  # with them, files of varying rate end too early
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        self._output = container, stream
        return self._output

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """If an error ends the block, the file is removed, and the error names it."""
        expected = (self._av.error.FFmpegError, OSError, ValueError)
        try:
            yield
        except expected as error:
            with suppress(*expected):
                if self._output is not None:
                    self._output[0].close()
            with suppress(OSError):
                self._part.unlink(missing_ok=True)
            self._output = None
            raise VideoError(f"cannot write {self.path}: {ffmpeg_reason(error)}") from error


class Camera:
    """What a camera sees.

    Attributes:
        name: "camera 0".
        frames: None, as there is no end.
    """

    frames = None

    def __init__(self, number: int) -> None:
        """Opens a camera, 0 the first.

        Raises:
            VideoError: there is none.
        """
        self.name = f"camera {number}"
        of = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4, and 5
        of.setLogLevel(SILENT)  # said once, below
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise VideoError(
                f"cannot open {self.name}: there is none, another program uses it, or you may not "
                "use it; try another number"
            )
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest image, not the oldest

    def __iter__(self) -> Iterator[TimedImage]:
        """Images and their times by the clock; those that cannot be read are passed over.

        Raises:
            VideoError: the camera gave no image for a while.
        """
        begin, last = None, time.monotonic()
        while time.monotonic() - last <= CAMERA_PATIENCE:
            readable, frame = self._capture.read()
            now = time.monotonic()
            if readable:
                begin = now if begin is None else begin
                yield np.ascontiguousarray(frame[..., ::-1]), now - begin
                last = time.monotonic()  # not before: whoever takes the image may be slow
            else:
                time.sleep(0.01)
        raise VideoError(f"{self.name} gave no image for {CAMERA_PATIENCE:g} s")

    def close(self) -> None:
        """Sets the camera free."""
        self._capture.release()
