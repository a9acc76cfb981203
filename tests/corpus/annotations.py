"""Malformed annotation files, for training, evaluation, and own data, with and without a mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.corpus import annotation_entries
from tests.corpus.case import Case, Outcome, Refused, Works
from tests.corpus.faults import (
    FILE,
    HUGE,
    WAYS,
    Fault,
    Spoil,
    drop,
    edit,
    fine,
    lists,
    of_image,
    of_own_data,
    refused,
    same,
    works,
)
from tests.corpus.scene import (
    EVERYTHING,
    content,
    custom_words,
    evaluation_words,
    expected,
    prepared,
    training_words,
    write_images,
)

KIND = "annotations"


def _valid() -> bytes:
    return json.dumps(content()).encode()


def files() -> Iterator[Fault]:
    """Files that are no JSON, or no annotations."""
    json_error = "cannot be read as JSON"
    for name, data in {
        "empty file": b"",
        "zeros": bytes(100),
        "one brace": b"{",
        "utf-16": _valid().decode().encode("utf-16"),
        "latin-1": _valid().replace(b"person", b"p\xe9rson"),
        "random bytes": bytes((i * 7919) % 256 for i in range(3000)),
        "zip": b"PK\x03\x04\xff\xff",
        "gzip": b"\x1f\x8b\x08\x00abc",
        "depth of lists": b"[" * 200_000,
        "depth of objects": b'{"a":' * 200_000,
        "deep annotations": b'{"images": [], "categories": [], "annotations": ' + b"[" * 200_000,
        "number of 5000 digits": _valid().replace(b'"id": 70', b'"id": ' + b"9" * 5000),
        "text behind the end": _valid() + b" and more",
        "two documents": _valid() + b"\n" + _valid(),
        "comments": b"// mine\n" + _valid(),
        "single quotes": _valid().replace(b'"', b"'"),
        "comma at the end": _valid()[:-1] + b",}",
        "html": b"<!DOCTYPE html><html></html>",
        "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "yaml": b"images:\n  - id: 1\n",
        "csv": b"image,label\na.png,car\n",
        "control character": _valid().replace(b"a.png", b"a\x01.png"),
    }.items():
        yield refused(name, data, json_error)
    for percent in (1, 10, 25, 50, 75, 90, 99):
        yield refused(f"cut at {percent} %", _valid()[: len(_valid()) * percent // 100], json_error)
    custom = {way: works(way, EVERYTHING) for way in ("train-custom", "train-custom-skip")}
    yield refused("byte order mark", b"\xef\xbb\xbf" + _valid(), "BOM", **custom)
    yield refused("no file", None, "no annotation file|does not exist")
    for name, data, word in (
        ("bare list", b"[]", "a bare list"),
        ("list of numbers", b"[1, 2]", "a bare list"),
        ("results", b'[{"image_id": 1, "score": 0.5}]', "results of a model"),
        ("number", b"3", "a single int"),
        ("text", b'"hello"', "a single str"),
        ("null", b"null", "a single NoneType"),
        ("true", b"true", "a single bool"),
        ("not a number", b"NaN", "a single float"),
        ("empty object", b"{}", "lacks images"),
        ("labelme", b'{"shapes": [], "imagePath": "a.png"}', "labelme"),
        ("geojson", b'{"type": "FeatureCollection", "features": []}', "it has type, features"),
    ):
        yield refused(name, data, word)


def whole_lists() -> Iterator[Fault]:
    """The three lists as a whole."""
    unlabelled = Works(said="no annotations|only written")
    for key in ("images", "annotations", "categories"):
        other = {"evaluate": unlabelled} if key == "annotations" else {}
        yield refused(f"{key} missing", lambda data, k=key: data.pop(k), f"lacks {key}", **other)
        for name, value in (
            ("null", None),
            ("number", 3),
            ("text", "none"),
            ("object", {"1": {}}),
            ("numbers", [1, 2]),
            ("lists", [[]]),
            ("nulls", [None]),
        ):
            yield refused(f"{key} {name}", lists(**{key: value}), f"'{key}' must be a list of obj")
    yield refused("no images", lists(images=[]), "no images|unknown image")
    yield refused("no annotations", lists(annotations=[]), "no objects", evaluate=Works())
    yield refused("no categories", lists(categories=[]), "no classes|0 classes|unknown category")
    yield refused(
        "crowds alone",
        lambda data: [x.update(iscrowd=1) for x in data["annotations"]],
        "no objects",
        evaluate=Works(),
    )
    segments = {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 1}]}
    yield refused("panoptic", lists(annotations=[segments]), "panoptic format|has isthing")
    yield fine(
        "more keys of the file", lists(info=None, licenses=None, mine={"a": [1]}, type="instances")
    )
    yield fine("info is a text", lists(info="made by hand"))


def categories() -> Iterator[Fault]:
    """Ids and names of categories."""
    for name, value in (
        ("null", None),
        ("a list", [3]),
        ("an object", {}),
        ("a fraction", 3.5),
        ("true", True),
    ):
        yield refused(
            f"id of category {name}", edit("categories", 0, id=value), "category without id"
        )
    yield refused("id of category missing", drop("categories", "id", 0), "category without id")
    yield refused("id of category twice", edit("categories", 0, id=70), "several categories", "70")
    yield refused(
        "id of category infinite", edit("categories", 0, id=float("inf")), "category without"
    )
    for name, value in (("empty", ""), ("null", None), ("a list", ["car"]), ("an object", {})):
        word = "category without id or name"
        yield refused(f"category name {name}", edit("categories", 0, name=value), word)
    yield refused(
        "category name missing", drop("categories", "name", 0), "category without id or n"
    )
    yield of_own_data("category name a number", edit("categories", 0, name=7), "name 7: no text")
    yield fine("category name of many letters", edit("categories", 0, name="ж" * 3000))
    yield fine("category of more keys", edit("categories", 0, supercategory=None, color=3))
    more = {"id": 9, "name": "bus"}
    yield refused(
        "another category",
        lambda data: data["categories"].append(more),
        "has 3 classes, but MODEL.MASK_DINO.NUM_CLASSES is 2",
        train=Refused(("has 3 classes", "NUM_CLASSES is 2")),
        evaluate=Refused(("has 3 classes", "NUM_CLASSES is 2")),
        train_custom=Works(),
        train_custom_skip=Works(),
    )

    def renumber(*ids: object) -> Spoil:
        def change(data: dict) -> None:
            new = dict(zip((3, 70), ids, strict=True))
            for category in data["categories"]:
                category["id"] = new[category["id"]]
            for annotation in data["annotations"]:
                annotation["category_id"] = new[annotation["category_id"]]

        return change

    yield fine("category ids from 0", renumber(0, 1))
    yield fine("category ids negative", renumber(-5, -2))
    yield fine("category ids large", renumber(2**31 + 1, 2**31 + 2))
    yield fine("category ids of 30 digits", renumber(10**30, 10**30 + 1))
    yield fine("category ids texts", renumber("a", "b"))
    yield of_own_data("category ids of both kinds", renumber(3, "b"), "numbers and texts", "3, 'b'")


def images() -> Iterator[Fault]:
    """Ids, names and sizes of images."""
    first = partial(edit, "images", 0)
    for name, value in (
        ("null", None),
        ("a list", [1]),
        ("an object", {}),
        ("a fraction", 1.5),
        ("true", True),
        ("not a number", float("nan")),
    ):
        yield of_image(f"id of image {name}", first(id=value), "image without id", **_orphans())
    yield of_image("id of image missing", drop("images", "id", 0), "without id", **_orphans())
    left = EVERYTHING - {1, 2, 3, 4}
    yield of_image(
        "id of image twice",
        first(id=2),
        "image 2",
        "several images with one id",
        train_custom_skip=works("train-custom-skip", left),
    )
    yield fine("image twice", _repeat_image, **_repeated())
    for name, value in (
        ("null", None),
        ("empty", ""),
        ("a number", 5),
        ("a list", ["a.png"]),
        ("true", True),
    ):
        yield of_image(f"file name {name}", first(file_name=value), "image 1", "without file name")
    yield of_image("file name missing", drop("images", "file_name", 0), "image 1", "without file n")
    for name, value in (
        ("lost", "lost.png"),
        ("of a folder", "folder"),
        ("of the folder of the images", "."),
        ("in a lost folder", "x/a.png"),
        ("below a file", "a.png/b.png"),
        ("with zero", "a\0.png"),
        ("of 300 letters", "a" * 300 + ".png"),
        ("with backslash", "images\\a.png"),
        ("of another computer", "C:\\data\\a.png"),
        ("lone surrogate", "\ud800.png"),
    ):
        where = "not in|image 1|images.folder is a folder"
        plain = Refused((where,))
        spoil = first(file_name=value)
        yield of_image(f"file name {name}", spoil, where, train=plain, evaluate=plain)
    for side in ("height", "width"):
        word = "image without height and width"
        yield of_image(f"{side} missing", drop("images", side, 0), "image 1 ", word)
        for name, value in (
            ("null", None),
            ("a text", "48"),
            ("zero", 0),
            ("negative", -48),
            ("a fraction", 48.5),
            ("not a number", float("nan")),
            ("infinite", float("inf")),
            ("a list", [48]),
            ("true", True),
            ("of 400 digits", HUGE),
        ):
            yield of_image(f"{side} {name}", first(**{side: value}), "image 1 ", word)
    swapped = "another size|mismatch|[Ss]ize"
    yield of_image(
        "sides swapped",
        first(height=64, width=48),
        swapped,
        train=Refused((r"a\.png", "48", "64")),
        evaluate=Refused((r"a\.png", "48", "64")),
    )
    yield of_image(
        "sides huge",
        first(height=10**12, width=10**12),
        swapped,
        train=Refused((r"a\.png", "1000000000000")),
        evaluate=Refused((r"a\.png", "1000000000000")),
    )
    yield fine("sides like 48.0", first(height=48.0, width=64.0))
    yield fine("image of more keys", first(license=None, coco_url=3, date_captured=[]))

    def renumber(*ids: object) -> Spoil:
        def change(data: dict) -> None:
            for image in data["images"]:
                image["id"] = ids[image["id"] - 1]
            for annotation in data["annotations"]:
                annotation["image_id"] = ids[annotation["image_id"] - 1]

        return change

    yield fine("image ids texts", renumber("a", "b", "c", "d"))
    kinds = renumber(1, "1", "b", 2)
    yield of_own_data("image ids of both kinds", kinds, "numbers and texts: \\[1, '1', 'b', 2")
    yield fine("image ids large", renumber(2**40, 2**40 + 1, 2**61, 7))
    yield fine("image ids negative", renumber(-1, 0, 1, 2))
    yield fine("image ids of 30 digits", renumber(10**30, 10**30 + 1, 3, 4))


def _repeat_image(data: dict) -> None:
    data["images"].append(dict(data["images"][0]))


def _repeated() -> dict[str, Outcome]:
    again = Refused((FILE, "several images with one id", "image 1"), lines=20)
    return {"train": again, "evaluate": again, "train_custom": again}


def _orphans() -> dict[str, Outcome]:
    """Of an image without id, the objects have none; after --skip-invalid both are gone."""
    left = EVERYTHING - {1, 2}
    return {"train_custom_skip": Works(lambda ran: same(prepared(ran.folder), expected(left)))}


def faults() -> list[Fault]:
    """All of them."""
    groups = (files, whole_lists, categories, images, *annotation_entries.GROUPS)
    return [fault for group in groups for fault in group()]


def _write(fault: Fault, way: str, folder: Path) -> list[str]:
    path = folder / "bad.json"
    (write_images(folder) / "folder").mkdir()
    if isinstance(fault.spoil, bytes):
        path.write_bytes(fault.spoil)
    elif fault.spoil is not None:
        data: dict[str, Any] = content()
        fault.spoil(data)
        path.write_text(json.dumps(data), encoding="utf-8")
    if way == "train":
        return training_words(folder, path)
    if way == "evaluate":
        return evaluation_words(folder, path)
    return custom_words(folder, path, *(["--skip-invalid"] if way.endswith("skip") else []))


def cases() -> list[Case]:
    """Every fault on every way."""
    return [
        Case(KIND, way, fault.name, partial(_write, fault, way), fault.outcomes[way])
        for fault in faults()
        for way in WAYS
    ]
