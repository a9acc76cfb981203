"""Objects of any format on their way into COCO's lists.

Shape key: H, W pixels of an image.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from maskdino.custom.annotations import Annotations
from maskdino.custom.checks import Finding
from maskdino.custom.formats.files import TEST, TRAIN, VALIDATION, Tree, image_size
from maskdino.data import DataError
from maskdino.data.folders import leaves
from maskdino.system.words import counted


@dataclass(frozen=True)
class Unreadable(Finding):
    """What could not be taken into the annotations, and so is left out of them already."""

    @property
    def droppable(self) -> bool:
        """Leaving it out needs no more than consent."""
        return True


@dataclass
class Part:
    """The data of one split."""

    data: Annotations
    # What was wrong with the files that the data came from.
    findings: list[Finding] = field(default_factory=list)
    by_name: bool = False  # whether classes have names alone, so that their numbers can be chosen


@dataclass
class Dataset:
    """What a folder holds."""

    kind: str  # name of the format
    source: Path  # folder or file that it was read from
    # By split: "train", "val", "test", or None where there are no splits.
    parts: dict[str | None, Part]
    notes: list[str] = field(default_factory=list)  # what was left out or decided, as lines of text


class Collector:
    """Gathers images and objects of all splits, and numbers them.

    Class names that are given beforehand keep their order and numbers; otherwise, those that are
    met are sorted and numbered from 1, alike in all splits.
    """

    def __init__(self, kind: str, tree: Tree, source: Path, names: dict[int, str] | None) -> None:
        """Begins with nothing; `names` are of the classes by number, if they are known."""
        self.tree = tree
        self.kind = kind
        self.source = source
        self.names = names
        self.by_name = names is None
        self.notes: list[str] = []
        self.ignored: Counter[str] = Counter()  # shapes that no object is made of, by what they are
        self._used: set[Path] = set()  # images
        self._images: dict[str | None, list[dict]] = defaultdict(list)
        self._objects: dict[str | None, list[dict]] = defaultdict(list)
        self._findings: dict[str | None, list[Finding]] = defaultdict(list)
        self._labels: dict[str | None, list[Path]] = defaultdict(list)
        self._counts: Counter[str] = Counter()

    def add_image(
        self, split: str | None, path: Path, label: Path, size: tuple[int, int] | None = None
    ) -> dict | None:
        """Adds an image, of the size that its labels say, or of its file's.

        Returns:
            Its entry, or None if its size is unknown and it is unreadable.
        """
        self._used.add(path)
        try:
            height, width = size or image_size(path)
        except DataError as error:
            self.problem(split, "image cannot be read", str(error))
            return None
        number = sum(map(len, self._images.values())) + 1
        entry = {
            "id": number,
            "file_name": self.tree.relative(path),
            "height": height,
            "width": width,
            "split": split,
        }
        self._images[split].append(entry)
        self._labels[split].append(label)
        return entry

    def add_object(
        self,
        image: dict,
        category: str | int,
        where: str,
        *,
        box: Sequence[float] | None = None,
        mask: list[list[float]] | dict | None = None,
    ) -> None:
        """Adds an object.

        Args:
            image: entry of its image.
            category: its name or, where names were given, its number.
            where: file and line, for messages.
            box: (left, top, right, bottom) in pixels; None: that of the polygons.
            mask: polygons [[x, y, x, y, ...], ...], or run lengths.
        """
        entry: dict = {"image_id": image["id"], "category_id": category, "iscrowd": 0}
        self._counts[where] += 1  # several objects may stand in one place
        entry["id"] = where if self._counts[where] == 1 else f"{where} ({self._counts[where]})"
        if box is None and isinstance(mask, list):
            xs = [x for polygon in mask for x in polygon[::2]]
            ys = [y for polygon in mask for y in polygon[1::2]]
            box = (min(xs), min(ys), max(xs), max(ys))
        if box is not None:
            left, top, right, bottom = box
            entry["bbox"] = [left, top, right - left, bottom - top]
        if mask is not None:
            entry["segmentation"] = mask
        self._objects[image["split"]].append(entry)

    def problem(self, split: str | None, kind: str, detail: str) -> None:
        """Notes what is wrong and was left out: an error, unless the user consents."""
        self._findings[split].append(Unreadable(kind, detail))

    @contextmanager
    def noting(self, split: str | None, kind: str) -> Iterator[None]:
        """A DataError inside ends the block, and is noted as a problem."""
        try:
            yield
        except DataError as error:
            self.problem(split, kind, str(error))

    def note_unlabeled(self, images: Iterable[Path]) -> None:
        """Notes images that no file of labels is about."""
        number = sum(path not in self._used for path in images)
        if number:
            self.notes.append(f"{counted(number, 'image')} without a file of labels: left out")

    def finish(self) -> Dataset:
        """The splits, with numbered classes."""
        ignored = self.ignored.items()
        self.notes += [f"{counted(n, 'shape')} of {what}: left out" for what, n in ignored]
        objects = [x for part in self._objects.values() for x in part]
        if self.names is None:
            found = sorted({str(x["category_id"]) for x in objects})
            numbers: dict[str | int, int] = {name: i for i, name in enumerate(found, start=1)}
            categories = [{"id": i, "name": name} for name, i in numbers.items()]
        else:
            numbers = {name: i for i, name in self.names.items()}
            categories = [{"id": i, "name": name} for i, name in self.names.items()]
        for entry in objects:
            category = entry["category_id"]
            entry["category_id"] = category if isinstance(category, int) else numbers[category]
        parts: dict[str | None, Part] = {}
        found_splits = {*self._images, *self._findings}
        for split in (s for s in (None, TRAIN, VALIDATION, TEST) if s in found_splits):
            images = [{k: v for k, v in x.items() if k != "split"} for x in self._images[split]]
            labels = self._labels[split]
            source = Path(os.path.commonpath(labels)) if labels else self.source
            root = _with_others(self.tree.root, images)
            data = Annotations(source, root, images, self._objects[split], list(categories))
            parts[split] = Part(data, self._findings[split], self.by_name)
        return Dataset(self.kind, self.source, parts, self.notes)


def _with_others(root: Path, images: list[dict]) -> Path:
    """A folder of all images; renames them (in place) where some lie out of the root.

    YOLO's data.yaml names folders, which may be any; no other format leads out of the root.
    """
    if not any(leaves(str(root), image["file_name"]) for image in images):
        return root
    paths = [os.path.abspath(os.path.join(root, image["file_name"])) for image in images]
    common = os.path.commonpath([os.path.abspath(root), *paths])
    for image, path in zip(images, paths, strict=True):
        image["file_name"] = Path(path).relative_to(common).as_posix()
    return Path(common)


def numbers_of(texts: Iterable[object], where: str) -> list[float]:
    """Reads finite numbers; DataError if one of the texts is none."""
    result = []
    for text in texts:
        try:
            # Whatever it is, float() decides, which takes True for 1.
            value = math.nan if isinstance(text, bool) else float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}: {str(text)[:40]!r} is no finite number")
        result.append(value)
    return result
