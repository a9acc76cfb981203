"""What `--input` names: pictures and videos, one by one, in folders, or by a pattern."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

# By suffix, as Pillow and OpenCV know them.
PICTURES = frozenset(
    f".{name}"
    for group in ("jpg jpeg jpe jfif jp2 png webp avif gif", "bmp dib tif tiff tga pbm pgm pnm ppm")
    for name in group.split()
)
VIDEOS = frozenset(
    f".{name}"
    for group in ("avi flv m4v mkv mov mp4 mpeg", "mpg mts ogv ts webm wmv")
    for name in group.split()
)


def is_video(path: Path) -> bool:
    """By the suffix; all other files are taken for pictures."""
    return path.suffix.lower() in VIDEOS


def find_inputs(words: Iterable[str]) -> list[Path]:
    """Files in the order they were named, each once; those of a folder or pattern are sorted.

    A single name stands for itself, so that a file that is missing is reported like a broken one.

    Raises:
        ValueError: a folder without pictures and videos, or a pattern that fits no file.
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
    known = [path for path in files if path.suffix.lower() in PICTURES | VIDEOS]
    if not known:
        raise ValueError(
            f"the folder {folder} holds no picture or video ({len(files)} other files); "
            f"known suffixes are {' '.join(sorted(PICTURES | VIDEOS))}"
        )
    return known


def _of_pattern(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"no file fits the pattern {pattern}")
    return files


def output_paths(
    inputs: Iterable[Path], folder: Path, *, with_json: bool = False
) -> dict[Path, Path]:
    """Where the drawing of each input goes: its name, made unique, in the output folder.

    Pictures become .png, or .jpg if they were; videos .mp4.

    Raises:
        ValueError: a drawing, or its JSON file, would replace an input, or another file beside one.
    """
    inputs = list(inputs)
    own = {path.resolve() for path in inputs}
    beside_inputs = folder.resolve() in {path.parent for path in own}
    outputs: dict[Path, Path] = {}
    for path in inputs:
        suffix = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
        suffix = ".mp4" if is_video(path) else suffix
        target, number = folder / f"{path.stem}{suffix}", 1
        while target in outputs.values():
            number += 1
            target = folder / f"{path.stem}_{number}{suffix}"
        written = [target]
        if with_json and not is_video(path):
            written.append(target.with_name(f"{target.name}.json"))
        for file in written:
            if file.resolve() in own:
                raise ValueError(f"{file} is an input: choose another folder for --output")
            if beside_inputs and file.exists():
                raise ValueError(
                    f"{file} exists, in the folder of an input: choose another folder for --output"
                )
        outputs[path] = target
    return outputs


def unused(path: Path) -> Path:
    """The path, with a number behind its name if a file has it already."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}_{number}")
    return candidate
