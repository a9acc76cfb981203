"""CVAT for images 1.1: one XML file with the shapes of all images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from maskdino.custom.formats.collect import Collector, Dataset, numbers_of
from maskdino.custom.formats.files import Tree, split_of
from maskdino.custom.formats.shapes import ellipse, placed, turned
from maskdino.custom.formats.xml import Node, read_xml
from maskdino.data import DataError

KIND = "CVAT"
NO_AREA = ("points", "polyline", "cuboid", "skeleton", "tag")


def read_cvat(tree: Tree, file: Path) -> Dataset:
    """Reads labels; DataError if the file is not readable, or of a video."""
    root = read_xml(file)
    if root.find("track") is not None:
        raise DataError(
            f"{file} is CVAT's format for videos, with tracks: export the task once more as "
            "'CVAT for images', or as COCO"
        )
    # In the order of the project; a label of a skeleton's part is none of its own.
    labels = root.iterfind("meta/*/labels/label/name")
    names = [label.text.strip() for label in labels if label.text and label.text.strip()]
    numbers = dict(enumerate(dict.fromkeys(names), start=1)) or None
    collector = Collector(KIND, tree, file, numbers)
    collector.by_name = True
    for node in _nodes(root, "image"):
        where = f"{file}, line {node.line}"
        name, subset = node.get("name") or "", node.get("subset") or ""
        split = split_of(Path(subset)) or split_of(Path(name).parent)
        with collector.noting(split, "image is missing"):
            sides = numbers_of((node.get("height"), node.get("width")), where)
            # Exports of a project put a task's images into a folder of the subset.
            found = tree.find_image(f"{subset}/{name}" if subset else name, file, split)
            if found is None:
                raise DataError(f"{where}: there is no image {name!r} in {tree.root}")
            image = collector.add_image(split, found, file, (int(sides[0]), int(sides[1])))
            if image is not None:
                _add_shapes(collector, image, file, node)
    return collector.finish()


def _nodes(parent: Node, tag: str | None = None) -> Iterator[Node]:
    return (x for x in parent if isinstance(x, Node) and tag in (None, x.tag))


def _add_shapes(collector: Collector, image: dict, file: Path, parent: Node) -> None:
    known = (collector.names or {}).values()
    size = image["height"], image["width"]
    groups: dict[tuple[str, str], list[tuple[str, list[float]]]] = {}
    for node in _nodes(parent):
        if node.tag in NO_AREA:
            collector.ignored[f"type {node.tag!r}"] += 1
            continue
        where = f"{collector.tree.relative(file)}:{node.line}"
        label = (node.get("label") or "").strip()
        with collector.noting(image["split"], "shape is not readable"):
            if not label or (known and label not in known):
                raise DataError(f"{where}: label {label!r} is none of the labels in <meta>")
            box, mask = _geometry(node, size, where)
            group = node.get("group_id") or "0"
            if node.tag == "polygon" and group != "0" and isinstance(mask, list):
                groups.setdefault((label, group), []).append((where, mask[0]))
            else:
                collector.add_object(image, label, where, box=box, mask=mask)
    for (label, _), members in groups.items():
        polygons = [polygon for _, polygon in members]
        collector.add_object(image, label, members[0][0], mask=polygons)


def _geometry(
    node: Node, size: tuple[int, int], where: str
) -> tuple[list[float] | None, list[list[float]] | dict | None]:
    """Box (left, top, right, bottom) of a shape or None, and its mask unless it is a box."""
    turn = numbers_of([node.get("rotation") or 0], where)[0]
    if node.tag == "box":
        box = _values(node, where, "xtl", "ytl", "xbr", "ybr")
        if not turn:
            return box, None
        left, top, right, bottom = box
        corners = [left, top, right, top, right, bottom, left, bottom]
        return None, [turned(corners, ((left + right) / 2, (top + bottom) / 2), turn)]
    if node.tag == "polygon":
        pairs = [pair.split(",") for pair in (node.get("points") or "").split(";")]
        if len(pairs) < 3 or any(len(pair) != 2 for pair in pairs):
            raise DataError(f"{where}: points must be three or more pairs: 'x,y;x,y;x,y'")
        return None, [numbers_of(chain(*pairs), where)]
    if node.tag == "ellipse":
        x, y, *radii = _values(node, where, "cx", "cy", "rx", "ry")
        if min(radii) < 0:
            raise DataError(f"{where}: radius {min(radii)} is negative")
        return None, [turned(ellipse((x, y), (radii[0], radii[1])), (x, y), turn)]
    if node.tag == "mask":
        return _mask(node, size, where)
    raise DataError(f"{where}: shapes <{node.tag}> are unknown")


def _values(node: Node, where: str, *names: str) -> list[float]:
    """Numbers of an element."""
    missing = [name for name in names if node.get(name) is None]
    if missing:
        raise DataError(f"{where}: <{node.tag}> has no {missing[0]}")
    return numbers_of((node.get(name) for name in names), where)


def _mask(node: Node, size: tuple[int, int], where: str) -> tuple[list[float], dict]:
    """Box and run lengths."""
    numbers = _values(node, where, "left", "top", "width", "height")
    left, top, width, height = map(int, numbers)
    if not (0 < width <= size[1] and 0 < height <= size[0]):  # of which memory is asked for
        raise DataError(
            f"{where}: a mask of {width} x {height} pixels, in an image of {size[1]} x {size[0]}"
        )
    counts = [int(x) for x in numbers_of((node.get("rle") or "").split(","), where)]
    if min(counts) < 0 or sum(counts) != width * height:
        raise DataError(f"{where}: run lengths do not add up to {width} x {height} pixels")
    # By rows, and the background first, unlike COCO's.
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
    return [left, top, left + width, top + height], placed(runs, left, top, size, where)
