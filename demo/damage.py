"""Which frames of a video file a decoder complains about, though it makes something up for them.

Decoders conceal damage: most frames with broken bytes are shown, with wrong pixels, and OpenCV does
not say so. FFmpeg's log does, which has no other way out of OpenCV than the standard output of a
whole process. So a process of its own decodes the video, beside the one that draws it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_ENVIRONMENT = {
    "OPENCV_FFMPEG_LOGLEVEL": "16",  # messages about broken data
    "OPENCV_FFMPEG_THREADS": "1",  # several would decode, and complain, ahead of the frame read
    "OPENCV_LOG_LEVEL": "SILENT",  # OpenCV's own
}
MAX_FAILURES = 250  # reads in a row that fail before a file is taken to end


class DamageCheck:
    """Runs while the video is drawn; use it as a context, so that no process is left behind."""

    def __init__(self, path: Path) -> None:
        self._answer = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the context
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path.absolute())],
            stdout=self._answer,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the process that draws
            env=os.environ | _ENVIRONMENT,
        )

    def __enter__(self) -> DamageCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._answer.close()

    def frames(self) -> list[int]:
        """Numbers of the frames, from 0; waits for the decoder to reach the end.

        Raises:
            RuntimeError: the process failed.
        """
        status = self._process.wait()
        self._answer.seek(0)
        if status != 0:
            raise RuntimeError(f"the process that looks for damaged frames ended with {status}")
        return json.load(self._answer)


def _decode(path: str) -> list[int]:
    """Numbers of the frames that could be decoded, but not without a message.

    None where Python cannot flush the C library's streams (Windows): messages would come late.
    """
    if os.name != "posix":
        return []
    import cv2

    library = ctypes.CDLL(None)
    capture = cv2.VideoCapture(path)
    rate, promised = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    found, number, failures = [], -1, 0
    with tempfile.TemporaryFile() as log:
        for stream in (sys.stdout, sys.stderr):  # which of them depends on OpenCV
            os.dup2(log.fileno(), stream.fileno())
        while failures == 0 or number + failures < promised and failures < MAX_FAILURES:
            readable = capture.grab()
            library.fflush(None)
            if readable:
                by_time = round(capture.get(cv2.CAP_PROP_POS_MSEC) * rate / 1000)
                number, failures = max(number + 1, by_time), 0
                found += [number] * (os.lseek(log.fileno(), 0, os.SEEK_END) > 0)
            else:
                failures += 1
            log.truncate(0)
            os.lseek(log.fileno(), 0, os.SEEK_SET)  # the streams write where this one stands
    return found


if __name__ == "__main__":
    output = os.dup(sys.stdout.fileno())
    os.write(output, json.dumps(_decode(sys.argv[1])).encode())
