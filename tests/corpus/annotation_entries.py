"""What may be wrong with an annotation: its ids and flags, box, polygons, run lengths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.corpus.case import Works
from tests.corpus.faults import (
    HUGE,
    Fault,
    Spoil,
    drop,
    edit,
    fine,
    of_object,
    of_own_data,
    refused,
    rle,
    tolerable,
    works,
)
from tests.corpus.scene import EVERYTHING, SIZE, THINGS

AREA = SIZE[0] * SIZE[1]


def objects() -> Iterator[Fault]:
    """Ids, classes and flags of annotations."""
    skip = works("train-custom-skip", EVERYTHING - {2})
    for name, value in (
        ("null", None),
        ("a list", [2]),
        ("an object", {}),
        ("a fraction", 2.5),
        ("true", True),
        ("not a number", float("nan")),
    ):
        yield refused(
            f"id {name}", edit("annotations", id=value), "without id", train_custom_skip=skip
        )
    yield refused("id missing", drop("annotations", "id"), "without id", train_custom_skip=skip)
    yield of_object(
        "id twice",
        edit("annotations", 1, id=1),
        "several annotations with one id",
        number=1,
        train_custom_skip=skip,
    )

    def numbered(first: int) -> Spoil:
        return lambda data: [x.update(id=first + i) for i, x in enumerate(data["annotations"])]

    yield fine("ids from 0", numbered(0))
    yield fine("ids negative", numbered(-3))
    yield fine("ids large", numbered(2**40))
    yield fine("ids of 30 digits", numbered(10**30))
    yield fine("ids texts", lambda data: [x.update(id=f"n{x['id']}") for x in data["annotations"]])
    for key, word in (("image_id", "unknown image"), ("category_id", "unknown category")):
        for name, value in (
            ("null", None),
            ("unknown", 12345),
            ("a text", "1"),
            ("a list", [1]),
            ("an object", {"id": 1}),
            ("a fraction", 1.5),
            ("like 3.0", 3.0),
            ("true", True),
            ("not a number", float("nan")),
            ("of 400 digits", HUGE),
        ):
            yield of_object(f"{key} {name}", edit("annotations", **{key: value}), word)
        yield of_object(f"{key} missing", drop("annotations", key), word)
    for name, value in (
        ("no", "no"),
        ("0 as text", "0"),
        ("2", 2),
        ("-1", -1),
        ("a list", [0]),
        ("an object", {}),
        ("a fraction", 0.5),
        ("not a number", float("nan")),
    ):
        word = "iscrowd is neither 0 nor 1"
        yield of_object(f"iscrowd {name}", edit("annotations", iscrowd=value), word)
    yield fine("iscrowd null", edit("annotations", iscrowd=None))
    yield fine("iscrowd false", edit("annotations", iscrowd=False))
    yield fine("iscrowd missing", drop("annotations", "iscrowd"))
    crowd = EVERYTHING - {3}
    yield fine("iscrowd true", edit("annotations", 2, iscrowd=True), crowd)
    yield fine("iscrowd 1", edit("annotations", 2, iscrowd=1), crowd)
    for name, value in (
        ("a text", "3"),
        ("negative", -3),
        ("not a number", float("nan")),
        ("infinite", float("inf")),
        ("a list", [3]),
        ("of 400 digits", HUGE),
    ):
        yield of_object(f"area {name}", edit("annotations", area=value), "area")
    yield fine("area missing", drop("annotations", "area"))
    yield fine("area of another", edit("annotations", area=1))
    yield fine("more keys", edit("annotations", attributes=None, score="high", caption=3))
    yield of_own_data(
        "keypoints a number", edit("annotations", keypoints=3), "tion 2: keypoints are 3"
    )
    yield of_own_data("ignored", edit("annotations", ignore=1), "annotation 2: ignore is 1")
    yield fine("area null", edit("annotations", area=None))


def boxes() -> Iterator[Fault]:
    """Boxes."""
    word = "box is not four numbers"
    for name, value in (
        ("of 3", [1, 2, 3]),
        ("of 5", [1, 2, 3, 4, 5]),
        ("of texts", ["1", "2", "3", "4"]),
        ("of lists", [[1], [2], [3], [4]]),
        ("with null", [1, 2, None, 4]),
        ("with true", [1, 2, True, 4]),
        ("not a number", [1, 2, float("nan"), 4]),
        ("infinite", [1, 2, float("inf"), 4]),
        ("of 400 digits", [0, 0, HUGE, 5]),
        ("a text", "1 2 3 4"),
        ("a number", 5),
        ("an object", {"x": 1}),
        ("true", True),
    ):
        yield of_object(f"box {name}", edit("annotations", bbox=value), word)
    x0, y0, x1, y1 = THINGS[2].box
    for name, box in (
        ("of no width", [x0, y0, 0, 5]),
        ("of no height", [x0, y0, 5, 0]),
        ("of negative width", [x1, y0, x0 - x1, y1 - y0]),
    ):
        word = "box of zero or negative size"
        mask = works("train", EVERYTHING, word)  # whose own box takes the place of the wrong one
        yield tolerable(f"box {name}", edit("annotations", bbox=box), word, train=mask)
        bare = edit("annotations", bbox=box, segmentation=[])
        yield tolerable(f"box {name}, no mask", bare, word)
    for name, box in (("right", [3000, 3, 5, 5]), ("above", [3, -50, 5, 5])):
        spoil = edit("annotations", bbox=box)
        mask = works("train", EVERYTHING, "box outside")
        yield tolerable(f"box {name} of the image", spoil, "box outside", train=mask)
        bare = edit("annotations", bbox=box, segmentation=[])
        yield tolerable(f"box {name} of the image, no mask", bare, "box outside")
    yield of_object(
        "box null, no mask", edit("annotations", bbox=None, segmentation=None), "neither"
    )
    yield of_object("box and mask empty", edit("annotations", bbox=[], segmentation=[]), "neither")

    def no_box_no_mask(data: dict) -> None:
        data["annotations"][1].pop("bbox")
        data["annotations"][1].pop("segmentation")

    yield of_object("neither box nor mask", no_box_no_mask, "neither")
    for name, value in (("null", None), ("empty", [])):
        spoil = edit("annotations", bbox=value)
        yield of_own_data(f"box {name}", spoil, "annotation 2: bbox is .*leave the key out")
    yield fine("box missing", drop("annotations", "bbox"))

    def no_box_no_area(data: dict) -> None:
        data["annotations"][1].pop("bbox")
        data["annotations"][1].pop("area")

    yield fine("box and area missing", no_box_no_area)
    yield fine("box of fractions", edit("annotations", bbox=[32.0, 16.0, 24.0, 24.0]))


def polygons() -> Iterator[Fault]:
    """Polygons, of the second object."""
    good = THINGS[2].annotation(2)["segmentation"][0]
    for name, value, word in (
        ("a number", 3, "mask is malformed"),
        ("a text", "polygon", "mask is malformed"),
        ("true", True, "mask is malformed"),
        ("flat", good, "in a list of its own"),
        ("of texts", [[*map(str, good)]], "list of numbers"),
        ("of pairs", [[[32, 16], [56, 16], [56, 40]]], "list of numbers"),
        ("with null", [[*good[:7], None]], "list of numbers"),
        ("with true", [[*good[:7], True]], "list of numbers"),
        ("with an object", [[*good[:7], {}]], "list of numbers"),
        ("null", [None], "list of numbers"),
        ("an object", [{"x": 1}], "list of numbers"),
        ("not a number", [[*good[:7], float("nan")]], "list of numbers"),
        ("infinite", [[*good[:7], float("inf")]], "list of numbers|beyond"),
        ("of 400 digits", [[*good[:7], HUGE]], "list of numbers"),
        ("far away", [[*good[:7], 1e9]], "beyond 100000 pixels"),
        ("far away, negative", [[*good[:7], -1e9]], "beyond 100000 pixels"),
        ("beside run lengths", [good, {"size": [*SIZE], "counts": [AREA]}], "list of numbers"),
    ):
        yield of_object(f"polygon {name}", edit("annotations", segmentation=value), word)
    points = "polygon without 3 whole points"
    for name, value in (
        ("empty", [[]]),
        ("of 1 point", [[1, 2]]),
        ("of 2 points", [[1, 2, 30, 40]]),
    ):
        yield tolerable(f"polygon {name}", edit("annotations", segmentation=value), points)
    yield tolerable("polygon of 7 numbers", edit("annotations", segmentation=[good[:7]]), points)
    empty = "empty mask"
    for name, value in (
        ("of one place", [[5, 5] * 4]),
        ("right of the image", [[900, 10, 950, 10, 950, 40, 900, 40]]),
        ("above the image", [[3, -90, 30, -90, 30, -50, 3, -50]]),
    ):
        yield tolerable(
            f"polygon {name}",
            edit("annotations", segmentation=value),
            empty,
            train=works("train", EVERYTHING - {2}),
            evaluate=Works(),
        )
    yield fine("two polygons", edit("annotations", segmentation=[good, good]))
    around = [x + (8 if i % 2 else 0) for i, x in enumerate(good)]
    yield fine("polygon of fractions", edit("annotations", segmentation=[[x + 0.0 for x in good]]))
    yield fine("polygon closed", edit("annotations", segmentation=[[*good, *good[:2]]]))
    assert around != good


def run_lengths() -> Iterator[Fault]:
    """Run lengths, of the third object."""
    this = partial(of_object, number=3)
    for name, values, word in (
        ("size missing", {"size": None}, "run lengths of"),
        ("size swapped", {"size": [64, 48]}, r"\[64, 48\]"),
        ("size of another", {"size": [480, 640]}, r"\[480, 640\]"),
        ("size negative", {"size": [-48, 64]}, r"\[-48, 64\]"),
        ("size of texts", {"size": ["48", "64"]}, "'48'"),
        ("size of one", {"size": [48]}, r"\[48\]"),
        ("size of three", {"size": [48, 64, 1]}, r"\[48, 64, 1\]"),
        ("size a number", {"size": 48}, "48"),
        ("size huge", {"size": [10**12, 10**12]}, "1000000000000"),
        ("counts null", {"counts": None}, "without counts"),
        ("counts a number", {"counts": 3}, "without counts"),
        ("counts true", {"counts": True}, "without counts"),
        ("counts an object", {"counts": {}}, "without counts"),
        ("counts empty", {"counts": []}, "add up to 0"),
        ("counts short", {"counts": [3, 4]}, "add up to 7"),
        ("counts long", {"counts": [3, AREA]}, f"add up to {AREA + 3}"),
        ("counts negative", {"counts": [-5, AREA + 5]}, "not negative"),
        ("counts of fractions", {"counts": [0.5, AREA - 0.5]}, "must be integers"),
        ("counts of texts", {"counts": ["3", "4"]}, "must be integers"),
        ("counts of lists", {"counts": [[3], [4]]}, "must be integers"),
        ("counts of null", {"counts": [None]}, "must be integers"),
        ("counts of true", {"counts": [True, AREA - 1]}, "must be integers"),
        ("counts not a number", {"counts": [float("nan")]}, "must be integers"),
        ("counts beyond 32 bits", {"counts": [2**32 + 5, 5]}, "add up to 4294967306"),
        ("counts of 400 digits", {"counts": [HUGE]}, "add up to|integers"),
        ("text empty", {"counts": ""}, "add up to 0"),
        ("text short", {"counts": "?"}, "add up to 15"),
        ("text cut off", {"counts": "?o"}, "end within a number"),
        ("text of spaces", {"counts": "   "}, "' '"),
        ("text of others", {"counts": "жж"}, "character"),
        ("text with new line", {"counts": "?\n"}, "character"),
        ("text negative", {"counts": "O"}, "not negative"),
        ("text of a huge number", {"counts": "o" * 400_000 + "0"}, "too large|add up to"),
    ):
        yield this(f"run lengths, {name}", rle(**values), word)
    empty = {"number": 3, "train": works("train", EVERYTHING - {3})}
    yield tolerable("run lengths of nothing", rle(counts=[AREA]), "empty mask", **empty)
    yield this("run lengths without both", edit("annotations", 2, segmentation={"a": 1}), "run len")
    said = works("evaluate", EVERYTHING, "annotation 3 of image 2")  # neither found nor missed
    for name, value in (("null", None), ("an empty list", []), ("an empty object", {})):
        spoil = edit("annotations", 2, segmentation=value)
        yield fine(f"mask {name}", spoil, evaluate=said)
    yield fine("mask missing", drop("annotations", "segmentation", 2), evaluate=said)
    yield fine("run lengths with zeros", rle(counts=_with_zeros(THINGS[3].counts())))
    yield fine("run lengths of more keys", rle(mine=3))


def _with_zeros(counts: list[int]) -> list[int]:
    return [counts[0] - 1, 0, 1, *counts[1:]]


GROUPS = (objects, boxes, polygons, run_lengths)
