"""Spoiled files of LabelMe."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tests.corpus.case import Case
from tests.corpus.faults import HUGE
from tests.corpus.own_data import (
    FIRST,
    WORDS,
    Change,
    Fault,
    Files,
    both,
    cases_of,
    cut,
    damaged,
    drop,
    fine,
    no_text,
    of_image,
    of_object,
    partly,
    put,
    text,
)
from tests.corpus.scene import EVERYTHING, NAMES, SIZE, THINGS

LABELS = "a.json"
WHERE = r"a\.json, shape 2"
UNREADABLE = "shape is not readable"
UNUSABLE = "file of labels cannot be used"


def files() -> Files:
    """A JSON file for each image, with polygons."""
    content = {}
    for image, name in NAMES.items():
        shapes = []
        for thing in THINGS.values():
            if thing.image == image:
                x0, y0, x1, y1 = thing.box
                points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
                shape: dict[str, Any] = {"label": thing.category, "points": points}
                shapes.append(shape | {"group_id": None, "shape_type": "polygon", "flags": {}})
        data = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"images/{name}"}
        data |= {"imageData": None, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        content[f"{name[0]}.json"] = json.dumps(data).encode()
    return content


def edit(change: Callable[[dict], object]) -> Change:
    """Changes the content of the first file."""

    def changed(files: Files) -> None:
        data = json.loads(files[LABELS])
        change(data)
        files[LABELS] = json.dumps(data).encode()

    return changed


def whole(**values: object) -> Change:
    """Changes values of the first file."""
    return edit(lambda data: data.update(values))


def shape(**values: object) -> Change:
    """Changes values of the second shape of the first file."""
    return edit(lambda data: data["shapes"][1].update(values))


def without(key: str) -> Change:
    """Removes a key of the second shape."""
    return edit(lambda data: data["shapes"][1].pop(key))


def contents() -> Iterator[Fault]:
    """Whole files."""
    for name, change in no_text(LABELS):
        yield of_image(f"file {name}", change, r"a\.json", UNUSABLE)
    for percent in (1, 50, 99):
        yield of_image(f"file cut at {percent} %", cut(LABELS, percent), r"a\.json", UNUSABLE)
    for name, data in (
        ("null", "null"),
        ("a list", "[]"),
        ("a number", "3"),
        ("an object", "{}"),
        ("depth of lists", "[" * 200_000),
        ("a number of 5000 digits", '{"shapes": [' + "9" * 5000 + "]}"),
        ("two documents", "{}{}"),
    ):
        yield of_image(f"file {name}", put(LABELS, data), r"a\.json", UNUSABLE)
    for name, value in (("null", None), ("a number", 3), ("an object", {}), ("a text", "x")):
        yield of_image(f"shapes {name}", whole(shapes=value), r"a\.json", "'shapes'", UNUSABLE)
    yield fine("shapes empty", whole(shapes=[]), EVERYTHING - FIRST)
    mark = lambda f: f.update({LABELS: b"\xef\xbb\xbf" + f[LABELS]})  # noqa: E731
    yield fine("byte order mark", mark)
    yield fine("more keys", whole(mine={"a": [1]}, flags=None, version=3, lineColor=[0]))
    yield fine("no file of an image", drop(LABELS), EVERYTHING - FIRST, "1 image without a file")
    yield of_image("image lost", drop("images/a.png"), r"a\.json", "no image", UNUSABLE)
    inside = both(drop("images/a.png"), whole(imageData="AAAA"))
    yield of_image("image inside of the file", inside, "labelme_export_json", UNUSABLE)
    for name, change in no_text("images/a.png"):
        yield of_image(f"image {name}", change, r"images/a\.png", "image cannot be read")
    for name, value in (
        ("null", None),
        ("a number", 5),
        ("a list", ["a"]),
        ("lost", "lost.png"),
        ("outside", "../../../etc/passwd"),
        ("of Windows", "C:\\data\\a.png"),
        ("with zero", "a\0.png"),
        ("of 5000 letters", "a" * 5000 + ".png"),
        ("a lone surrogate", "\ud800.png"),
    ):
        yield fine(f"image path {name}", whole(imagePath=value))
    again = lambda f: f.update({"z.json": f[LABELS]})  # noqa: E731
    twice = "several images with one file"
    yield partly("image twice", again, EVERYTHING, r"images/a\.png", twice)
    size = "another size"
    for name, value in (("of another", 47), ("huge", 10**12)):
        yield of_image(f"height {name}", whole(imageHeight=value), r"a\.png", size)
    yield of_image("height true", whole(imageHeight=True), r"a\.png", "without height and width")
    for name, value in (("null", None), ("zero", 0), ("negative", -48), ("a text", "48")):
        yield fine(f"height {name}", whole(imageHeight=value))  # that of the file counts
    yield from damaged(LABELS, 20)


def labels() -> Iterator[Fault]:
    """Labels and groups of shapes."""
    this = partial(of_object, number=2)
    for name, value in (("null", None), ("a number", 3), ("a list", []), ("a text", "car")):
        change = edit(lambda data, v=value: data["shapes"].__setitem__(1, v))
        yield this(f"shape {name}", change, WHERE, "no label", UNREADABLE)
    for name, value in (("null", None), ("a number", 3), ("a list", ["car"])):
        yield this(f"label {name}", shape(label=value), WHERE, "no label", UNREADABLE)
    for name, value in (("empty", ""), ("of spaces", " \t")):
        yield this(f"label {name}", shape(label=value), WHERE, "label is empty", UNREADABLE)
    yield this("label a lone surrogate", shape(label="\ud800"), WHERE, "no text", UNREADABLE)
    yield this("label missing", without("label"), WHERE, "no label", UNREADABLE)
    yield fine("label with spaces", shape(label=" car "))
    for name, value in (("a list", [1]), ("an object", {}), ("a fraction", 0.5), ("a text", "1")):
        yield fine(f"group {name}", shape(group_id=value))
    yield fine("key twice", text(LABELS, '"label": "car"', '"label": "person", "label": "car"'))


def shapes() -> Iterator[Fault]:
    """Points and types of shapes."""
    this = partial(of_object, number=2)
    pairs = "list of pairs"
    for name, value in (
        ("null", None),
        ("a number", 3),
        ("a text", "1,2"),
        ("flat", [1, 2, 3, 4, 5, 6]),
        ("of three", [[1, 2, 3]] * 4),
        ("of null", [None] * 4),
        ("objects", [{"x": 1, "y": 2}] * 4),
    ):
        yield this(f"points {name}", shape(points=value), WHERE, pairs, UNREADABLE)
    yield this("points missing", without("points"), WHERE, pairs, UNREADABLE)
    corner = lambda x: [[32, 16], [56, 16], [56, 40], [32, x]]  # noqa: E731
    for value in (*WORDS, None, True, [], {}, float("nan"), float("-inf"), HUGE):
        change = shape(points=corner(value))
        name = f"coordinate {str(value)[:9]} {type(value).__name__}"
        yield this(name, change, WHERE, "no finite number", UNREADABLE)
    yield this("coordinate far away", shape(points=corner(1e9)), WHERE, "beyond 100000 pixels")
    for number in (0, 1, 2):
        some = [[3, 4]] * number
        yield this(f"polygon of {number}", shape(points=some), WHERE, "at least 3", UNREADABLE)
    yield this("polygon of one place", shape(points=[[5, 5]] * 4), WHERE, "box of zero")
    yield this("polygon of a line", shape(points=[[5, 5], [9, 9], [7, 7]]), WHERE, "empty mask")
    right = [[900, 10], [950, 10], [950, 40]]
    yield this("polygon right of the image", shape(points=right), WHERE, "box outside")
    kinds = (("rectangle", 3), ("circle", 1), ("circle", 3), ("oriented_rectangle", 2), ("mask", 1))
    for kind, number in kinds:
        change = shape(shape_type=kind, points=[[3, 4], [9, 20], [5, 6]][:number])
        yield this(f"{kind} of {number}", change, WHERE, f"a {kind} has", UNREADABLE)
    for kind in ("star", 3, ["polygon"], True):
        yield this(f"type {kind}", shape(shape_type=kind), WHERE, "are unknown", UNREADABLE)
    yield fine("type null", shape(shape_type=None))
    yield fine("type missing", without("shape_type"))
    for kind in ("point", "line", "linestrip", "points"):
        yield fine(f"type {kind}", shape(shape_type=kind), EVERYTHING - {2}, f"type '{kind}'")
    none = shape(shape_type="circle", points=[[3, 4], [3, 4]])
    for far in (1e12, 1e300):
        change = shape(shape_type="circle", points=[[3, 4], [far, -far]])
        yield this(f"circle of radius {far}", change, WHERE, "beyond 100000 pixels|box is not four")
    yield this("circle of no radius", none, WHERE, "radius 0", UNREADABLE)


def masks() -> Iterator[Fault]:
    """Shapes that are bitmaps."""
    this = partial(of_object, number=2)
    x0, y0, x1, y1 = THINGS[2].box
    good = _png(np.ones((y1 - y0, x1 - x0), bool))

    def mask(value: object, left: float = x0, top: float = y0) -> Change:
        points = [[left, top], [left + 23, top + 23]]
        return shape(shape_type="mask", points=points, mask=value)

    yield fine("mask", mask(good))
    no_png = "no PNG file in base 64"
    for name, value in (
        ("null", None),
        ("a number", 3),
        ("empty", ""),
        ("no base 64", "!" + good),
        ("cut", good[: len(good) // 8 * 4]),
        ("a text", base64.b64encode(b"no image").decode()),
        ("not ASCII", "é" + good),
        ("too large", base64.b64encode(_bomb()).decode()),
    ):
        yield this(f"mask {name}", mask(value), WHERE, no_png, UNREADABLE)
    empty = _png(np.zeros((24, 24), bool))
    yield this("mask of nothing", mask(empty), WHERE, "no pixel of the mask", UNREADABLE)
    for name, left, top in (("right", 900, 3), ("above", 3, -90), ("far away", 1e300, 3)):
        change = mask(good, left, top)
        yield this(f"mask {name} of the image", change, WHERE, "no pixel|beyond", UNREADABLE)


def _png(mask: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _bomb() -> bytes:
    """A head that announces 60,000 x 60,000 pixels."""
    data = base64.b64decode(_png(np.ones((8, 8), bool)))
    return data[:16] + (60_000).to_bytes(4, "big") * 2 + data[24:]


def cases() -> list[Case]:
    """All of them."""
    faults = (fault for group in (contents, labels, shapes, masks) for fault in group())
    return cases_of("labelme", files, faults)
