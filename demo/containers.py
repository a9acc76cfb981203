"""Why a video file cannot be read: what its container tells without any decoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

# How MP4, QuickTime and AVI, then Matroska and WebM, name the codec of a video track.
_FOUR_LETTERS = re.compile(rb"(?:stsd.{12}|strf.{20})([A-Za-z0-9 ._-]{4})", re.DOTALL)
_SOUND = frozenset(
    ["mp4a", "ac-3", "ec-3", "alac", "sowt", "twos", "lpcm", ".mp3", "tx3g", "text", "tmcd"]
)
_MATROSKA_START = bytes.fromhex("1a45dfa3")
_MATROSKA = re.compile(rb"V_[A-Z0-9/_]{2,30}")
_SEARCHED_BYTES = 1 << 22  # at either end of a file


def why_unreadable(path: Path) -> str:
    """Why OpenCV cannot open a file, as the end of a sentence."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return "it is empty"
        file.seek(0)
        if file.read(8)[4:] == b"ftyp" and not _has_index(file):
            return "its index is not where it should be: the file is damaged or was cut off"
    codec = codec_of(path)
    if not codec:
        return "it is no video"
    return f"OpenCV has no decoder for its codec {codec}, or the file is damaged"


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
    letters = (match[1].decode("ascii") for match in _FOUR_LETTERS.finditer(content))
    return next((four for four in letters if four not in _SOUND), "")


def count_error(path: Path) -> int | None:
    """By how much the number of frames that a container states may be wrong.

    Returns:
        0 for AVI; 2 for MP4 and QuickTime, whose edit lists may leave out frames; None for others,
        where OpenCV guesses from duration and rate.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] == b"RIFF":
        return 0
    return 2 if start[4:] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") else None


def _has_index(file: BinaryIO) -> bool:
    """Whether the boxes of an MP4 file, one behind the other, lead to a whole index."""
    end, position = file.seek(0, 2), 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size = int.from_bytes(header[:4], "big")
        if size == 1:  # the size stands behind the name
            size = int.from_bytes(header[8:], "big")
        elif size == 0:  # the last box
            size = end - position
        if header[4:8] == b"moov":
            return position + size <= end
        position += max(size, 8)
    return False
