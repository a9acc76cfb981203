"""What lies in a folder of data: images, other files, and the splits that folders stand for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from maskdino.data import DataError
from maskdino.data.folders import leaves
from maskdino.data.images import BROKEN_IMAGE, orientation
from maskdino.data.records import RECORD

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"))
TRAIN, VALIDATION, TEST = "train", "val", "test"
_SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
    "testing": TEST,
}

IMAGE, LABEL, OTHER = "image", "label", "other"
_ROLES = {
    LABEL: ("label", "labels", "mask", "masks", "annotation", "annotations", "segmentationclass")
    + ("segmentationclasspng", "segmentation", "segmentations", "seg", "semantic", "semseg", "gt"),
    IMAGE: ("image", "images", "img", "imgs", "jpegimages", "photos", "rgb", "input", "inputs"),
    # Beside them, as VOC, CVAT and LabelMe write them.
    OTHER: ("segmentationobject", "segmentationobjectpng", "segmentationobjectvisualization")
    + ("segmentationclassvisualization", "visualization", "overlay", "overlays"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}


class Tree:
    """All files below a folder, but hidden ones, and those of runs that were trained on it.

    Attributes:
        root: the folder.
        files: sorted.
        images: those of them that are images, by suffix.
    """

    def __init__(self, root: Path) -> None:
        """Lists the files; DataError if there is no such folder."""
        if not root.is_dir():
            raise DataError(f"{root} is no folder: give the one that holds the data")
        self.root = root
        self.files: list[Path] = []
        seen = set()
        for folder, below, names in os.walk(root, followlinks=True):
            # A link to a folder above would be walked through for ever.
            real = os.path.realpath(folder)
            below[:] = [] if real in seen else sorted(x for x in below if _holds_data(folder, x))
            if real not in seen:
                self.files += [Path(folder, x) for x in names if not _is_hidden(x)]
            seen.add(real)
        self.files.sort()
        self.images = self.of(*IMAGE_SUFFIXES)
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            for key in {path.name.lower(), path.stem.lower()}:
                self._by_name[key].append(path)

    def of(self, *suffixes: str) -> list[Path]:
        """Files with one of the suffixes."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def above(self, names: Sequence[str]) -> list[Path]:
        """Files of these names in the two folders above the root."""
        folders = (self.root.parent, self.root.parent.parent)
        return [path for folder in folders for name in names if (path := folder / name).is_file()]

    def split(self, path: Path) -> str | None:
        """What the folders between root and file say: "train", "val", "test", or nothing."""
        if not path.is_relative_to(self.root):
            return None
        return split_of(path.relative_to(self.root).parent)

    def role(self, path: Path) -> str | None:
        """What the folders between root and file say it is; the nearest to the file counts."""
        if not path.is_relative_to(self.root):
            return None
        for part in reversed(path.parent.relative_to(self.root).parts):
            if roles := _named(part, _ROLE_OF):
                return next(role for role in (OTHER, LABEL, IMAGE) if role in roles)
        return None

    def relative(self, path: Path) -> str:
        """The name of a file, below the root, as it is told to the user."""
        inside = path.is_relative_to(self.root)
        return path.relative_to(self.root).as_posix() if inside else str(path.absolute())

    def find_image(self, name: str, label: Path, split: str | None) -> Path | None:
        """The image that a file of labels is about, one of those below the root.

        Args:
            name: how the labels call it: a path, or a name, with or without suffix.
            label: the file of labels; of images with one name, the nearest to it is taken.
            split: of the labels.

        Raises:
            DataError: several images would do.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        for folder in (label.parent, self.root):
            if wanted.name and (folder / wanted).suffix.lower() in IMAGE_SUFFIXES:
                path = Path(os.path.normpath(folder / wanted))
                # Not Path.is_file, which fails for a name of thousands of letters.
                if not leaves(str(self.root), str(path.absolute())) and os.path.isfile(path):
                    return path
        key = wanted.name.lower()
        found = self._by_name.get(key) or self._by_name.get(wanted.stem.lower(), [])

        def nearness(path: Path) -> tuple[int, bool, int]:
            same = os.path.commonprefix([path.parts[::-1], wanted.parts[::-1]])
            above = os.path.commonprefix([path.parts, label.parts])
            return len(same), self.split(path) == split, len(above)

        ranked = sorted(found, key=nearness)
        if len(ranked) > 1 and nearness(ranked[-1]) == nearness(ranked[-2]):
            both = " and ".join(map(self.relative, ranked[-2:]))
            raise DataError(f"{label}: {name!r} may be {both}: rename or remove one of them")
        return ranked[-1] if ranked else None


def split_of(path: Path | PurePosixPath) -> str | None:
    """The split that a path names in one of its parts; the last one counts."""
    for part in reversed(path.parts):
        named = _named(part, _SPLITS)
        if len(named) == 1:
            return named.pop()
    return None


def _named(part: str, meanings: Mapping[str, str]) -> set[str]:
    """What the words of a folder's or a file's name mean."""
    return {meanings[x] for x in re.split(r"[^a-z]+", part.lower()) if x in meanings}


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image once it is upright, from its head alone; or a DataError."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = orientation(image) >= 5
    except BROKEN_IMAGE as error:
        raise DataError(f"{path}: the image cannot be read: {error}") from error
    return (width, height) if turned else (height, width)


def read_text(path: Path) -> str:
    """The content of a text file; DataError if it is none, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error.reason}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _holds_data(folder: str, name: str) -> bool:
    """Whether a folder inside another one is neither hidden nor that of a run."""
    return not _is_hidden(name) and not os.path.isfile(os.path.join(folder, name, RECORD))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
