"""Folders of own data in the formats of other programs: valid ones, and what is changed in them.

A fault changes a line, a value or a whole file of a valid folder. What is accepted must be prepared
with exactly the objects that are left, and masks that are their rectangles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from maskdino.ops.rle import decode_segmentation
from tests.corpus.case import Case, Either, Outcome, Ran, Refused, Works
from tests.corpus.faults import same
from tests.corpus.scene import EVERYTHING, SIZE, THINGS, expected, prepared, write_images

Files = dict[str, bytes]  # content by path
Change = Callable[[Files], object]
WAYS = ("train-custom", "train-custom-skip")
LINES = 20  # of the list of what is wrong
FIRST = frozenset(number for number, thing in THINGS.items() if thing.image == 1)
WORDS = ("x", "nan", "-inf", "1e999", "0x10", "1,5", "--1", "1/2", "½", "null")


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, or only looks like it.

    Attributes:
        name: of it.
        change: of the files.
        outcomes: as they are, and with --skip-invalid.
    """

    name: str
    change: Change
    outcomes: tuple[Outcome, Outcome]


def kept(left: Collection[int] = EVERYTHING, said: str = "") -> Works:
    """The objects that are left are prepared, each with its mask if it has one."""

    def check(ran: Ran) -> None:
        same(prepared(ran.folder), expected(left))
        for path in (ran.folder / "out" / "data").glob("custom_*.json"):
            for x in json.loads(path.read_text())["annotations"]:
                if x.get("segmentation"):
                    x0, y0, width, height = map(round, x["bbox"])
                    mask = np.zeros(SIZE, bool)
                    mask[y0 : y0 + height, x0 : x0 + width] = True
                    assert (decode_segmentation(x["segmentation"], SIZE) == mask).all(), x

    return Works(check, said)


def fine(name: str, change: Change, left: Collection[int] = EVERYTHING, said: str = "") -> Fault:
    """Nothing is wrong."""
    return Fault(name, change, (kept(left, said), kept(left, said)))


def refused(name: str, change: Change, *words: str) -> Fault:
    """Nothing can be done with the data."""
    outcome = Refused(words, LINES)
    return Fault(name, change, (outcome, outcome))


def partly(name: str, change: Change, left: Collection[int], *words: str) -> Fault:
    """What is wrong is named, and can be left out; the last of the words is its kind."""
    return Fault(name, change, (Refused(words, LINES), kept(left, words[-1])))


def of_object(name: str, change: Change, *words: str, number: int = 2) -> Fault:
    """Something is wrong with one object."""
    return partly(name, change, EVERYTHING - {number}, *words)


def of_image(name: str, change: Change, *words: str) -> Fault:
    """Something is wrong with the first image, or all of its labels."""
    return partly(name, change, EVERYTHING - FIRST, *words)


def put(path: str, data: bytes | str) -> Change:
    """Writes another file in the place of one, or beside them."""
    return lambda files: files.update({path: data.encode() if isinstance(data, str) else data})


def drop(path: str) -> Change:
    """Removes a file."""
    return lambda files: files.pop(path)


def both(*changes: Change) -> Change:
    """One change after another."""
    return lambda files: [change(files) for change in changes]


def text(path: str, old: str, new: str, most: int = 1) -> Change:
    """Replaces a text where it is first, which must be there."""

    def change(files: Files) -> None:
        assert old.encode() in files[path], (path, old)
        files[path] = files[path].replace(old.encode(), new.encode("utf-8", "surrogatepass"), most)

    return change


def no_text(path: str) -> Iterator[tuple[str, Change]]:
    """Contents that no format has, each with a name."""
    yield "empty", put(path, b"")
    yield "zeros", put(path, bytes(200))
    yield "random bytes", put(path, bytes((i * 7919) % 256 for i in range(3000)))
    yield "html", put(path, b"<!DOCTYPE html><html></html>")
    yield "zip", put(path, b"PK\x03\x04\xff\xff")
    yield "lfs pointer", put(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n")


def cut(path: str, percent: int) -> Change:
    """Cuts a file off."""

    def change(files: Files) -> None:
        files[path] = files[path][: len(files[path]) * percent // 100]

    return change


def damaged(path: str, number: int) -> Iterator[Fault]:
    """Single bytes are others: it is refused, or works on what is still there."""
    outcome = Either((Refused((), LINES), Works()))

    def change(files: Files, seed: int) -> None:
        draw = random.Random(seed)
        data = bytearray(files[path])
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(len(data))] = draw.choice((0, 32, 45, 57, 60, 195, 255))
        files[path] = bytes(data)

    for seed in range(number):
        yield Fault(f"damage {seed}", partial(change, seed=seed), (outcome, outcome))


def _write(files: Callable[[], Files], change: Change, way: str, folder: Path) -> list[str]:
    content = files()
    for path in write_images(folder).iterdir():
        content[f"images/{path.name}"] = path.read_bytes()
        path.unlink()
    (folder / "images").rmdir()
    change(content)
    for name, data in content.items():
        path = folder / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    words = ["--data", folder / "own", "--weights", "none", "--output", folder / "out"]
    words += ["--epochs", 1, "--batch-size", 1]
    return [*map(str, words), *(["--skip-invalid"] if way.endswith("skip") else [])]


def cases_of(kind: str, files: Callable[[], Files], faults: Iterator[Fault]) -> list[Case]:
    """Each fault, with and without a mend."""
    return [
        Case(kind, way, fault.name, partial(_write, files, fault.change, way), outcome)
        for fault in faults
        for way, outcome in zip(WAYS, fault.outcomes, strict=True)
    ]
