"""YOLO: a text file of labels for each image, with boxes or polygons as shares of its size.

A line is a class number and either center x, center y, width, height, or x, y of three or more
corners. The names of the classes, and perhaps the folders of the splits, stand in data.yaml, or the
names alone, one in a line, in classes.txt (labelImg, Label Studio) or obj.names (Darknet, CVAT).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from maskdino.config import loading
from maskdino.custom.formats.collect import Collector, Dataset, numbers_of
from maskdino.custom.formats.files import (
    TEST,
    TRAIN,
    VALIDATION,
    Tree,
    read_text,
)
from maskdino.data import DataError
from maskdino.system.words import counted

KIND = "YOLO"
NAME_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")
OUTSIDE = 0.01  # share of the image by which coordinates may lie beyond it: rounding
SPLIT_KEYS = {TRAIN: ("train",), VALIDATION: ("val", "valid", "validation"), TEST: ("test",)}


def read_yolo(tree: Tree, labels: Tree, settings: Path | None) -> Dataset:
    """Reads labels, whose names, and perhaps splits, are in the settings.

    The splits count only where labels and images are in one folder.

    Raises:
        DataError: the names or folders of the settings are not usable.
    """
    if settings is None:
        raise DataError(
            f"{labels.root} holds YOLO labels, which call classes by number, but no names: write "
            f"them into {labels.root / 'classes.txt'}, one in a line, in the order of the numbers"
        )
    names, listed, keypoints = _read_settings(settings)
    collector = Collector(KIND, tree, settings, names)
    if listed is None or labels is not tree:
        listed = {path: tree.split(path) for path in tree.images}
    if not listed:
        raise DataError(f"{tree.root} holds YOLO labels, but there is no image of them")
    used = {path: _label_of(path, tree, labels) for path in listed}
    if not any(used.values()):
        raise DataError(
            f"{settings}: {counted(len(used), 'image')} and no file of labels; it is looked for in "
            "a folder 'labels' beside 'images', or beside the image"
        )
    for path, label in used.items():
        image = collector.add_image(listed[path], path, label or path.parent)
        if image is not None and label is not None:
            _read_labels(collector, image, label, keypoints)
    without = sum(label is None for label in used.values())
    if without:
        images = counted(without, "image")
        collector.notes.append(f"{images} without a file of labels: taken as without objects")
    paired = {path.with_suffix("").name for path in (*tree.images, *used)}
    lost = [path for path in label_files(labels) if path.stem not in paired]
    if lost:
        some = ", ".join(map(tree.relative, lost[:3]))
        files = counted(len(lost), "file")
        collector.notes.append(f"{files} of labels without an image, such as {some}")
    return collector.finish()


def _read_settings(settings: Path) -> tuple[dict[int, str], dict[Path, str | None] | None, int]:
    """Names of the classes, the split of each image if it is told, and values of keypoints."""
    if settings.suffix.lower() in (".yaml", ".yml"):
        content = read_yaml(settings)
        shape = content.get("kpt_shape")
        keypoints = 0
        if isinstance(shape, list) and [type(x) for x in shape] == [int, int]:
            keypoints = shape[0] * shape[1]
        written = read_yaml(settings, yaml.BaseLoader).get("names")  # all texts
        names = _names(content.get("names"), written, content.get("nc"), settings)
        return names, _listed_images(content, settings), keypoints
    lines = [line.strip() for line in read_text(settings).splitlines()]
    names = dict(enumerate(line for line in lines if line))
    if not names:
        raise DataError(f"{settings} names no class: write one in a line")
    return names, None, 0


def label_files(tree: Tree) -> list[Path]:
    """Text files that lie where labels do: in a folder "labels", beside an image, or alone."""
    stems = {path.with_suffix("") for path in tree.images}
    alone = not tree.images
    return [
        path
        for path in tree.of(".txt")
        if path.name not in NAME_FILES
        and (
            alone
            or "labels" in path.parts[len(tree.root.parts) : -1]
            or path.with_suffix("") in stems
        )
    ]


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> dict:
    """The content of a YAML file, which has keys and values; its tags make no objects."""
    try:
        return loading.read_yaml(str(path), loader)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(str(error)) from error


def _names(names: Any, written: Any, number: Any, settings: Path) -> dict[int, str]:
    """Names as they are written: YAML takes no, 010 and 1.10 for values of other kinds."""
    if isinstance(names, list):
        names, written = dict(enumerate(names)), dict(enumerate(written))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{settings}: 'names' must list the classes: names: [apple, nut]")
    if any(isinstance(key, bool) or not str(key).isdecimal() for key in names):
        raise DataError(f"{settings}: the keys of 'names' must be class numbers from 0")
    if any(name is None or isinstance(name, list | dict) for name in names.values()):
        raise DataError(f"{settings}: each of 'names' must be a single word or text")
    if number is not None and (isinstance(number, bool) or number != len(names)):
        raise DataError(f"{settings}: nc is {number}, but 'names' has {len(names)}")
    numbers = [int(key) for key in names]
    if not len(set(numbers)) == len(numbers) == len(written):
        raise DataError(f"{settings}: 'names' holds a class number twice")
    return dict(sorted(zip(numbers, written.values(), strict=True)))


def _listed_images(content: dict, settings: Path) -> dict[Path, str | None] | None:
    """The images of the splits that data.yaml names, or None if it names no split."""
    result: dict[Path, str | None] = {}
    told = False
    for split, keys in SPLIT_KEYS.items():
        value = next((content[key] for key in keys if content.get(key)), None)
        for entry in value if isinstance(value, list) else [value] if value else []:
            place = _resolve(entry, content.get("path"), settings)
            if place is None and split != TEST:
                raise DataError(
                    f"{settings}: {split}: there is no {str(entry)[:200]}; mend the line, relative "
                    "to the file's folder, or remove it"
                )
            told = told or split == TRAIN
            for path in _images_at(place) if place else []:
                result.setdefault(path, split)
    if result and TRAIN not in result.values():
        raise DataError(f"{settings}: there is no image to train on at 'train'")
    return result if result or told else None


def _resolve(entry: Any, base: Any, settings: Path) -> Path | None:
    """Where a path of data.yaml leads; many are written for another folder than their own."""
    if not isinstance(entry, str):
        return None
    folders = [settings.parent / base] if isinstance(base, str) else []
    for folder in (*folders, settings.parent):
        for text in (entry, entry.removeprefix("../")):
            place = Path(os.path.normpath(folder / text))
            if os.path.exists(place):  # which a name of any length or content may be asked for
                return place
    return None


def _images_at(place: Path) -> list[Path]:
    """Images in a folder, or those that a text file lists."""
    if place.is_dir():
        return Tree(place).images
    if place.suffix != ".txt":
        return [place]
    paths = []
    for line in read_text(place).split("\n"):
        if line.strip():
            # CVAT writes paths that begin with a folder data, which the export lacks.
            found = [
                path
                for text in (line.strip(), line.strip().removeprefix("data/"))
                if os.path.isfile(path := Path(os.path.normpath(place.parent / text)))
            ]
            if not found:
                raise DataError(f"{place}: there is no image {line.strip()[:200]}")
            paths.append(found[0])
    return paths


def _label_of(image: Path, tree: Tree, labels: Tree) -> Path | None:
    """The file of labels of an image: in "labels" where it is in "images", or beside it."""
    if labels is not tree:
        path = labels.root / image.relative_to(tree.root).with_suffix(".txt")
        return path if path.is_file() else None
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    candidates = [beside]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        candidates.insert(0, Path(*parts[:last], "labels", *parts[last + 1 :]))
    else:
        # DATA/train/a.jpg with DATA/labels/train/a.txt, and DATA/a.jpg with DATA/labels/a.txt.
        candidates += [
            image.parent / "labels" / beside.name,
            image.parent.parent / "labels" / image.parent.name / beside.name,
            image.parent.parent / "labels" / beside.name,
        ]
    return next((path for path in candidates if path.is_file()), None)


def _read_labels(collector: Collector, image: dict, label: Path, keypoints: int) -> None:
    split, name = image["split"], collector.tree.relative(label)
    lines: list[str] = []
    with collector.noting(split, "file of labels cannot be read"):
        lines = read_text(label).splitlines()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        where = f"{name}:{number}"
        with collector.noting(split, "line is no YOLO label"):
            category, points = _parse(words, where, collector.names or {}, keypoints)
            width, height = image["width"], image["height"]
            scaled = [x * (height if i % 2 else width) for i, x in enumerate(points)]
            if len(scaled) == 4:
                x, y, w, h = scaled
                box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
                collector.add_object(image, category, where, box=box)
            else:
                collector.add_object(image, category, where, mask=[scaled])


def _parse(
    words: list[str], where: str, names: dict[int, str], keypoints: int
) -> tuple[int, list[float]]:
    """Class number, and a box (4 numbers) or a polygon (6 or more)."""
    if keypoints and len(words) == 5 + keypoints:
        words = words[:5]
    category, *points = numbers_of(words, where)
    if len(words) < 5 or len(words) % 2 == 0:
        hint = "; a score after the box must be removed" if len(words) == 6 else ""
        raise DataError(
            f"{where}: {counted(len(words), 'value')}, but a class and 4 for a box, or 6 or more "
            f"(an even number) for a polygon, are needed{hint}"
        )
    if category not in names:
        raise DataError(
            f"{where}: class {words[0]}, but the classes are {min(names)} to {max(names)}"
        )
    pairs = zip(words[1:], points, strict=True)
    beyond = [word for word, share in pairs if not -OUTSIDE <= share <= 1 + OUTSIDE]
    if beyond:
        raise DataError(
            f"{where}: {beyond[0][:40]} is no share of the image's size, from 0 to 1: divide "
            "pixels by width or height"
        )
    return int(category), points


def is_label(line: str) -> bool:
    """Whether a line of text looks like a label: a class number and four or more numbers."""
    words = line.split()
    try:
        return len(words) >= 5 and words[0].isdecimal() and bool(numbers_of(words, ""))
    except DataError:
        return False
