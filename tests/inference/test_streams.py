"""Streams of a local server that breaks off: they are opened again, a few times, and go on."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdino.inference import streams
from maskdino.inference.streams import Stream, file_stem, is_stream, shown_address
from maskdino.inference.video import VideoError, VideoReader
from tests.inference.media import save_noise, save_video

pytest.importorskip("av")


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, and ends connections early.

    Attributes:
        content: of the file.
        limits: bytes that the next connections send before they break; after these, `rest`.
        rest: None for all.
        ranges: answers requests for a part.
        length: tells how long the file is; else it looks live.
        asked: requests so far.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        self.content, self.limits, self.rest = content, list[int](), None
        self.ranges, self.length, self.asked = True, True, 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://me:secret@127.0.0.1:{self.server_address[1]}/a/clip"

    def handle_error(self, *_: object) -> None:
        """The client may leave early."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        limit = server.limits.pop(0) if server.limits else server.rest
        begin = 0
        asked = self.headers.get("Range", "")
        if server.ranges and asked.startswith("bytes="):
            begin = int(asked[6:].split("-")[0])
            self.send_response(206)
            total = len(server.content)
            self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if server.length:
            self.send_header("Content-Length", str(len(server.content) - begin))
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        body = server.content[begin:]
        self.wfile.write(body if limit is None else body[:limit])

    def log_message(self, *_: object) -> None:
        """Nothing is said."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Of a Matroska file with 30 frames at 10 Hz."""
    monkeypatch.setattr(streams, "WAIT", 0.01)
    with Server(
        bytes(save_noise(tmp_path / "clip.mkv", "libx264", cluster_time_limit="300"))
    ) as it:
        thread = threading.Thread(target=it.serve_forever, daemon=True)
        thread.start()
        yield it
        it.shutdown()


def read(stream: Stream) -> list[float]:
    with closing(stream):
        return [seconds for _, seconds in stream]


def test_a_whole_file(server: Server, tmp_path: Path) -> None:
    stream = Stream(server.address)
    assert (stream.rate, stream.frames, stream.reopened) == (10, 30, 0)
    with closing(VideoReader(tmp_path / "clip.mkv")) as reader:
        wanted = list(reader)
    found = list(stream)
    assert [s for _, s in found] == pytest.approx([s for _, s in wanted])
    assert all((a == b).all() for (a, _), (b, _) in zip(found, wanted, strict=True))
    assert stream.reopened == 0


@pytest.mark.parametrize("ranges", [True, False])
def test_what_breaks_off_goes_on_where_it_was(server: Server, ranges: bool) -> None:
    """No frame comes twice, and none is lost."""
    server.ranges = ranges
    half, most = len(server.content) // 2, len(server.content) * 4 // 5
    server.limits = [half, most] if not ranges else [half] * 3
    stream = Stream(server.address)
    times = read(stream)
    assert times == pytest.approx([i / 10 for i in range(30)], abs=0.002)
    assert stream.reopened >= 1


def test_attempts_are_counted(server: Server) -> None:
    """What was seen before is there; the message names no password."""
    server.ranges, server.rest = False, len(server.content) // 2
    stream = Stream(server.address)
    seen = []
    with pytest.raises(VideoError, match="broke off .* 5 attempts") as error, closing(stream):
        for _, seconds in stream:
            seen.append(seconds)
    assert 8 <= len(seen) <= 20
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert server.asked <= 2 + 5 * 2


def test_a_live_stream_that_comes_back(server: Server, tmp_path: Path) -> None:
    """Times are those of the clock; after the last connection, attempts end."""
    server.content = bytes(save_noise(tmp_path / "live.ts", "libx264"))
    with closing(VideoReader(tmp_path / "live.ts")) as reader:
        frames = len(list(reader))
    server.length = server.ranges = False
    server.limits = [len(server.content)] * 2
    server.rest = 0
    stream = Stream(server.address)
    assert stream.frames is None
    seen: list[float] = []
    with pytest.raises(VideoError, match="attempts at opening it again"), closing(stream):
        for _, seconds in stream:
            seen.append(seconds)
    assert len(seen) == 2 * frames > 50 and stream.reopened == 1
    assert seen == sorted(seen)


def test_a_camera_that_sends_single_images(server: Server) -> None:
    """As network cameras do (multipart/x-mixed-replace): without times, and without an end."""
    parts = []
    for _ in range(20):
        jpeg = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(jpeg, "JPEG")
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {jpeg.tell()}\r\n\r\n"
        parts.append(head.encode() + jpeg.getvalue() + b"\r\n")
    server.content = b"".join(parts)
    server.length = server.ranges = False
    server.limits = [len(server.content), len(server.content) // 2]
    server.rest = 0
    seen: list[float] = []
    with (
        pytest.raises(VideoError, match="attempts at opening"),
        closing(Stream(server.address)) as stream,
    ):
        for image, seconds in stream:
            assert image.shape == (48, 64, 3)
            seen.append(seconds)
    assert 28 <= len(seen) <= 31 and seen == sorted(seen)
    assert stream.reopened == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no video at all", "Invalid data"), (b"", ".+")],
)
def test_addresses_without_video(content: bytes, message: str, server: Server) -> None:
    server.content = content
    with pytest.raises(VideoError, match=f"cannot open http://127.*/a/clip: {message}") as error:
        Stream(server.address)
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(VideoError, match="cannot open rtsp://127.0.0.1:9/x: Connection refused"):
        Stream("rtsp://me:secret@127.0.0.1:9/x?token=1")


def test_addresses() -> None:
    for word in ("rtsp://h/x", "HTTP://h", "https://h/a.mp4"):
        assert is_stream(word)
    for word in ("a.mp4", "C://x.mp4", "file:///x", "rtsp:/h", "://", "a/http://b"):
        assert not is_stream(word)
    assert shown_address("rtsp://a:b@h:5/x?p=1") == "rtsp://h:5/x"
    assert file_stem("rtsp://a:b@h.org:5/x/y.mp4?p=1") == "h_org_5_x_y_mp4"


def test_files_of_the_other_reader_stay(tmp_path: Path) -> None:
    """A whole MP4 file is read the same by both."""
    path = save_video(tmp_path / "clip.mp4", 4)
    with Server(path.read_bytes()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read(Stream(server.address)) == pytest.approx([0, 0.1, 0.2, 0.3])
        server.shutdown()
