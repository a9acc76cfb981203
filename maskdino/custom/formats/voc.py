"""Pascal VOC: an XML file for each image, with boxes in pixels."""

from __future__ import annotations

import re
from pathlib import Path

from maskdino.custom.formats.collect import Collector, Dataset, numbers_of
from maskdino.custom.formats.files import TEST, TRAIN, VALIDATION, Tree, read_text, split_of
from maskdino.custom.formats.xml import Node, read_xml
from maskdino.data import DataError
from maskdino.system.words import counted

KIND = "Pascal VOC"
SIDES = ("xmin", "ymin", "xmax", "ymax")
CORNER = re.compile("[xy][0-9]+")  # an element of a polygon


def read_voc(tree: Tree, labels: Tree) -> Dataset:
    """Reads labels.

    The format counts pixels from 1, and its boxes hold their last pixel. Many programs write
    coordinates from 0 all the same; a box that begins at 0 gives them away, for all files.
    """
    collector = Collector(KIND, tree, labels.root, None)
    listed = listed_splits(labels, "Main", "ImageSets")
    parsed: list[tuple[str | None, Path, Node]] = []
    for path in labels.of(".xml"):
        split = listed.get(path.stem, labels.split(path))
        with collector.noting(split, "file of labels cannot be read"):
            root = read_xml(path)
            if root.tag != "annotation":
                raise DataError(f"{path}: its element is <{root.tag}>, not <annotation>")
            parsed.append((split, path, root))
    corners = [x for *_, root in parsed for side in SIDES[:2] for x in root.iter(side)]
    zero = any((x.text or "").strip() in ("0", "0.0", "0.00") for x in corners)
    offset = 0.0 if zero else 1.0
    collector.notes.append(
        "boxes are taken as counted from " + ("0, since some begin there" if zero else "1")
    )
    for split, path, root in parsed:
        with collector.noting(split, "file of labels without a usable image"):
            _read_file(collector, split, path, root, offset)
    collector.note_unlabeled(path for path in tree.images if not _is_mask(path))
    if any(map(_is_mask, tree.images)):
        collector.notes.append("the PNG masks in Segmentation* are not read: boxes alone are")
    return collector.finish()


def _is_mask(path: Path) -> bool:
    return path.parent.name in ("SegmentationObject", "SegmentationClass")


def listed_splits(labels: Tree, *folders: str) -> dict[str, str]:
    """Split by name of the image, of lists in ImageSets; empty if they do not tell them apart."""
    result: dict[str, str] = {}
    # Neither lists of a class, such as cat_train.txt, nor trainval.txt.
    lists = [x for x in labels.of(".txt") if x.parent.name in folders and x.stem.isalpha()]
    for split in (TRAIN, VALIDATION, TEST):
        for path in (x for x in lists if split_of(Path(x.stem)) == split):
            for line in read_text(path).splitlines():
                if line.strip():
                    result.setdefault(line.split()[0], split)
    return result


def _read_file(
    collector: Collector, split: str | None, path: Path, root: Node, offset: float
) -> None:
    """Reads one file; DataError if there is no image of it."""
    tree = collector.tree
    names = [path.stem, root.value("filename") or ""]
    found = next((x for n in names if n and (x := tree.find_image(n, path, split))), None)
    if found is None:
        raise DataError(f"{path}: there is no image {names[1] or names[0]!r} in {tree.root}")
    image = collector.add_image(split, found, path, _size(root, str(path)))
    if image is None:
        return
    for node in root.findall("object"):
        assert isinstance(node, Node)
        where = f"{tree.relative(path)}:{node.line}"
        with collector.noting(split, "object is not readable"):
            name, box, mask = _object(node, where, offset)
            collector.add_object(image, name, where, box=box, mask=mask)


def _size(root: Node, where: str) -> tuple[int, int] | None:
    """(H, W), or None where the file does not say, or says 0, as labelImg does at times."""
    node = root.find("size")
    if not isinstance(node, Node):
        return None
    width, height = numbers_of((node.value("width") or 0, node.value("height") or 0), where)
    return (int(height), int(width)) if width and height else None


def _object(
    node: Node, where: str, offset: float
) -> tuple[str, tuple[float, ...] | None, list[list[float]] | None]:
    name = node.value("name")
    if name is None:
        raise DataError(f"{where}: <object> has no <name>")
    polygon = node.find("polygon")
    mask = _polygon(polygon, where, offset) if isinstance(polygon, Node) else None
    box = node.find("bndbox")
    if not isinstance(box, Node):
        if mask is None:
            kind = "a rotated box" if node.find("robndbox") is not None else "no <bndbox>"
            raise DataError(f"{where}: {name!r} has {kind}, where an upright box is needed")
        return name, None, mask
    missing = [side for side in SIDES if box.value(side) is None]
    if missing:
        raise DataError(f"{where}: <bndbox> of {name!r} has no <{missing[0]}>")
    left, top, right, bottom = numbers_of((box.value(side) for side in SIDES), where)
    if right < left or bottom < top:
        raise DataError(f"{where}: box of {name!r} ends before it begins: max is less than min")
    return name, (left - offset, top - offset, right, bottom), mask


def _polygon(node: Node, where: str, offset: float) -> list[list[float]]:
    """Corners x1, y1, x2, y2, ..., as Roboflow writes them."""
    points: list[float] = []
    number = 1
    while (x := node.value(f"x{number}")) is not None:
        points += numbers_of((x, node.value(f"y{number}")), where)
        number += 1
    if number < 4:
        corners = counted(number - 1, "corner")
        raise DataError(f"{where}: <polygon> has {corners}; at least 3 are needed")
    read = {f"{axis}{i}" for axis in "xy" for i in range(1, number)}
    tags = (child.tag for child in node)
    rest = [tag for tag in tags if CORNER.fullmatch(tag) and tag not in read and node.value(tag)]
    if rest:
        gap = f"has <{rest[0]}>, but no <x{number}>"
        raise DataError(f"{where}: <polygon> {gap}: number the corners without gaps")
    return [[value - offset for value in points]]
