"""Spoiled files of Pascal VOC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from tests.corpus.case import Case
from tests.corpus.own_data import (
    FIRST,
    WORDS,
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
from tests.corpus.scene import EVERYTHING, NAMES, SIZE, THINGS

LABELS = "labels/a.xml"
WHERE = r"labels/a\.xml:4"  # of the second object
UNREADABLE = "object is not readable"
UNREAD = "file of labels cannot be read"
BOX = "<bndbox><xmin>33</xmin><ymin>17</ymin><xmax>56</xmax><ymax>40</ymax></bndbox>"
DECLARED = '<?xml version="1.0" encoding="latin-1"?>'


def files() -> Files:
    """An XML file for each image; each object in a line, counted from 1."""
    content = {}
    for image, name in NAMES.items():
        height, width = SIZE
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        lines = ["<annotation>", f"<filename>{name}</filename>{size}"]
        for thing in THINGS.values():
            if thing.image == image:
                x0, y0, x1, y1 = thing.box
                sides = {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}
                box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
                part = f"<name>{thing.category}</name><bndbox>{box}</bndbox>"
                lines.append(f"<object>{part}</object>")
        content[f"labels/{name[0]}.xml"] = "\n".join([*lines, "</annotation>"]).encode()
    return content


def documents() -> Iterator[tuple[str, str | bytes, int]]:
    """What is no XML, or none to read: name, what is put before the file, and percent of it."""
    yield "a document type", "<!DOCTYPE annotation>", 100
    yield "an entity", '<!DOCTYPE a [<!ENTITY b "c">]>', 100
    yield "a bomb", f"<!DOCTYPE a [{''.join(_doubled())}]>", 100
    yield "a foreign entity", '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>', 100
    yield "an unknown encoding", '<?xml version="1.0" encoding="mine"?>', 100
    yield "text before", "labels: ", 100
    yield "an element before", "<a/>", 100
    yield "an end before", "</a>", 100
    yield "a zero byte", "\0", 100
    yield "half a character", b"\xc3", 100
    for percent in (1, 50, 99):
        yield f"cut at {percent} %", "", percent


def _doubled() -> Iterator[str]:
    yield '<!ENTITY a0 "ha">'
    for i in range(1, 40):
        yield f'<!ENTITY a{i} "&a{i - 1};&a{i - 1};">'


def whole() -> Iterator[Fault]:
    """Whole files."""
    for name, change in no_text(LABELS):
        yield of_image(f"file {name}", change, r"labels/a\.xml", UNREAD)
    for name, before, percent in documents():
        start = before.encode() if isinstance(before, str) else before
        change = both(cut(LABELS, percent), lambda f, b=start: f.update({LABELS: b + f[LABELS]}))
        yield of_image(f"file with {name}", change, r"labels/a\.xml", UNREAD)
    deep = put(LABELS, "<a>" * 100_000)
    yield of_image("depth", deep, r"labels/a\.xml", UNREAD)
    closed = put(LABELS, "<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>")
    yield fine("depth, closed", closed, EVERYTHING - FIRST)
    other = both(text(LABELS, "annotation>", "Annotation>", 2))
    yield of_image("other element", other, r"labels/a\.xml", "<Annotation>", UNREAD)
    latin = text(LABELS, "<object>", "<!-- \xe9 -->\n<object>")
    utf = lambda f: f.update({LABELS: f[LABELS].decode().encode("utf-16")})  # noqa: E731
    yield fine("utf-16", utf)
    to_latin = lambda f: f.update(  # noqa: E731
        {LABELS: (DECLARED + f[LABELS].decode()).encode("latin-1")}
    )
    yield fine("latin-1, declared", both(latin, to_latin))
    mark = lambda f: f.update({LABELS: b"\xef\xbb\xbf" + f[LABELS]})  # noqa: E731
    yield fine("byte order mark", mark)
    yield fine("no file of an image", drop(LABELS), EVERYTHING - FIRST, "1 image without a file")
    yield fine("no objects", put(LABELS, "<annotation/>"), EVERYTHING - FIRST)
    lost = "without a usable image"
    yield of_image("image lost", drop("images/a.png"), r"labels/a\.xml", "no image 'a.png'", lost)
    yield fine("file name lost", text(LABELS, "a.png", "lost.png"))
    yield fine("file name empty", text(LABELS, "a.png", ""))
    yield fine("file name missing", text(LABELS, "<filename>a.png</filename>", ""))
    yield fine("name of 5000 letters", text(LABELS, "a.png", "a" * 5000 + ".png"))
    yield fine("name of Windows", text(LABELS, "a.png", "C:\\data\\a.png"))
    moved = lambda f: f.update({"labels/z.xml": f.pop(LABELS)})  # noqa: E731
    yield fine("file of another name", moved)
    again = lambda f: f.update({"labels/z.xml": f[LABELS]})  # noqa: E731
    yield partly("image twice", again, EVERYTHING, r"images/a\.png", "several images with one file")
    for name, change in no_text("images/a.png"):
        yield of_image(f"image {name}", change, r"images/a\.png", "image cannot be read")
    yield from damaged(LABELS, 20)


def sizes() -> Iterator[Fault]:
    """The size of the image, and lists of images."""
    lost = "without a usable image"
    for value in WORDS:
        change = text(LABELS, "<width>64", f"<width>{value}")
        yield of_image(f"width {value}", change, r"labels/a\.xml", "no finite number", lost)
    for value in ("63", "-64", "1e300", "6.4"):
        change = text(LABELS, "<width>64", f"<width>{value}")
        yield of_image(f"width {value}", change, r"images/a\.png", "size|height and width")
    for name, old, new in (
        ("width 0", "<width>64", "<width>0"),
        ("width empty", "<width>64", "<width>"),
        ("width missing", "<width>64</width>", ""),
        ("depth a text", "<depth>3", "<depth>RGB"),
        ("size empty", "<width>64</width><height>48</height><depth>3</depth>", ""),
        ("width 64.0", "<width>64", "<width>64.0"),
    ):
        yield fine(name, text(LABELS, old, new))
    main = "ImageSets/Main/"
    lists = both(put(f"{main}train.txt", "a\nb\n\n"), put(f"{main}val.txt", "c\nd\n"))
    yield fine("lists", lists)
    yield fine("lists with values", put(f"{main}train.txt", "a 1\nb -1\nc  1\nd 1\n"))
    yield fine("list of a lost image", put(f"{main}train.txt", "a\nb\nc\nd\nlost\n"))
    yield refused("list latin-1", put(f"{main}train.txt", b"\xe9"), r"train\.txt", "UTF-8")
    yield refused("no training", put(f"{main}val.txt", "a\nb\nc\nd\n"), "no training data")


def objects() -> Iterator[Fault]:
    """Objects, of which the second is changed."""

    def this(name: str, new: str, *words: str, old: str = BOX) -> Fault:
        return of_object(name, text(LABELS, old, new), WHERE, *words)

    name = "<name>car</name>"
    for kind, new in (("missing", ""), ("empty", "<name/>"), ("of spaces", "<name> \n </name>")):
        yield this(f"name {kind}", new, "no <name>", UNREADABLE, old=name)
    yield fine("name twice", text(LABELS, name, f"{name}<name>person</name>"))
    yield fine("name with spaces", text(LABELS, name, "<name>\n car \n</name>"))
    yield fine("more elements", text(LABELS, name, f"{name}<difficult>x</difficult><pose/>"))
    part = f"<part><name>head</name>{BOX.replace('33', '3')}</part>{name}"
    yield fine("a part", text(LABELS, name, part))
    yield this("box missing", "", "no <bndbox>", UNREADABLE)
    yield this("box empty", "<bndbox/>", "no <xmin>", UNREADABLE)
    yield this("box a text", "<bndbox>33 17 56 40</bndbox>", "no <xmin>", UNREADABLE)
    yield this("box turned", "<robndbox><cx>3</cx></robndbox>", "a rotated box", UNREADABLE)
    for side, value in (("xmin", 33), ("ymax", 40)):
        old = f"<{side}>{value}</{side}>"
        yield this(f"{side} missing", "", f"no <{side}>", UNREADABLE, old=old)
        yield this(f"{side} empty", f"<{side}> </{side}>", f"no <{side}>", UNREADABLE, old=old)
        for word in WORDS:
            new = f"<{side}>{word}</{side}>"
            yield this(f"{side} {word}", new, "no finite number", UNREADABLE, old=old)
        yield fine(f"{side} with spaces", text(LABELS, old, f"<{side}>\n {value}.0 \n</{side}>"))
        yield fine(f"{side} twice", text(LABELS, old, f"{old}<{side}>7</{side}>"))
    yield this("sides swapped", "<xmin>57", "ends before it begins", UNREADABLE, old="<xmin>33")
    yield this("no width", "<xmin>57", "ends before|zero", old="<xmin>33")
    for kind, shift in (("right", 900), ("left", -900)):
        box = BOX.replace("33", str(33 + shift)).replace("56", str(56 + shift))
        yield this(f"box {kind} of the image", box, "box outside")
    polygon = _polygon(33, 17, 56, 40)
    yield fine("polygons", partial(_with_polygons, box=True))
    yield fine("polygons alone", partial(_with_polygons, box=False))
    for kind, old, new, words in (
        ("without y2", "<y2>17</y2>", "", "no finite number"),
        ("with a text", "<y2>17", "<y2>x", "no finite number"),
        ("without x1", "<x1>33</x1>", "", "corners"),
        ("without x3", "<x3>57</x3>", "", "corners"),
        ("without x4", "<x4>33</x4>", "", "<y4>, but no <x4>"),
        ("with a gap", "<x4>33</x4><y4>41</y4>", "<x5>33</x5><y5>41</y5>", "<x5>, but no <x4>"),
        ("of x alone", "", "", "corners"),
    ):
        changed = polygon.replace(old, new) if old else "<polygon><x1>3</x1></polygon>"
        words = words if old else "no finite number"
        yield this(f"polygon {kind}", BOX + changed, words, UNREADABLE)
    yield this("polygon empty", f"{BOX}<polygon/>", "0 corners", UNREADABLE)


def _polygon(left: int, top: int, right: int, bottom: int) -> str:
    corners = ((left, top), (right + 1, top), (right + 1, bottom + 1), (left, bottom + 1))
    numbered = enumerate(corners, start=1)
    inside = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in numbered)
    return f"<polygon>{inside}</polygon>"


def _with_polygons(files: Files, *, box: bool) -> None:
    for path in [path for path in files if path.endswith(".xml")]:
        pattern = "<bndbox>" + r"<\w+>(\d+)</\w+>" * 4 + "</bndbox>"
        add = lambda m: m[0] * box + _polygon(*map(int, m.groups()))  # noqa: E731
        files[path] = re.sub(pattern, add, files[path].decode()).encode()


def cases() -> list[Case]:
    """All of them."""
    return cases_of("voc", files, (x for group in (whole, sizes, objects) for x in group()))
