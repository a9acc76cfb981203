"""Label images: a class, or a segment, for each pixel of an image.

Shape key: H, W pixels of a label image; K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from maskdino.data import DataError
from maskdino.data.images import BROKEN_IMAGE
from maskdino.data.reading import MOST_CLASSES, colors_of_ids, ids_of_colors

T = TypeVar("T")
MAP = "sem_seg_file_name"  # key of the label image in an image's entry, of detectron2's name
IGNORED, UNKNOWN = 255, -1  # instead of a class
VOID_COLOR = (224, 224, 192)  # Pascal VOC's, of pixels that do not count
READERS = 8  # threads
SHOWN = 4  # values of a message


@dataclass(frozen=True)
class LabelClass:
    """A class of label images."""

    name: str  # what it is called
    value: int  # of its pixels in images of one channel, from 0
    # Red, green and blue of its pixels in images of colors; None: it has none.
    color: tuple[int, int, int] | None = None
    ignored: bool = False  # its pixels do not count


class Problem(DataError):
    """What is wrong with a label image.

    Attributes:
        kind: what it is, without the details of the image.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Encoding:
    """What the pixels of label images mean: one reader for values, palettes and colors.

    Colors count where the classes have some, and values otherwise. An image of one channel, or a
    palette, whose colors are none of the classes', is one of values all the same.

    Attributes:
        classes: those that count, in the order of their values.
    """

    def __init__(self, classes: Sequence[LabelClass]) -> None:
        """Makes the tables; DataError if there are too many classes, or none."""
        self.classes = sorted((c for c in classes if not c.ignored), key=lambda c: c.value)
        if not 0 < len(self.classes) <= MOST_CLASSES:
            raise DataError(f"{len(self.classes)} classes: label images have 1 to {MOST_CLASSES}")
        numbers = [(c, number) for number, c in enumerate(self.classes)]
        numbers = [(c, IGNORED) for c in classes if c.ignored] + numbers
        self._values = np.full(1 << 16, UNKNOWN, np.int16)
        self._values[IGNORED] = IGNORED
        self._colors: np.ndarray | None = None
        if any(c.color for c in classes):
            # Zero pages of the operating system: memory is touched only where colors exist.
            self._colors = np.zeros(1 << 24, np.int16)  # class + 1, and 0 is unknown
            self._colors[ids_of_colors(np.array(VOID_COLOR))] = IGNORED + 1
        for label, number in numbers:
            self._values[label.value] = number
            if label.color and self._colors is not None:
                self._colors[ids_of_colors(np.array(label.color))] = number + 1

    def read(self, path: Path) -> tuple[np.ndarray, bool]:
        """Reads a label image.

        Returns:
            (H, W) uint8, the class of each pixel or `IGNORED`; and whether the file holds that.

        Raises:
            Problem: it cannot be read, or has pixels of no class.
        """
        values, colors, mode = _read(path, gray_colors=self._colors is not None)
        if colors is not None and self._colors is not None:
            found = self._colors[ids_of_colors(colors)] - np.int16(1)
            if (found >= 0).all():
                return found.astype(np.uint8), False
        if values is None:
            assert colors is not None
            raise self._wrong_color(colors, path)
        if values.min() < 0 or values.max() >= len(self._values):
            found = np.full(values.shape, UNKNOWN, np.int16)
        else:
            found = self._values[values]
        if (found < 0).any():
            wrong = np.unique(values[found < 0])
            known = ", ".join(str(c.value) for c in self.classes[:20])
            known += ", ..." if len(self.classes) > 20 else ""
            raise Problem(
                "label image with a value that is no class: mend it, or name the class",
                f"{path} holds {_listed(wrong.tolist())}; the classes are {known}, and {IGNORED} "
                "is ignored",
            )
        classes = found.astype(np.uint8)
        return classes, mode in ("L", "P") and np.array_equal(classes, values)

    def _wrong_color(self, colors: np.ndarray, path: Path) -> Problem:
        ids = np.unique(ids_of_colors(colors))
        if self._colors is None:
            wrong = ids
            kind = (
                "label image of colors, but the classes have none: write a file labelmap.txt with "
                "lines such as 'nut:128,0,0'"
            )
        else:
            wrong = ids[self._colors[ids] == 0]
            kind = "label image with a color that is no class: mend it, or add the color"
        named = [str(tuple(color)) for color in colors_of_ids(wrong).tolist()]
        return Problem(kind, f"{path} holds {_listed(named)}")


@dataclass(frozen=True)
class Maps:
    """Where the label images of annotations are."""

    task: str  # "panoptic" or "semantic"
    root: Path  # folder that their names are relative to
    # What has to be converted; None: the files are as training reads them.
    encoding: Encoding | None = None

    def converted(self, images: Sequence[dict], folder: Path) -> tuple[Maps, list[dict]]:
        """Writes label images as training reads them, one channel of class numbers, if need be.

        Returns:
            Where they are, and the entries of the images with the new names.
        """
        encoding = self.encoding
        if encoding is None:
            return self, list(images)
        folder.mkdir(parents=True, exist_ok=True)

        def write(number: int, image: dict) -> dict:
            name = f"{number:06d}_{Path(image[MAP]).stem}.png"
            classes, _ = encoding.read(self.root / image[MAP])
            Image.fromarray(classes).save(folder / name)
            return {**image, MAP: name}

        return Maps(self.task, folder), in_threads(write, range(len(images)), images)


def in_threads(function: Callable[..., T], *lists: Iterable) -> list[T]:
    """Calls a function for each entry: Pillow decodes outside of Python's lock."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, *lists))


def segments_of(path: Path) -> tuple[dict[int, int], tuple[int, int]]:
    """Pixels by segment id of a label image in COCO's panoptic format, and its (H, W).

    0 is no segment. The image is never turned.

    Raises:
        Problem: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            colors = np.array(image.convert("RGB"))
    except BROKEN_IMAGE as error:
        raise _unreadable(path, error) from error
    ids, numbers = np.unique(ids_of_colors(colors), return_counts=True)
    height, width = colors.shape[:2]
    return {int(i): int(n) for i, n in zip(ids, numbers, strict=True) if i}, (height, width)


def values_of(path: Path) -> list[str]:
    """What the pixels of a label image are, for messages: values or colors, each once."""
    values, colors, _ = _read(path, gray_colors=False)
    if values is not None:
        return [str(x) for x in np.unique(values).tolist()]
    assert colors is not None
    found = np.unique(colors.reshape(-1, 3), axis=0)[:50]
    return [str(tuple(color)) for color in found.tolist()]


def _read(path: Path, *, gray_colors: bool) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Values (H, W) of one channel, colors (H, W, 3) uint8 of three, and Pillow's mode of the file.

    An image whose three channels are equal has both; so has one of one channel of 8 bits, or with a
    palette, if `gray_colors`.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode in ("1", "L", "P", "LA", "PA"):
                first = image.getchannel(0) if mode in ("LA", "PA") else image
                values = np.array(first).astype(np.uint8)
                return values, np.array(image.convert("RGB")) if gray_colors else None, mode
            if mode.startswith("I"):
                return np.array(image), None, mode
            if mode not in ("RGB", "RGBA"):
                raise ValueError(f"pixels of type {mode}; values or colors are needed")
            colors = np.array(image.convert("RGB"))
    except BROKEN_IMAGE as error:
        raise _unreadable(path, error) from error
    gray = (colors == colors[..., :1]).all()
    return colors[..., 0] if gray else None, colors, mode


def _unreadable(path: Path, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem("label image is missing", f"there is no {path}")
    return Problem("label image cannot be read: replace it", f"{path}: {error}")


def _listed(values: list) -> str:
    more = len(values) - SHOWN
    return ", ".join(map(str, values[:SHOWN])) + (f", and {more} more" if more > 0 else "")
