"""A camera for tests: a server of RTSP 1.0 (RFC 2326) that sends H.264 over its one connection.

Requests are answered one after the other, so that a client is served as long as it waits for each
answer. Pictures go as RTP (RFC 6184) in interleaved frames, as fast as the client takes them.
"""

from __future__ import annotations

import base64
import re
import socketserver
import struct
import threading
from fractions import Fraction
from pathlib import Path

from tests.inference.media import save_noise

CLOCK, BEGIN = 90_000, 123_456  # units of RTP's time in a second, and its first value
LARGEST = 1200  # bytes of a NAL unit in one packet
KEY = 5  # type of a NAL unit that begins a group of pictures
Picture = tuple[float, list[bytes]]  # seconds, and its NAL units


def pictures_of(path: Path, frames: int = 30) -> list[Picture]:
    """A clip at 10 Hz, of which every sixth picture can be decoded by itself."""
    import av

    save_noise(path, "libx264", frames)
    pictures = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                units = re.split(rb"\x00\x00\x00?\x01", bytes(packet))[1:]
                seconds = float(packet.pts * Fraction(packet.time_base))
                pictures.append((seconds, [u.rstrip(b"\0") for u in units if u[0] & 31 != 9]))
    return [(seconds - pictures[0][0], units) for seconds, units in pictures]


class Camera(socketserver.ThreadingTCPServer):
    """Shows pictures to whoever asks for them with the right password.

    Attributes:
        pictures: of the clip.
        limits: how many of them the next connections get before they break; after these, `rest`.
        rest: None for all.
        length: tells how long the clip is, and begins where the client asks; else it looks live.
        silent: so many of the broken connections stay open, and nothing more comes.
        asked: methods of all requests so far.
    """

    daemon_threads = allow_reuse_address = True

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures, self.limits, self.rest = pictures, list[int](), None
        self.length, self.silent = False, 0
        self.asked, self.ended = list[str](), threading.Event()
        super().__init__(("127.0.0.1", 0), Connection)

    @property
    def address(self) -> str:
        return f"rtsp://me:secret@127.0.0.1:{self.server_address[1]}/live"

    def handle_error(self, *_: object) -> None:
        """The client may leave early."""


class Connection(socketserver.StreamRequestHandler):
    server: Camera

    def handle(self) -> None:
        while lines := self._request():
            method, address, _ = lines[0].split()
            headers = dict(line.split(": ", 1) for line in lines[1:])
            self.server.asked.append(method)
            answer, body = {"CSeq": headers["CSeq"], "Session": "1"}, ""
            status = "200 OK"
            if method == "OPTIONS":
                answer["Public"] = "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"
            elif headers.get("Authorization") != f"Basic {base64.b64encode(b'me:secret').decode()}":
                status, answer["WWW-Authenticate"] = "401 Unauthorized", 'Basic realm="camera"'
            elif method == "DESCRIBE":
                body = self._description()
                answer |= {"Content-Type": "application/sdp", "Content-Base": f"{address}/"}
            elif method == "SETUP":
                answer["Transport"] = "RTP/AVP/TCP;unicast;interleaved=0-1"
            elif method == "PLAY":
                first = self._first(headers.get("Range", ""))
                answer["Range"] = f"npt={self.server.pictures[first][0]:.3f}-"
            text = "".join(f"{name}: {value}\r\n" for name, value in answer.items())
            text = f"RTSP/1.0 {status}\r\n{text}Content-Length: {len(body)}\r\n\r\n{body}"
            self.wfile.write(text.encode())
            if method == "PLAY" and not self._play(first):
                return

    def _request(self) -> list[str]:
        lines = []
        while line := self.rfile.readline().decode().strip():
            lines.append(line)
        return lines

    def _description(self) -> str:
        media = "m=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1"
        length = f"a=range:npt=0-{len(self.server.pictures) / 10}\r\n" if self.server.length else ""
        return f"v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=clip\r\nt=0 0\r\n{length}{media}\r\n"

    def _first(self, asked: str) -> int:
        """The picture to begin with: the last one by itself before the time that is asked for."""
        found = re.search(r"npt=([\d.]+)", asked)
        begin = float(found[1]) if found and self.server.length else 0.0
        pictures = enumerate(self.server.pictures)
        whole = [i for i, (_, units) in pictures if any(unit[0] & 31 == KEY for unit in units)]
        return max(i for i in whole if self.server.pictures[i][0] <= begin + 1e-3)

    def _play(self, first: int) -> bool:
        """Sends pictures; returns whether the connection stays."""
        camera = self.server
        limit = camera.limits.pop(0) if camera.limits else camera.rest
        number = 0
        for seconds, units in camera.pictures[first:][:limit]:
            packets = [packet for unit in units for packet in packets_of(unit)]
            moment = BEGIN + round(seconds * CLOCK)
            for packet in packets:
                marker = (packet is packets[-1]) << 7 | 96
                self._send(0, struct.pack(">BBHII", 128, marker, number, moment, 7) + packet)
                number += 1
        if limit is not None and camera.silent:
            camera.silent -= 1
            camera.ended.wait()
        if limit is None:
            report = struct.pack(">BBHIQIII", 128, 200, 6, 7, 1 << 32, moment, number, 0)
            self._send(1, report + struct.pack(">BBHI", 129, 203, 1, 7))  # RTCP: goodbye
        return limit is None

    def _send(self, channel: int, packet: bytes) -> None:
        self.wfile.write(struct.pack(">cBH", b"$", channel, len(packet)) + packet)


def packets_of(unit: bytes) -> list[bytes]:
    """A NAL unit, in fragments if it is long."""
    if len(unit) <= LARGEST:
        return [unit]
    parts = [unit[i : i + LARGEST] for i in range(1, len(unit), LARGEST)]
    last = len(parts) - 1
    return [
        bytes([unit[0] & 0xE0 | 28, (i == 0) << 7 | (i == last) << 6 | unit[0] & 31]) + part
        for i, part in enumerate(parts)
    ]
