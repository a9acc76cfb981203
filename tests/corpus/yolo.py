"""Spoiled YOLO labels, boxes and polygons, and their data.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from tests.corpus.case import Case, Ran, Works
from tests.corpus.faults import same
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

LABELS, SETTINGS = "labels/a.txt", "data.yaml"
WHERE = r"labels/a\.txt:2"
HEIGHT, WIDTH = SIZE


def files(polygons: bool = False) -> Files:
    """data.yaml, images and labels."""
    names = sorted(CATEGORIES)
    content = {SETTINGS: f"names: [{', '.join(names)}]\n".encode()}
    for image, name in NAMES.items():
        lines = []
        for thing in THINGS.values():
            x0, y0, x1, y1 = thing.box
            values = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            if polygons:
                values = [x0, y0, x1, y0, x1, y1, x0, y1]
            shares = [x / (HEIGHT if i % 2 else WIDTH) for i, x in enumerate(values)]
            if thing.image == image:
                lines.append(" ".join(map(str, (names.index(thing.category), *shares))))
        content[f"labels/{name[0]}.txt"] = ("\n".join(lines) + "\n").encode()
    return content


def word(index: int, new: str) -> Change:
    """Replaces a word of the second line."""

    def change(files: Files) -> None:
        lines = files[LABELS].decode().splitlines()
        words = lines[1].split()
        words[index] = new
        files[LABELS] = "\n".join([lines[0], " ".join(words), ""]).encode("utf-8")

    return change


def line(edit: object) -> Change:
    """Changes the second line by a function of it."""

    def change(files: Files) -> None:
        lines = files[LABELS].decode().splitlines()
        files[LABELS] = "\n".join([lines[0], edit(lines[1]), ""]).encode()  # type: ignore[operator]

    return change


def words_of_lines(index: int) -> Iterator[Fault]:
    """What is wrong with any number."""
    for value in WORDS:
        yield of_object(f"word {index} {value}", word(index, value), WHERE, value, "no YOLO label")
    for value in ("1.5", "-0.5", "32", "1e30"):
        said = f"{value} is no share of the image"
        yield of_object(f"word {index} {value}", word(index, value), WHERE, said, "no YOLO label")


def boxes() -> Iterator[Fault]:
    """Lines of boxes."""
    label = "no YOLO label"
    for index in (1, 4):
        yield from words_of_lines(index)
    for value in ("car", "nan", "1e999", "", "²"):
        yield of_object(f"class {value}", word(0, value), WHERE, label)
    for value in ("2", "-1", "0.5", "1e9", "80"):
        yield of_object(f"class {value}", word(0, value), WHERE, f"class {value}, but", label)
    yield fine("class 0.0", word(0, "0.0"))
    for number in (2, 3, 4, 6, 8):
        edit = lambda x, n=number: " ".join([*x.split(), ".5", ".5", ".5"][:n])  # noqa: E731
        yield of_object(f"{number} values", line(edit), WHERE, f"{number} values", label)
    for side, index in (("width", 3), ("height", 4)):
        kind = "box of zero or negative size"
        yield of_object(f"no {side}", word(index, "0"), WHERE, kind)
        yield of_object(f"tiny negative {side}", word(index, "-0.005"), WHERE, kind)
    yield of_object("separated by commas", line(lambda x: x.replace(" ", ",")), WHERE, label)
    yield of_object("a comment", line(lambda x: f"# {x}"), WHERE, label)
    yield of_object("a zero byte", line(lambda x: f"{x}\0"), WHERE, label)
    yield fine("new lines of Windows", text(LABELS, "\n", "\r\n", 9))
    yield fine("new lines of old Macs", text(LABELS, "\n", "\r", 9))
    yield fine("empty lines", text(LABELS, "\n", "\n\n \t\n", 9))
    yield fine("no new line at the end", line(lambda x: x))
    yield fine("tabs", text(LABELS, " ", "\t", 99))
    yield fine("spaces around", line(lambda x: f"   {x}   "))
    yield fine("byte order mark", lambda f: f.update({LABELS: b"\xef\xbb\xbf" + f[LABELS]}))
    yield fine(
        "no labels of an image",
        drop(LABELS),
        EVERYTHING - FIRST,
        "1 image without a file",
    )
    yield fine(
        "labels without image",
        put("labels/e.txt", "0 .5 .5 .1 .1"),
        said="of labels without an image",
    )
    yield fine("labels empty", put(LABELS, b""), EVERYTHING - FIRST)
    unread = "file of labels cannot be read"
    for name, data in (
        ("utf-16", "0 0.5 0.5 0.1 0.1".encode("utf-16")),
        ("latin-1", b"0 0.5 0.5 0.1 0.1 # \xe9"),
        ("random bytes", bytes((i * 7919) % 256 for i in range(3000))),
    ):
        yield of_image(f"labels {name}", put(LABELS, data), r"labels/a\.txt", unread)
    broken = "image cannot be read"
    for name, change in no_text("images/a.png"):
        yield of_image(f"image {name}", change, r"images/a\.png", broken)
    for percent in (10, 90):
        yield of_image(f"image cut at {percent} %", cut("images/a.png", percent), r"a\.png", broken)
    yield fine("image lost", drop("images/a.png"), EVERYTHING - FIRST, "such as labels/a")
    yield refused("no images", lambda f: [f.pop(f"images/{x}") for x in NAMES.values()], "no image")
    yield refused(
        "no labels", lambda f: [f.pop(f"labels/{x}.txt") for x in "abcd"], "file of labels"
    )
    yield from damaged(LABELS, 10)


def polygons() -> Iterator[Fault]:
    """Lines of polygons."""
    for index in (1, 8):
        yield from words_of_lines(index)
    label = "no YOLO label"
    for number in (2, 3, 4, 6, 8):
        edit = lambda x, n=number: " ".join(x.split()[:n])  # noqa: E731
        yield of_object(f"{number} values", line(edit), WHERE, f"{number} values", label)
    yield of_object("of one place", line(lambda _: "0" + " .5" * 8), WHERE, "box of zero")
    yield of_object("of a line", line(lambda _: "0 .1 .1 .2 .2 .3 .3"), WHERE, "empty mask")
    yield fine("closed", line(lambda x: f"{x} {' '.join(x.split()[1:3])}"))
    yield fine("other way round", line(_reversed))
    yield fine("exponents", text(LABELS, "0.5 ", "5.0e-1 "))
    yield from damaged(LABELS, 10)


def _reversed(line: str) -> str:
    first, *rest = line.split()
    pairs = [rest[i : i + 2] for i in range(0, len(rest), 2)]
    return " ".join([first, *(x for pair in pairs[::-1] for x in pair)])


def settings() -> Iterator[Fault]:
    """data.yaml, or what stands in its place."""
    this = partial(put, SETTINGS)
    for name, content, words in (
        ("a list", "- names\nnames\n", "YAML"),
        ("a text", "\nnames", "keys and values"),
        ("names null", "names:\n", "'names' must list"),
        ("names a number", "names: 3\n", "'names' must list"),
        ("names a text", "names: car\n", "'names' must list"),
        ("names empty", "names: []\n", "'names' must list"),
        ("names an empty object", "names: {}\n", "'names' must list"),
        ("names with null", "names: [car, ~]\n", "single word"),
        ("names with a list", "names: [car, [person]]\n", "single word"),
        ("names with an object", "names: [car, person: 1]\n", "single word"),
        ("names with an empty text", "names: [car, '']\n", "category without id or name"),
        ("names by text", "names: {a: car, b: person}\n", "class numbers"),
        ("names by negative numbers", "names: {-1: car, 0: person}\n", "class numbers"),
        ("names by fractions", "names: {0.5: car, 1: person}\n", "class numbers"),
        ("names by true", "names: {true: car, 0: person}\n", "class numbers"),
        ("names by number and text", "names: {0: car, '0': person}\n", "class number twice"),
        ("names by octal number", "names: {1: car, 001: person}\n", "class number twice"),
        ("names with no date", "names: [2001-02-31, person]\n", "cannot be read"),
        ("names of 5000 digits", f"names: [{'9' * 5000}, b]\n", "cannot be read"),
        ("names twice", "names: [car, car]\n", "car"),
        ("nc of another", "names: [car, person]\nnc: 3\n", "nc is 3, but 'names' has 2"),
        ("nc true", "names: [car, person]\nnc: true\n", "nc is True"),
        ("nc a text", "names: [car, person]\nnc: two\n", "nc is"),
        ("nc a fraction", "names: [car, person]\nnc: 2.5\n", "nc is"),
        ("train lost", "names: [car, person]\ntrain: lost\n", "train: there is no lost"),
        ("train a number", "names: [car, person]\ntrain: 3\n", "train: there is no 3"),
        ("train an object", "names: [car, person]\ntrain: {a: b}\n", "train: there is no"),
        ("train partly lost", "names: [car, person]\ntrain: [images, x]\n", "there is no x"),
        ("train with zero", 'names: [car, person]\ntrain: "a\\0b"\n', "there is no a"),
        ("train of 5000 letters", f"names: [car, person]\ntrain: {'a' * 5000}\n", "there is no a"),
        ("train a file", "names: [car, person]\ntrain: data.yaml\n", "data.yaml"),
        ("val lost", "names: [car, person]\ntrain: images\nval: lost\n", "val: there is no lost"),
        ("val alone", "names: [car, person]\nval: images\n", "no image to train on"),
        ("tabs", "names:\n\t- car\n", "line 2: cannot be read as YAML"),
        ("not closed", "names: [car, person\n", "cannot be read as YAML"),
        ("nested deeply", "names: " + "[" * 20_000, "YAML"),
        (
            "code",
            'names: !!python/object/apply:os.system ["touch trap"]\n',
            "cannot be read as YAML",
        ),
        ("code as a name", "names:\n- !!python/name:os.system\n- b\n", "cannot be read as YAML"),
        ("alias of nothing", "names: *lost\n", "cannot be read as YAML"),
        ("a huge alias", _bomb(), "single word|list the classes"),
        ("two documents", "names: [car, person]\n---\nnames: [a, b]\n", "cannot be read as YAML"),
    ):
        yield refused(name, this(content), r"data\.yaml|own", words)
    for name, content in (
        ("names by number", "names: {1: person, 0: car}\n"),
        ("names in lines", "names:\n- car\n- person\n"),
        ("nc", "nc: 2\nnames: [car, person]\n"),
        ("path of nowhere", "path: /nowhere\nnames: [car, person]\ntrain: images\n"),
        ("path a number", "path: 3\nnames: [car, person]\ntrain: images\n"),
        ("train as Roboflow has it", "names: [car, person]\ntrain: ../images\n"),
        ("test lost", "names: [car, person]\ntrain: images\ntest: lost\n"),
        ("keys of others", "names: [car, person]\ndownload: |\n  import os\nroboflow: {a: 1}\n"),
        ("keypoints malformed", "names: [car, person]\nkpt_shape: [a, b]\n"),
        ("more names", "names: [car, person, bus]\n"),
    ):
        yield fine(name, this(content))
    for names in (("no", "yes"), ("010", "1.10"), ("1", "true"), ("1e3", "2001-02-03")):
        change = this(f"names: [{', '.join(names)}]\n")
        outcome = Works(partial(_named, names))
        yield Fault(f"names {' and '.join(names)}", change, (outcome, outcome))
    byte_order_mark = both(lambda f: f.update({SETTINGS: b"\xef\xbb\xbf" + f[SETTINGS]}))
    yield fine("settings with a mark", byte_order_mark)
    unknown = "class 1, but the classes are 0 to 0"
    left = {n for n in EVERYTHING if THINGS[n].category == "car"}
    yield partly("one name", this("names: [car]\n"), left, "no YOLO label", unknown)
    for name, content, words in (
        ("classes.txt empty", "", "own"),
        ("classes.txt of one name", "car\n", unknown),
    ):
        change = both(drop(SETTINGS), put("classes.txt", content))
        yield refused(name, change, words) if not content else partly(name, change, left, words)
    yield fine("classes.txt", both(drop(SETTINGS), put("classes.txt", "car\nperson\n")))
    yield refused(
        "classes.txt latin-1", both(drop(SETTINGS), put("classes.txt", b"\xe9\n")), "UTF-8"
    )
    yield refused("no names", drop(SETTINGS), "but no names: write them into")
    listed = put("list.txt", "images/a.png\nimages/lost.png\n")
    there = "names: [car, person]\ntrain: list.txt\n"
    yield refused("list of a lost image", both(this(there), listed), r"list\.txt", "lost.png")
    whole = put("list.txt", "".join(f"./images/{x}\n" for x in NAMES.values()))
    yield fine("list of all images", both(this(there), whole))
    yield refused("list empty", both(this(there), put("list.txt", "")), "no image|own")
    yield refused(
        "list latin-1", both(this(there), put("list.txt", b"\xe9")), r"list\.txt", "UTF-8"
    )
    for name, change in no_text(SETTINGS):
        yield refused(f"settings {name}", change, "own|data.yaml")


def _named(names: tuple[str, ...], ran: Ran) -> None:
    """The classes have these names, as they were written."""
    content = json.loads((ran.folder / "out" / "data" / "custom_train.json").read_text())
    same(tuple(x["name"] for x in content["categories"]), names)


def _bomb() -> str:
    """Ten names that each stand for ten others, nine times over."""
    lines = [f"a0: &a0 [{', '.join(['x'] * 10)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join([*lines, "names: *a8", ""])


def cases() -> list[Case]:
    """All of them."""
    return [
        *cases_of("yolo", files, boxes()),
        *cases_of("yolo-polygons", partial(files, True), polygons()),
        *cases_of("yolo-settings", files, settings()),
    ]
