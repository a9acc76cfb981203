"""Spoiled files of CVAT for images."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.corpus.case import Case
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
    refused,
    text,
)
from tests.corpus.scene import CATEGORIES, EVERYTHING, NAMES, SIZE, THINGS
from tests.corpus.voc import documents

LABELS = "annotations.xml"
LINE = 5  # of the second object: each element is in a line of its own
WHERE = rf"annotations\.xml:{LINE}"
UNREADABLE = "shape is not readable"
SHAPE = '<polygon label="car" points="32,16;56,16;56,40;32,40"/>'
HEIGHT, WIDTH = SIZE


def files() -> Files:
    """One XML file, with polygons."""
    labels = "".join(f"<label><name>{name}</name></label>" for name in sorted(CATEGORIES))
    lines = [f"<annotations><meta><task><labels>{labels}</labels></task></meta>"]
    lines.append("<version>1.1</version>")
    for image, name in NAMES.items():
        size = f'width="{WIDTH}" height="{HEIGHT}"'
        lines.append(f'<image id="{image}" name="{name}" {size}>')
        for thing in THINGS.values():
            if thing.image == image:
                x0, y0, x1, y1 = thing.box
                points = f"{x0},{y0};{x1},{y0};{x1},{y1};{x0},{y1}"
                lines.append(f'<polygon label="{thing.category}" points="{points}"/>')
        lines.append("</image>")
    return {LABELS: "\n".join([*lines, "</annotations>"]).encode()}


def whole() -> Iterator[Fault]:
    """The file as a whole."""
    for name, change in no_text(LABELS):
        yield refused(f"file {name}", change, r"own")
    for name, before, percent in documents():
        start = before.encode() if isinstance(before, str) else before
        change = both(cut(LABELS, percent), lambda f, b=start: f.update({LABELS: b + f[LABELS]}))
        yield refused(f"file with {name}", change, r"annotations\.xml")
    yield refused("depth", put(LABELS, "<annotations>" + "<a>" * 100_000), r"annotations\.xml")
    track = text(LABELS, "<version>", '<track id="0" label="car"/><version>')
    yield refused("tracks", track, r"annotations\.xml", "format for videos")
    yield refused("nothing", put(LABELS, "<annotations/>"), "annotations.xml|own")
    meta = re.compile(rb"<meta>.*</meta>")
    yield fine("no labels", lambda f: f.update({LABELS: meta.sub(b"", f[LABELS])}))
    yield fine("labels empty", lambda f: f.update({LABELS: meta.sub(b"<meta/>", f[LABELS])}))
    yield fine("label without name", text(LABELS, "<labels>", "<labels><label/>"))
    yield fine("label twice", text(LABELS, "<label>", "<label><name>car</name></label><label>"))
    kind = "image is missing"
    for name, old, new, word in (
        ("lost", 'name="a.png"', 'name="lost.png"', "lost.png"),
        ("empty", 'name="a.png"', 'name=""', "no image ''"),
        ("missing", 'name="a.png"', "", "no image ''"),
        ("of 5000 letters", 'name="a.png"', f'name="{"a" * 5000}.png"', "no image 'aaa"),
    ):
        change = text(LABELS, old, new)
        yield of_image(f"name {name}", change, r"annotations\.xml, line 3", word, kind)
    yield fine("name outside", text(LABELS, 'name="a.png"', 'name="../../etc/a.png"'))
    yield fine("name of Windows", text(LABELS, 'name="a.png"', 'name="C:\\data\\a.png"'))
    yield fine("subset", text(LABELS, 'name="a.png"', 'name="a.png" subset="mine"'))
    for value in (*WORDS, ""):
        change = text(LABELS, 'width="64"', f'width="{value}"')
        where = r"annotations\.xml, line 3"
        yield of_image(f"width {value}", change, where, "no finite number", kind)
    yield of_image("width missing", text(LABELS, 'width="64"', ""), "line 3", "no finite", kind)
    for value in ("63", "-64", "0", "1e300", "6.4"):
        change = text(LABELS, 'width="64"', f'width="{value}"')
        yield of_image(f"width {value}", change, r"a\.png", "another size|height and width")
    yield of_image("image lost", drop("images/a.png"), "line 3", "no image 'a.png'", kind)
    for name, change in no_text("images/a.png"):
        yield of_image(f"image {name}", change, r"images/a\.png", "image cannot be read")
    again = text(LABELS, "</annotations>", f"{_first()}\n</annotations>")
    yield partly("image twice", again, EVERYTHING, "a.png", "several images with one file")
    yield fine(
        "no shapes",
        text(LABELS, _first(), f"{_first().splitlines()[0]}</image>"),
        EVERYTHING - FIRST,
    )
    yield from damaged(LABELS, 20)


def _first() -> str:
    return re.search("<image.*?</image>", files()[LABELS].decode(), re.DOTALL)[0]  # type: ignore[index]


def shapes() -> Iterator[Fault]:
    """Shapes, of which the second is changed."""

    def change(new: str, old: str = SHAPE) -> Change:
        return text(LABELS, old, new)

    def this(name: str, new: str, *words: str, old: str = SHAPE) -> Fault:
        return of_object(name, change(new, old), WHERE, *words)

    for value in ("bus", "", " ", "Car"):
        new = f'<polygon label="{value}"'
        word = "none of the labels in <meta>"
        yield this(f"label {value}", new, word, UNREADABLE, old='<polygon label="car"')
    yield this("label missing", "<polygon", "none of", UNREADABLE, old='<polygon label="car"')
    yield fine("label with spaces", change('label=" car "', 'label="car"'))
    for name, points in (
        ("empty", ""),
        ("of one", "3,4"),
        ("of two", "3,4;5,6"),
        ("of three numbers", "3,4,5;3,4,5;3,4,5"),
        ("separated by spaces", "32,16 56,16 56,40"),
        ("with an end", "32,16;56,16;56,40;"),
    ):
        yield this(
            f"points {name}", f'<polygon label="car" points="{points}"/>', "pairs", UNREADABLE
        )
    yield this("points missing", '<polygon label="car"/>', "pairs", UNREADABLE)
    for value in WORDS:
        new = SHAPE.replace("56,40", f"{value.replace(',', '.5.')},40")
        yield this(f"coordinate {value}", new, "no finite number", UNREADABLE)
    yield this("coordinate far away", SHAPE.replace("56,40", "1e9,40"), "beyond 100000 pixels")
    yield this("of one place", re.sub("points=.*", 'points="5,5;5,5;5,5"/>', SHAPE), "box of zero")
    yield this("of a line", re.sub("points=.*", 'points="5,5;9,9;7,7"/>', SHAPE), "empty mask")
    for kind in ("points", "polyline", "cuboid", "skeleton", "tag"):
        new = f'<{kind} label="car" points="x"/>'
        yield fine(f"shape {kind}", change(new), EVERYTHING - {2}, f"type '{kind}'")
    yield this("shape unknown", '<star label="car"/>', "<star> are unknown", UNREADABLE)
    box = '<box label="car" xtl="32" ytl="16" xbr="56" ybr="40"/>'
    yield fine("box", change(box))
    yield fine("box turned by 180", change(box.replace("/>", ' rotation="180"/>')))
    for value in WORDS:
        new = box.replace("/>", f' rotation="{value}"/>')
        yield this(f"rotation {value}", new, "no finite number", UNREADABLE)
        new = box.replace('"56"', f'"{value}"')
        yield this(f"xbr {value}", new, "no finite number", UNREADABLE)
    yield this("xbr missing", box.replace('xbr="56"', ""), "no xbr", UNREADABLE)
    yield this("xbr empty", box.replace('"56"', '""'), "no finite number", UNREADABLE)
    yield this("box of no width", box.replace('"56"', '"32"'), "box of zero")
    yield this("box turned round", box.replace('"56"', '"5"'), "box of zero")
    outside = box.replace('"32"', '"932"').replace('"56"', '"956"')
    yield this("box outside", outside, "box outside")
    for name, radii, word in (
        ("of no radius", 'rx="0" ry="0"', "box of zero"),
        ("of a negative radius", 'rx="-5" ry="4"', "radi"),
        ("without radius", 'rx="5"', "no ry"),
        ("huge", 'rx="1e300" ry="5"', "box is not four"),
    ):
        new = f'<ellipse label="car" cx="30" cy="20" {radii}/>'
        yield this(f"ellipse {name}", new, word)
    yield fine("group of one", change(SHAPE.replace("/>", ' group_id="3"/>')))
    yield fine("group a text", change(SHAPE.replace("/>", ' group_id="x"/>')))
    yield fine("more attributes", change(SHAPE.replace("/>", ' z_order="x" occluded="?"/>')))


def masks() -> Iterator[Fault]:
    """Shapes that are run lengths."""
    good = {"rle": "0, 576", "left": "32", "top": "16", "width": "24", "height": "24"}

    def mask(**values: object) -> Change:
        attributes = {key: value for key, value in (good | values).items() if value is not None}
        words = " ".join(f'{key}="{value}"' for key, value in attributes.items())
        return text(LABELS, SHAPE, f'<mask label="car" {words}/>')

    def this(name: str, *words: str, **values: object) -> Fault:
        return of_object(f"mask {name}", mask(**values), WHERE, *words)

    yield fine("mask", mask())
    yield fine("mask with zeros", mask(rle="0,100,0,476"))
    for value in (*WORDS, ""):
        word = "do not add up" if "," in value else "no finite number"
        yield this(f"of {value}", word, UNREADABLE, rle=value)
        yield this(f"left {value}", "no finite number", UNREADABLE, left=value)
    for key in good:
        word = "no finite number" if key == "rle" else f"no {key}"
        yield this(f"without {key}", word, UNREADABLE, **{key: None})
    for name, rle in (("short", "0,5"), ("long", "0,577"), ("negative", "-1,577")):
        yield this(name, "do not add up", UNREADABLE, rle=rle)
    yield this("of fractions", "do not add up|whole", UNREADABLE, rle="0.5,575.5")
    yield this("of nothing", "no pixel of the mask", UNREADABLE, rle="576")
    for name, values in (("right", {"left": 900}), ("above", {"top": -90})):
        yield this(f"{name} of the image", "no pixel of the mask", UNREADABLE, **values)
    huge = {"rle": f"0,{10**12}", "width": 10**6, "height": 10**6}
    yield this("huge", "a mask of 1000000 x", UNREADABLE, **huge)
    negative = {"width": -24, "height": -24}
    yield this("of negative size", "a mask of -24 x", UNREADABLE, **negative)
    yield this("of no size", "a mask of 0 x 0", UNREADABLE, rle="0", width=0, height=0)
    yield this("far away", "no pixel|beyond", UNREADABLE, left="1e300")


def cases() -> list[Case]:
    """All of them."""
    groups = (whole, shapes, masks)
    return cases_of("cvat", files, (fault for group in groups for fault in group()))
