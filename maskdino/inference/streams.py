"""Video from the network (rtsp://, http://, https://); what breaks off is opened again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from maskdino.inference.video import (
    MICROSECONDS,
    TimedImage,
    VideoError,
    ffmpeg_reason,
    rate_of,
    require_pyav,
    upright,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "udp", "srt")
ATTEMPTS = 5  # at opening a stream again, without a new image between them
WAIT = 1.0  # seconds before the second of them, and twice as many before each next one
PATIENCE = 10.0  # seconds in which a stream must answer
LATENESS = 1.0  # seconds by which live images may be late; later ones are passed over


def is_stream(word: str) -> bool:
    """Whether what a user names is an address."""
    scheme, found, _ = word.partition("://")
    return bool(found) and scheme.lower() in SCHEMES


def shown_address(address: str) -> str:
    """The address without user, password and query, for messages."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def file_stem(address: str) -> str:
    """A name for files about a stream: of its host and path."""
    _, _, rest = shown_address(address).partition("://")
    return re.sub(r"\W+", "_", rest).strip("_") or "stream"


class Stream:
    """What an address shows.

    Attributes:
        name: the address, without user and password.
        rate: frames per second, on average.
        frames: how many it promises; None where it is live, or does not tell.
        reopened: how often it was opened again.
        passed: live images that were passed over, as they came too late.
    """

    def __init__(self, address: str) -> None:
        """Opens the stream.

        Raises:
            ModuleNotFoundError: PyAV is not installed.
            VideoError: there is none, or it is no video.
        """
        self._av = require_pyav()
        self._address, self.name = address, shown_address(address)
        self._is_rtsp = address.lower().startswith("rtsp")
        self.reopened = self.passed = 0
        self._container = self._connect()
        stream = self._container.streams.video[0]
        self.rate = rate_of(stream)
        self._length: float | None = None  # seconds; None: live
        if stream.duration and stream.time_base:
            self._length = float(stream.duration * stream.time_base)
        elif self._container.duration:
            self._length = self._container.duration / MICROSECONDS
        self.frames: int | None = None
        if self._length is not None:
            self.frames = stream.frames or round(self._length * self.rate)

    def __iter__(self) -> Iterator[TimedImage]:
        """Images and their times, which increase from 0; of live ones by the clock.

        Raises:
            VideoError: it broke off, and could not be opened again.
        """
        begin, last, failures = time.monotonic(), -1.0, 0
        while True:
            fault, progress = "it ended", False
            try:
                for frame, own_seconds in self._frames(last):
                    seconds = time.monotonic() - begin if self._length is None else own_seconds
                    yield upright(frame), max(seconds, 0.0)
                    last, progress = seconds, True
            except (self._av.error.FFmpegError, OSError) as error:
                fault = ffmpeg_reason(error)
            if self._length is not None and last >= self._length - 1.5 / self.rate:
                return
            try:
                failures = self._reopen(0 if progress else failures, fault)
            except VideoError:
                if self._length is not None and last >= 0.95 * self._length - 2 / self.rate:
                    return  # its sound is longer than its images
                raise

    def close(self) -> None:
        """Closes the connection."""
        with suppress(self._av.error.FFmpegError, OSError):
            self._container.close()

    def _frames(self, last: float) -> Iterator[tuple[VideoFrame, float]]:
        """Whole frames and their own times: those after `last`; of live streams, those in time."""
        stream = self._container.streams.video[0]
        unit = float(stream.time_base or 0)  # not of the frame: what is flushed has none
        start = (stream.start_time or 0) * unit
        if self._is_rtsp:  # times are the recording's own, and the first image comes without one
            start = 0.0
        if self._length is not None and last > 0:
            with suppress(self._av.error.FFmpegError):  # then it begins anew
                self._container.seek(int((last + start) * MICROSECONDS))
        first: float | None = None
        connected = time.monotonic()
        for frame in self._decoded(stream):
            seconds = max(last, 0.0) if frame.pts is None else frame.pts * unit - start
            if frame.is_corrupt:
                continue
            if self._length is not None:
                if seconds > last + 1e-6:
                    yield frame, seconds
                continue
            first = seconds if first is None else first
            if time.monotonic() - connected > seconds - first + LATENESS and frame.pts is not None:
                self.passed += 1
            else:
                yield frame, seconds

    def _decoded(self, stream: VideoStream) -> Iterator[VideoFrame]:
        """All frames; on an error, too, those that the decoder still has."""
        try:
            yield from self._container.decode(stream)
        except self._av.error.FFmpegError:
            with suppress(self._av.error.FFmpegError):
                yield from stream.codec_context.decode(None)
            raise

    def _reopen(self, failures: int, fault: str) -> int:
        """Opens the stream again; returns how many attempts in a row there were.

        Raises:
            VideoError: these are too many.
        """
        self.close()
        while failures < ATTEMPTS:
            time.sleep(WAIT * 2 ** (failures - 1) if failures else 0)
            failures += 1
            try:
                self._container = self._connect()
            except VideoError:
                continue
            self.reopened += 1
            return failures
        raise VideoError(
            f"{self.name} broke off ({fault}), and {ATTEMPTS} attempts at opening it again brought "
            "nothing new"
        )

    def _connect(self) -> InputContainer:
        options = {"rtsp_transport": "tcp"} if self._is_rtsp else {}
        try:
            container = self._av.open(self._address, options=options, timeout=PATIENCE)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot open {self.name}: {ffmpeg_reason(error)}") from error
        if not container.streams.video:
            container.close()
            raise VideoError(f"cannot open {self.name}: it has no video track")
        return container
