"""LabelMe: a JSON file for each image, with polygons, rectangles, circles and masks."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from maskdino.custom.formats.collect import Collector, Dataset, numbers_of
from maskdino.custom.formats.files import Tree
from maskdino.custom.formats.shapes import ellipse, placed
from maskdino.data import DataError
from maskdino.data.images import BROKEN_IMAGE
from maskdino.data.reading import read_json

KIND = "LabelMe"
NO_AREA = ("point", "points", "line", "linestrip")
# Numbers of points; None: three or more.
CORNERS: dict[str, tuple[int, ...] | None] = {
    "polygon": None,
    "rectangle": (2, 4),
    "oriented_rectangle": (4,),
    "rotation": (4,),
    "circle": (2,),
    "mask": (2,),
}
NO_CLASS = ("_background_", "__ignore__")  # LabelMe's own names
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold


def read_labelme(tree: Tree, labels: Tree) -> Dataset:
    """Reads labels.

    Shapes of one label and one group are parts of one object.
    """
    collector = Collector(KIND, tree, labels.root, None)
    for path in labels.of(".json"):
        split = labels.split(path)
        with collector.noting(split, "file of labels cannot be used"):
            content = read_json(str(path), "utf-8-sig")
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise DataError(f"{path}: it has no list 'shapes': no file of LabelMe")
            found = _image_of(collector, path, content, split)
            height, width = content.get("imageHeight"), content.get("imageWidth")
            size = None
            if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
                size = height, width
            image = collector.add_image(split, found, path, size)
            if image is not None:
                _add_shapes(collector, image, path, content["shapes"])
    collector.note_unlabeled(tree.images)
    return collector.finish()


def _image_of(collector: Collector, path: Path, content: dict, split: str | None) -> Path:
    names = [str(content.get("imagePath") or ""), path.stem]
    for name in names:
        found = collector.tree.find_image(name, path, split) if name else None
        if found is not None:
            return found
    hint = "; it is inside of the file: write it out with labelme_export_json"
    raise DataError(
        f"{path}: there is no image {names[0] or names[1]!r}"
        f"{hint if content.get('imageData') else ''}"
    )


def _add_shapes(collector: Collector, image: dict, path: Path, shapes: list) -> None:
    kind_of_problem = "shape is not readable"
    groups: dict[tuple, list[tuple[str, list[float], list[list[float]] | dict | None]]] = {}
    for index, shape in enumerate(shapes):
        where = f"{collector.tree.relative(path)}, shape {index + 1}"
        with collector.noting(image["split"], kind_of_problem):
            if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
                raise DataError(f"{where}: it has no label")
            label, kind = shape["label"].strip(), str(shape.get("shape_type") or "polygon")
            if kind in NO_AREA or label in NO_CLASS:
                what = f"type {kind!r}" if kind in NO_AREA else f"label {label!r}"
                collector.ignored[what] += 1
                continue
            if not label or SURROGATE.search(label):
                raise DataError(f"{where}: its label is {'no text' if label else 'empty'}")
            box, mask = _geometry(shape, kind, (image["height"], image["width"]), where)
            group = shape.get("group_id")
            key = (label, index if group is None else f"group {group}")
            groups.setdefault(key, []).append((where, box, mask))
    for (label, _), members in groups.items():
        where, box, mask = members[0]
        parts = [part for *_, part in members if isinstance(part, list)]
        if len(members) == 1:
            collector.add_object(image, label, where, box=box, mask=mask)
        elif len(parts) == len(members):
            collector.add_object(image, label, where, mask=[x for part in parts for x in part])
        else:
            detail = f"{where}: group of {len(members)} shapes that are not all polygons"
            collector.problem(image["split"], kind_of_problem, detail)


def _geometry(
    shape: dict, kind: str, size: tuple[int, int], where: str
) -> tuple[list[float], list[list[float]] | dict | None]:
    """Box (left, top, right, bottom) of a shape, and its mask unless it is a box alone."""
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise DataError(f"{where}: its points must be a list of pairs: [[x, y], ...]")
    flat = numbers_of((value for point in points for value in point), where)
    if kind not in CORNERS:
        raise DataError(f"{where}: shapes of type {kind[:40]!r} are unknown")
    allowed = CORNERS[kind]
    if len(points) not in allowed if allowed else len(points) < 3:
        needed = " or ".join(map(str, allowed or ("at least 3",)))
        raise DataError(f"{where}: a {kind} has {needed} points, not {len(points)}")
    if kind == "circle":
        radius = math.dist(points[0], points[1])
        if radius == 0:
            raise DataError(f"{where}: a circle of radius 0")
        flat = ellipse((flat[0], flat[1]), (radius, radius))
    xs, ys = flat[::2], flat[1::2]
    box = [min(xs), min(ys), max(xs), max(ys)]
    if kind == "rectangle":
        return box, None
    if kind == "mask":
        bitmap = _bitmap(shape.get("mask"), where)
        left, top = round(box[0]), round(box[1])
        corner = [float(left), float(top), left + bitmap.shape[1], top + bitmap.shape[0]]
        return corner, placed(bitmap, left, top, size, where)
    return box, [flat]


def _bitmap(text: object, where: str) -> np.ndarray:
    """The (h, w) bool mask in a PNG file in base 64."""
    try:
        data = base64.b64decode(text if isinstance(text, str) else "", validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("L")) > 0
    except BROKEN_IMAGE as error:
        raise DataError(f"{where}: its mask is no PNG file in base 64") from error
