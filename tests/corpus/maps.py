"""Spoiled maps: COCO's panoptic JSON with its PNG files, and PNG files of classes.

Shape key: H, W pixels of an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from maskdino.data import register_panoptic_folder, register_semantic_folder
from maskdino.data.reading import colors_of_ids
from tests.corpus.case import Case, Outcome, Ran, Refused, Works, by_way
from tests.corpus.faults import HUGE, same
from tests.corpus.own_data import no_text
from tests.corpus.scene import (
    CATEGORIES,
    CLASSES,
    NAME,
    NAMES,
    SIZE,
    STUFF,
    THINGS,
    command_words,
    expected,
    segment_map,
    trained_on,
    write_images,
)

WAYS = ("train", "evaluate")
JSON = "panoptic.json"
MAP = "maps/a.png"
WHOLE = (0, 0, SIZE[1], SIZE[0])
KINDS = ("panoptic", "semantic")


@dataclass
class Maps:
    """What is written: the content of the JSON file, and files by path."""

    content: dict
    files: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


Spoil = Callable[[Maps], object]


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, or only looks like it."""

    name: str
    spoil: Spoil
    outcomes: dict[str, Outcome]


def valid(kind: str) -> Maps:
    """Nothing wrong."""
    images, annotations, arrays = [], [], {}
    for number, name in NAMES.items():
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        ids, classes = segment_map(number)
        segments = [
            {"id": i, "category_id": CATEGORIES[THINGS[i].category] if i in THINGS else STUFF[1]}
            for i in np.unique(ids).tolist()
        ]
        areas = {i: int((ids == i).sum()) for i in np.unique(ids).tolist()}
        segments = [{**x, "iscrowd": 0, "area": areas[x["id"]]} for x in segments]
        annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
        arrays[f"maps/{name}"] = colors_of_ids(ids) if kind == "panoptic" else classes
    kinds = [{"id": i, "name": name, "isthing": int(i != STUFF[1])} for name, i in CLASSES.items()]
    content = {"images": images, "annotations": annotations, "categories": kinds}
    return Maps(content, arrays=arrays)


def kept(kind: str, way: str) -> Works:
    """All is learned, or found."""

    def trained(_: Ran) -> None:
        stuff = [(name, len(CATEGORIES), WHOLE) for name in NAMES.values()]
        things = expected(THINGS)
        if kind == "semantic":  # one object for each class of an image; each has one of both
            things = sorted(things)
        same(trained_on(kind, len(CLASSES)), sorted(things + stuff))

    def measured(ran: Ran) -> None:
        results = json.loads((ran.folder / "out" / "inference" / "results.json").read_text())
        name, metric = ("panoptic_seg", "PQ") if kind == "panoptic" else ("sem_seg", "mIoU")
        same(round(results[name][metric], 3), 100.0)

    return Works(trained if way == "train" else measured)


def fine(kind: str, name: str, spoil: Spoil, **other: Outcome) -> Fault:
    """Nothing is wrong."""
    return Fault(name, spoil, {way: kept(kind, way) for way in WAYS} | by_way(other))


def refused(name: str, spoil: Spoil, *words: str, **other: Outcome) -> Fault:
    """Nothing can be done."""
    return Fault(name, spoil, {way: Refused(words) for way in WAYS} | by_way(other))


def put(path: str, data: bytes) -> Spoil:
    """Another file in the place of one."""
    return lambda maps: maps.files.update({path: data})


def edit(kind: str, **values: object) -> Spoil:
    """Changes the first entry of a list."""
    return lambda maps: maps.content[kind][0].update(values)


def drop(kind: str, key: str) -> Spoil:
    """Removes a key of the first entry of a list."""
    return lambda maps: maps.content[kind][0].pop(key)


def segment(**values: object) -> Spoil:
    """Changes the first segment of the first image, the car or person of number 1."""
    return lambda maps: maps.content["annotations"][0]["segments_info"][0].update(values)


def array(change: Callable[[np.ndarray], np.ndarray], path: str = MAP) -> Spoil:
    """Changes the first map."""
    return lambda maps: maps.arrays.update({path: change(maps.arrays[path])})


def encoded(mode: str) -> Spoil:
    """The first map in another mode of Pillow."""

    def change(maps: Maps) -> None:
        maps.arrays[MAP] = Image.fromarray(maps.arrays[MAP]).convert(mode)  # type: ignore[assignment]

    return change


def broken_maps(where: str) -> Iterator[Fault]:
    """PNG files that are none, or of another size."""
    for name, change in no_text(MAP):
        found: dict[str, bytes] = {}
        change(found)
        yield refused(f"map {name}", put(MAP, found[MAP]), where, "cannot read|cannot identify")
    low, narrow, pixel = np.s_[:-3], np.s_[:, 3:], np.s_[:1, :1]
    for name, part in (("low", low), ("narrow", narrow), ("of a pixel", pixel)):
        spoil = array(lambda x, part=part: x[part])
        yield refused(f"map {name}", spoil, where, "48, 64|no pixel")
    yield refused("map cut", _cut, where)


def _cut(maps: Maps) -> None:
    noise = np.random.default_rng(0).integers(0, 2, SIZE, np.uint8)
    path = Path("cut.png")
    Image.fromarray(noise).save(path)
    maps.files[MAP] = path.read_bytes()[:-200]


def panoptic_files() -> Iterator[Fault]:
    """The JSON file as a whole, and its lists."""
    for name, change in no_text(JSON):
        found: dict[str, bytes] = {}
        change(found)
        yield refused(f"file {name}", put(JSON, found[JSON]), r"panoptic\.json", "JSON")
    for name, data in (
        ("a number", b"3"),
        ("a list", b"[]"),
        ("null", b"null"),
        ("an empty object", b"{}"),
        ("cut", b'{"images": ['),
        ("depth", b"[" * 200_000),
        ("a number of 5000 digits", b'{"images": [' + b"9" * 5000 + b"]}"),
    ):
        yield refused(f"file {name}", put(JSON, data), r"panoptic\.json")
    for key in ("images", "annotations"):
        for name, value in (
            ("null", None),
            ("a number", 3),
            ("a text", "x"),
            ("numbers", [1]),
            ("nulls", [None]),
            ("empty", []),
        ):
            spoil = lambda maps, k=key, v=value: maps.content.update({k: v})  # noqa: E731
            yield refused(f"{key} {name}", spoil, r"panoptic\.json")
        missing = lambda maps, k=key: maps.content.pop(k)  # noqa: E731
        yield refused(f"{key} missing", missing, r"panoptic\.json", key)
    yield fine("panoptic", "more keys", lambda maps: maps.content.update(info=None, licenses=3))


def panoptic_entries() -> Iterator[Fault]:
    """Images and annotations."""
    for name, value in (("null", None), ("a list", [1]), ("an object", {}), ("unknown", 99)):
        yield refused(f"id of image {name}", edit("images", id=value), r"panoptic\.json")
        yield refused(f"image_id {name}", edit("annotations", image_id=value), r"panoptic\.json")
    yield refused("id of image missing", drop("images", "id"), r"panoptic\.json", "id")
    yield refused(
        "image_id missing", drop("annotations", "image_id"), r"panoptic\.json", "image_id"
    )
    yield refused("id of image twice", edit("images", id=2), r"panoptic\.json")
    twice = lambda maps: maps.content["annotations"].append(maps.content["annotations"][0])  # noqa: E731
    yield refused("annotation twice", twice, r"panoptic\.json", "1")
    for kind, word in (("images", "image"), ("annotations", "map")):
        for name, value in (
            ("null", None),
            ("a number", 5),
            ("a list", ["a.png"]),
            ("empty", ""),
            ("lost", "lost.png"),
            ("with zero", "a\0.png"),
            ("of 5000 letters", "a" * 5000 + ".png"),
            ("outside", "../../a.png"),
            ("absolute", "/etc/passwd"),
        ):
            yield refused(f"{word} name {name}", edit(kind, file_name=value))
        yield refused(f"{word} name missing", drop(kind, "file_name"), r"panoptic\.json|file_name")
    for name, value in (("null", None), ("a text", "48"), ("of another", 47), ("huge", 10**12)):
        yield refused(f"height {name}", edit("images", height=value), "a.png|panoptic")
    yield refused("height missing", drop("images", "height"), r"panoptic\.json", "height")
    for name, value in (("null", None), ("a number", 3), ("a text", "x"), ("numbers", [1])):
        spoil = edit("annotations", segments_info=value)
        yield refused(f"segments {name}", spoil, r"panoptic\.json")
    yield refused("segments missing", drop("annotations", "segments_info"), "panoptic", "segments")


def panoptic_segments() -> Iterator[Fault]:
    """Segments and maps."""
    for name, value in (
        ("null", None),
        ("a text", "1"),
        ("a list", [1]),
        ("a fraction", 1.5),
        ("true", True),
        ("not a number", float("nan")),
        ("0", 0),
        ("negative", -1),
        ("of 2**24", 1 << 24),
        ("of 400 digits", HUGE),
        ("of another", 2),
        ("unknown", 4711),
    ):
        yield refused(f"segment id {name}", segment(id=value), r"a\.png|panoptic\.json", "id|segm")
    for name, value in (
        ("null", None),
        ("a text", "3"),
        ("a list", [3]),
        ("unknown", 12345),
        ("true", True),
        ("of 400 digits", HUGE),
    ):
        spoil = segment(category_id=value)
        yield refused(f"category_id {name}", spoil, r"a\.png|panoptic\.json")
    for key in ("id", "category_id"):
        spoil = lambda m, k=key: m.content["annotations"][0]["segments_info"][0].pop(k)  # noqa: E731
        yield refused(f"segment without {key}", spoil, r"a\.png|panoptic\.json", key)
    for name, value in (("a text", "no"), ("2", 2), ("a list", [0]), ("null", None)):
        yield refused(f"iscrowd {name}", segment(iscrowd=value), "iscrowd")
    missing = lambda m: m.content["annotations"][0]["segments_info"][0].pop("iscrowd")  # noqa: E731
    yield fine("panoptic", "iscrowd missing", missing)
    yield fine("panoptic", "iscrowd false", segment(iscrowd=False))
    yield fine("panoptic", "more keys of a segment", segment(bbox=None, mine=3))
    for name, value in (("null", None), ("a text", "3"), ("negative", -3), ("true", True)):
        wrong = Refused((r"panoptic\.json", "area"))
        spoil = segment(area=value)
        yield fine("panoptic", f"area {name}", spoil, evaluate=wrong)
    for key in ("id", "name", "isthing"):
        wrong = Refused((r"panoptic\.json", "category"))
        yield fine("panoptic", f"category without {key}", drop("categories", key), evaluate=wrong)
    yield from broken_maps(r"maps/a\.png")
    yield refused("map in gray", encoded("L"), r"a\.png")
    yield fine("panoptic", "map with alpha", encoded("RGBA"))
    yield refused("map of nothing", array(lambda x: x * 0), r"a\.png", "no pixel of the segments")


def semantic() -> Iterator[Fault]:
    """Maps of classes."""
    this = partial(fine, "semantic")
    yield from broken_maps(r"maps/a\.png")

    def pixel(value: int) -> Spoil:
        def change(labels: np.ndarray) -> np.ndarray:
            labels[3, 4] = value
            return labels

        return array(change)

    for value in (3, 100, 254):
        yield refused(f"class {value}", pixel(value), r"maps/a\.png", rf"\[{value}\]")
    yield this("a pixel ignored", pixel(255))
    for mode in ("RGB", "RGBA", "LA", "1"):
        yield refused(f"mode {mode}", encoded(mode), r"maps/a\.png", "one channel of 8 bits")
    wide = array(lambda x: x.astype(np.uint16) * 257)
    yield refused("16 bits", wide, r"maps/a\.png", "one channel of 8 bits")
    yield this("palette", _palette)
    lost = lambda maps: maps.arrays.pop(MAP)  # noqa: E731
    said = dict.fromkeys(WAYS, Works(said="intersection of 3 files"))  # detectron2's warning
    yield Fault("map lost", lost, said)
    extra = lambda maps: maps.arrays.update({"maps/e.png": maps.arrays[MAP]})  # noqa: E731
    said = dict.fromkeys(WAYS, Works(said="intersection of 4 files"))
    yield Fault("map without image", extra, said)
    for name in ("a.txt", "Thumbs.db", ".DS_Store"):
        yield this(f"{name} beside", put(f"maps/{name}", b"mine"))
    none = lambda maps: maps.arrays.clear()  # noqa: E731
    yield refused("no maps", none, "maps holds no PNG")
    for name, change in no_text("images/a.png"):
        found: dict[str, bytes] = {}
        change(found)
        spoil = put("images/a.png", found["images/a.png"])
        yield refused(f"image {name}", spoil, r"images/a\.png")


def _palette(maps: Maps) -> None:
    image = Image.fromarray(maps.arrays[MAP])
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    maps.arrays[MAP] = image  # type: ignore[assignment]


def _write(kind: str, fault: Fault, way: str, folder: Path) -> list[str]:
    maps = valid(kind)
    fault.spoil(maps)
    write_images(folder)
    (folder / "maps").mkdir()
    for path, pixels in maps.arrays.items():
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(folder / path)
    if kind == "panoptic":
        (folder / JSON).write_text(json.dumps(maps.content))
    for path, data in maps.files.items():
        (folder / path).write_bytes(data)
    images, place = folder / "images", folder / "maps"
    if kind == "panoptic":
        categories = valid(kind).content["categories"]
        register_panoptic_folder(NAME, folder / JSON, images, place, categories)
    else:
        register_semantic_folder(NAME, place, images, list(CLASSES), image_ext="png")
    task = {"panoptic": "PANOPTIC_ON", "semantic": "SEMANTIC_ON"}[kind]
    words = ["INPUT.DATASET_MAPPER_NAME", kind, f"MODEL.MASK_DINO.TEST.{task}", "True"]
    words += ["MODEL.MASK_DINO.TEST.INSTANCE_ON", "False", "MODEL.MASK_DINO.NUM_CLASSES", "3"]
    return command_words(folder, way == "evaluate", *words)


def cases() -> list[Case]:
    """Every fault, in training and evaluation."""
    groups: dict[str, tuple[Callable[[], Iterator[Fault]], ...]] = {
        "panoptic": (panoptic_files, panoptic_entries, panoptic_segments),
        "semantic": (semantic,),
    }
    return [
        Case(kind, way, fault.name, partial(_write, kind, fault, way), fault.outcomes[way])
        for kind in KINDS
        for group in groups[kind]
        for fault in group()
        for way in WAYS
    ]
