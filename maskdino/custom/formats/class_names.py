"""Names of the classes of label images, as many programs write them.

Text files have a class in a line: its name alone (the values are 0, 1, 2, ...), value and name, or
name and color, as CVAT's ``labelmap.txt``. Tables (CSV) have the same in columns, as Roboflow's
``_classes.csv``. JSON and YAML files have a list of names, or values or colors by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskdino.custom.formats.files import Tree, read_text
from maskdino.custom.formats.yolo import read_yaml
from maskdino.custom.maps import LabelClass
from maskdino.data import DataError
from maskdino.data.reading import read_json

SUFFIXES = (".txt", ".csv", ".json", ".yaml", ".yml")
# How files of class names are called, without suffix; the last ones may hold other things.
NAMES = (
    *("labelmap", "label_map", "classes", "_classes", "class_names", "class_dict", "labels"),
    *("label_colors", "categories", "names", "data", "dataset"),
)
KEYS = ("names", "classes", "labels", "categories", "label_map", "class_names")
IGNORED = ("void", "ignore", "ignored", "__ignore__", "unlabeled", "unlabelled")
LONGEST = 200  # characters of a line
HOW = "write them into classes.txt, one in a line, in the order of the values from 0"
_NUMBER = r"\s*(\d+)\s*"
# Lines of a file must all be of one kind. Groups are the name and numbers: a value, or a color.
_VALUE_NAME = re.compile(rf"{_NUMBER}[:,;=\s]\s*(?P<name>.*\S)\s*")
_NAME_VALUE = re.compile(rf"\s*(?P<name>.*[^\s,:;=])\s*[:,;=\t]{_NUMBER}")
_NAME_COLOR = re.compile(
    rf"\s*(?P<name>.*[^\s,:;])\s*[:,;\s]{_NUMBER}[,;\s]{_NUMBER}[,;\s]{_NUMBER}(?::.*)?"
)
_COLOR_NAME = re.compile(rf"{_NUMBER}[,;\s]{_NUMBER}[,;\s]{_NUMBER}[:,;\s]\s*(?P<name>.*\S)\s*")


def find_classes(labels: Tree) -> tuple[list[LabelClass], Path] | None:
    """Classes that a file in a folder of labels, or in one of the two folders above, names.

    Raises:
        DataError: a file cannot be read, or several name different classes.
    """
    found = [path for path in labels.of(*SUFFIXES) if path.stem.lower() in NAMES]
    if not found:
        found = labels.above([f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES])
    found.sort(key=lambda path: (len(path.parts), NAMES.index(path.stem.lower())))
    read: dict[Path, list[LabelClass]] = {}
    for path in found:
        certain = path.stem.lower() not in NAMES[-2:] and path.suffix != ".json"
        try:
            read[path] = read_classes(path)
        except DataError:
            if certain or path == found[-1] and not read:
                raise
    if not read:
        return None
    first = next(iter(read))
    for path, classes in read.items():
        if [c.name for c in classes] != [c.name for c in read[first]]:
            raise DataError(
                f"{first} and {path} name different classes: give the right one with --classes"
            )
        if any(c.color for c in classes) and not any(c.color for c in read[first]):
            first = path
    return read[first], first


def asked_classes(text: str) -> list[LabelClass]:
    """Classes of the command line: names with commas between them, or a file."""
    path = Path(text)
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise DataError(f"--classes: there is no file {path}")
        return read_classes(path)
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise DataError(f"--classes {text!r}: names with commas between them, such as a,b,c")
    return _checked(_in_order(names), "--classes")


def read_classes(path: Path) -> list[LabelClass]:
    """Reads a file; DataError if it is none of the known ones, or names something twice."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        classes = _of_content(read_json(str(path), "utf-8-sig"), path)
    elif suffix in (".yaml", ".yml"):
        classes = _of_content(read_yaml(path), path)
    else:
        lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if suffix == ".csv" and lines and not re.search(r"\d", lines[0]):
            lines = lines[1:]  # the head of the table
        classes = _of_lines(lines)
    return _checked(classes, str(path))


def _of_lines(lines: Sequence[str]) -> list[LabelClass]:
    if any(len(line) > LONGEST for line in lines):
        raise DataError(f"a line of more than {LONGEST} characters is no class: {HOW}")
    for pattern in (_NAME_COLOR, _COLOR_NAME, _VALUE_NAME, _NAME_VALUE):
        matches = [pattern.fullmatch(line) for line in lines]
        if not all(matches):
            continue
        result, name = [], pattern.groupindex["name"]
        for order, match in enumerate(filter(None, matches)):
            numbers = [int(x) for i, x in enumerate(match.groups(), 1) if i != name]
            if len(numbers) == 3:
                result.append(_label(match["name"], order, _color(numbers)))
            else:
                result.append(_label(match["name"], numbers[0]))
        return result
    return _in_order(lines)


def _in_order(names: Sequence[str]) -> list[LabelClass]:
    if names and names[0] == "__ignore__":  # LabelMe's, before the value 0
        return [_label(names[0], 255), *(_label(n, i) for i, n in enumerate(names[1:]))]
    return [_label(name, i) for i, name in enumerate(names)]


def _label(name: str, value: int, color: tuple[int, int, int] | None = None) -> LabelClass:
    return LabelClass(name, value, color, name.lower() in IGNORED)


def _color(numbers: Any) -> tuple[int, int, int]:
    """A color of three numbers, or of a text such as #ff8000."""
    if isinstance(numbers, str) and re.fullmatch("#?[0-9a-fA-F]{6}", numbers):
        numbers = list(bytes.fromhex(numbers.removeprefix("#")))
    is_color = isinstance(numbers, list) and len(numbers) == 3
    if not is_color or not all(type(x) is int and 0 <= x <= 255 for x in numbers):
        raise DataError(f"{str(numbers)[:80]} is no color: red, green and blue from 0 to 255")
    return numbers[0], numbers[1], numbers[2]


def _of_content(content: Any, path: Path) -> list[LabelClass]:
    """Classes of a list or of keys and values."""
    if isinstance(content, dict):
        for key in KEYS:
            if isinstance(content.get(key), list | dict):
                return _of_content(content[key], path)
        items = list(content.items())
        if items and all(str(key).isdecimal() and isinstance(x, str) for key, x in items):
            return [_label(name, int(value)) for value, name in items]
        if items and all(type(x) is int for _, x in items):
            return [_label(str(name), value) for name, value in items]
        if items and all(isinstance(x, list) for _, x in items):
            return [_label(str(name), i, _color(x)) for i, (name, x) in enumerate(items)]
    elif content and isinstance(content, list):
        if all(isinstance(x, str) for x in content):
            return _in_order(content)
        if all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in content):
            return [_of_entry(entry, order) for order, entry in enumerate(content)]
    raise DataError(f"{path} names no classes of label images: {HOW}")


def _of_entry(entry: dict, order: int) -> LabelClass:
    value = next((entry[key] for key in ("value", "id", "index") if key in entry), order)
    if type(value) is not int:
        raise DataError(f"class {entry['name']!r} has the value {value!r}, which is no number")
    color = entry.get("color")
    return _label(entry["name"], value, _color(color) if color else None)


def _checked(classes: list[LabelClass], source: str) -> list[LabelClass]:
    """The classes, each of which is one of its own."""
    if not classes:
        raise DataError(f"{source} names no class")
    for what in ("name", "value", "color"):
        counts = Counter(x for c in classes if (x := getattr(c, what)) is not None)
        twice = [value for value, number in counts.items() if number > 1]
        if twice:
            raise DataError(f"{source}: several classes have the {what} {twice[0]}")
    wrong = [c for c in classes if not 0 <= c.value < 1 << 16]
    if wrong:
        raise DataError(f"{source}: class {wrong[0].name!r} has the value {wrong[0].value}")
    return classes
