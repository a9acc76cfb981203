"""Images and videos that a user names, one by one, in folders, or by a pattern."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from maskdino.system.words import counted

# Suffixes, as Pillow and FFmpeg know them.
_IMAGES = "jpg jpeg jpe jfif jp2 png webp avif gif bmp dib tif tiff tga pbm pgm pnm ppm"
_VIDEOS = "avi flv m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv"
IMAGES = frozenset(f".{name}" for name in _IMAGES.split())
VIDEOS = frozenset(f".{name}" for name in _VIDEOS.split())


def is_video(path: Path) -> bool:
    """By the suffix; all other files are taken for images."""
    return path.suffix.lower() in VIDEOS


def find_inputs(words: Iterable[str]) -> list[Path]:
    """Files in the order they were named, each once; those of a folder or pattern are sorted.

    A single name stands for itself, so that a file that is missing is reported like a broken one.

    Raises:
        ValueError: a folder without images and videos, or a pattern that fits no file.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            found |= dict.fromkeys(_of_folder(path))
        elif not path.exists() and glob.has_magic(word):
            found |= dict.fromkeys(_of_pattern(word))
        else:
            found[path] = None
    return list(found)


def _of_folder(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    known = [path for path in files if path.suffix.lower() in IMAGES | VIDEOS]
    if not known:
        raise ValueError(
            f"the folder {folder} holds no image or video ({counted(len(files), 'other file')}); "
            f"known suffixes are {' '.join(sorted(IMAGES | VIDEOS))}"
        )
    return known


def _of_pattern(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"no file fits the pattern {pattern}")
    return files


def output_paths(
    inputs: Iterable[Path], folder: Path, *, with_json: bool = False, with_tracks: bool = False
) -> dict[Path, Path]:
    """Where the drawing of each input goes: its name, made unique, in the output folder.

    Images become .png, or .jpg if they were; videos .mp4. There may be JSON files beside those of
    images (`with_json`) and of videos (`with_tracks`).

    Raises:
        ValueError: a drawing, or its JSON file, would replace an input, or another file beside one.
    """
    inputs = list(inputs)
    outputs: dict[Path, Path] = {}
    written: list[Path] = []
    for path in inputs:
        suffix = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        suffix = ".mp4" if is_video(path) else suffix
        target = unused(folder / f"{path.stem}{suffix}", outputs.values())
        written.append(target)
        if with_tracks if is_video(path) else with_json:
            written.append(json_beside(target))
        outputs[path] = target
    refuse_to_replace(written, inputs, "--output")
    return outputs


def refuse_to_replace(files: Iterable[Path], inputs: Iterable[Path], option: str) -> None:
    """Checks files that an option is going to write.

    Raises:
        ValueError: one would replace an input, or another file beside one.
    """
    own = {os.path.realpath(path) for path in inputs}
    folders = set(map(os.path.dirname, own))
    for file in files:
        if os.path.realpath(file) in own:
            raise ValueError(f"{file} is an input: choose another folder for {option}")
        if os.path.realpath(file.parent) in folders and file.exists():
            raise ValueError(
                f"{file} exists, in the folder of an input: choose another folder for {option}"
            )


def json_beside(path: Path) -> Path:
    """The JSON file of results beside a drawing."""
    return path.with_name(f"{path.name}.json")


def unused(path: Path, used: Collection[Path]) -> Path:
    """The path, with a number behind its name if it is used already."""
    candidate, number = path, 1
    while candidate in used:
        number += 1
        candidate = path.with_stem(f"{path.stem}_{number}")
    return candidate
