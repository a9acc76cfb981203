"""Errors in annotations of COCO's format: one check for own data and for registered datasets."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pycocotools import mask as mask_util

from maskdino.ops.rle import counts_of_text, encode_segmentation
from maskdino.system.words import counted

MALFORMED, NO_PIXEL = "mask is malformed", "no pixel of the image belongs to it"
LISTS = ("images", "annotations", "categories")
MAX_COORDINATE = 1e5  # pixels; pycocotools walks along every edge
# Kinds of findings that published datasets have, and that training gets along with: it leaves such
# objects, or such polygons, out.
NO_AREA, OUTSIDE, EMPTY = (
    "box of zero or negative size",
    "box outside of its image",
    "empty mask",
)
FEW_POINTS, SHARED_FILE = "polygon without 3 whole points", "several images with one file"
SHARED_NAME = "several categories with one name"
TOLERABLE = frozenset((NO_AREA, OUTSIDE, EMPTY, FEW_POINTS, SHARED_FILE, SHARED_NAME))


@dataclass(frozen=True)
class Finding:
    """Something about the data that its owner should know."""

    kind: str  # what it is; findings of a kind are printed together
    detail: str  # which object it is about, and the wrong value
    fatal: bool = True  # whether training cannot start with it
    image: int | None = None  # position of the image that could be left out instead, or None
    # Position of the annotation that could be left out instead, or None.
    annotation: int | None = None

    @property
    def droppable(self) -> bool:
        """Whether leaving out one image or annotation mends it."""
        return self.image is not None or self.annotation is not None


def describe(findings: Sequence[Finding], most: int | None = 5) -> list[str]:
    """Lines of text: each kind once, with examples, at most `most` (None: all)."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding.detail)
    lines = []
    for kind, details in by_kind.items():
        lines.append(kind if len(details) == 1 else f"{kind} ({len(details)})")
        lines += [f"  {detail}" for detail in details[:most]]
        if most is not None and len(details) > most:
            lines.append(f"  ... and {len(details) - most} more")
    return lines


def format_problem(
    content: object, needed: Sequence[str] = LISTS, *, panoptic: bool = False
) -> str | None:
    """Why the content of a JSON file is not COCO's format, and what it looks like; None: it is.

    Args:
        content: of the file.
        needed: lists that it must have.
        panoptic: the annotations are lists of segments.
    """
    if isinstance(content, list):
        kind = "a bare list"
        if content and isinstance(content[0], dict) and "score" in content[0]:
            kind = "results of a model"
        return f"it holds {kind}, but must be an object with {', '.join(LISTS)}"
    if not isinstance(content, dict):
        return f"it holds a single {type(content).__name__}"
    if "shapes" in content:
        return "it looks like labelme's, which has one file for each image: convert it to COCO"
    missing = [name for name in needed if name not in content]
    if missing:
        return f"it lacks {', '.join(missing)}; it has {', '.join(content) or 'nothing'}"
    for name in LISTS:
        entries = content.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return f"{name!r} must be a list of objects"
    if not panoptic and any("segments_info" in x for x in content.get("annotations", ())):
        return "it is COCO's panoptic format, which maskdino.data.register_panoptic_folder takes"
    return None


def check_categories(categories: list[dict]) -> Iterator[Finding]:
    """Checks ids and names of categories."""
    if not categories:
        yield Finding("there are no classes", "'categories' is empty")
    for category in categories:
        name = category.get("name")
        is_named = _is_text(name) or is_number(name)
        if not is_id(category.get("id")) or not is_named:
            yield Finding("category without id or name", ascii(category)[:200])
    for key in ("id", "name"):
        counts = Counter(str(category.get(key)) for category in categories)
        for value, number in counts.items():
            if number > 1:
                yield Finding(f"several categories with one {key}", f"{number} have {value!r}")


def check_images(images: list[dict]) -> Iterator[Finding]:
    """Checks ids, names and sizes of images."""
    if not images:
        yield Finding("there are no images", "'images' is empty")
    files: dict[Any, set[str]] = defaultdict(set)  # by id
    problems = [_image_problem(image) for image in images]
    for image, problem in zip(images, problems, strict=True):
        if problem is None:
            files[image["id"]].add(image["file_name"])
    ids, names = set(), set()
    for index, (image, problem) in enumerate(zip(images, problems, strict=True)):
        if problem:
            yield Finding(*problem, image=index)
            continue
        name = f"image {image['id']!r} ({image['file_name']})"
        # Of two files with one id, none can be told to be the one that is meant.
        if image["id"] in ids or len(files[image["id"]]) > 1:
            yield Finding("several images with one id", name, image=index)
        elif image["file_name"] in names:
            yield Finding(SHARED_FILE, name, image=index)
        ids.add(image["id"])
        names.add(image["file_name"])


def _image_problem(image: dict) -> tuple[str, str] | None:
    if not is_id(image.get("id")):
        return "image without id", str(image)[:200]
    if not _is_text(image.get("file_name")):
        return "image without file name", f"image {image['id']!r}: {image.get('file_name')!a}"
    size: list[Any] = [image.get("height"), image.get("width")]
    if not all(is_number(side) and side >= 1 and side == int(side) for side in size):
        return (
            "image without height and width",
            f"image {image['id']!r} ({image['file_name']}) has {tuple(size)}",
        )
    return None


def check_annotations(
    annotations: list[dict],
    images: list[dict],
    categories: list[dict],
    sizes: Mapping[Any, tuple[int, int]],
    *,
    draw: bool = True,
) -> Iterator[Finding]:
    """Checks ids, boxes and masks.

    Args:
        annotations: to check.
        images: found in order.
        categories: found in order.
        sizes: (H, W) of the images by id; annotations of images that are not in it belong to
            images that other findings are about, or to none.
        draw: polygons are drawn, to find those that are empty: most of the time that a check takes.
    """
    names = {i.get("id"): i.get("file_name") for i in images if is_id(i.get("id"))}
    known = {category["id"] for category in categories}
    seen = set()
    for index, annotation in enumerate(annotations):
        image, number = annotation.get("image_id"), annotation.get("id")
        problem: tuple[str, str] | None
        if not is_id(number):
            problem = "annotation without id", str(number)[:80]
        elif number in seen:
            problem = "several annotations with one id", "repeats an id"
        elif not is_id(image) or image not in names:
            problem = "annotation of an unknown image", "no such image"
        elif not is_id(annotation.get("category_id")) or annotation["category_id"] not in known:
            problem = "annotation of an unknown category", f"{annotation.get('category_id')!r}"
        elif annotation.get("iscrowd") not in (0, 1, None):
            problem = "iscrowd is neither 0 nor 1", repr(annotation["iscrowd"])[:80]
        else:
            problem = (
                geometry_problem(annotation, sizes[image], draw=draw) if image in sizes else None
            )
        seen.add(number if is_id(number) else None)
        if problem:
            yield Finding(problem[0], f"{where(annotation, names)}: {problem[1]}", annotation=index)


def where(annotation: dict, names: Mapping[Any, str | None]) -> str:
    """What to call an annotation; `names` are files of images by id."""
    image = annotation.get("image_id")
    text = f"annotation {annotation.get('id')!r} of image {image!r}"
    return f"{text} ({names[image]})" if is_id(image) and image in names else text


def geometry_problem(
    annotation: dict, size: tuple[int, int], *, draw: bool = True
) -> tuple[str, str] | None:
    """What is wrong with the box or mask of an annotation of an image (H, W): kind and details."""
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if not box and not segmentation:
        return "neither box nor mask", f"bbox {box!r}, segmentation {segmentation!r}"
    area = annotation.get("area")
    if area is not None and not (is_number(area) and area >= 0):
        return "area is no number of pixels", repr(area)[:80]
    if box:
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            return "box is not four numbers x, y, width, height", str(box)
        x, y, width, height = box
        if width <= 0 or height <= 0:
            return NO_AREA, str(box)
        if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
            return OUTSIDE, f"{box}, image {size[1]} x {size[0]}"
    return _mask_problem(segmentation, size, draw) if segmentation else None


def _mask_problem(segmentation: Any, size: tuple[int, int], draw: bool) -> tuple[str, str] | None:
    if not isinstance(segmentation, list):
        return _run_lengths_problem(segmentation, size)
    problem = _polygons_problem(segmentation)
    if problem:
        return (FEW_POINTS if "at least 3 pairs" in problem else MALFORMED), problem
    if not draw:
        return None
    try:
        empty = not mask_util.area(encode_segmentation(segmentation, size))
    except (ValueError, TypeError) as error:
        return MALFORMED, str(error)
    return (EMPTY, NO_PIXEL) if empty else None


def _polygons_problem(polygons: list) -> str | None:
    if all(map(is_number, polygons)):
        return "a polygon must be in a list of its own: [[x, y, x, y, ...]]"
    for polygon in polygons:
        if _is_plain(polygon):
            continue
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            return f"a polygon must be a list of numbers, not {str(polygon)[:80]}"
        if len(polygon) < 6 or len(polygon) % 2:
            coordinates = counted(len(polygon), "coordinate")
            return f"a polygon has {coordinates}; at least 3 pairs are needed"
        if max(map(abs, polygon)) >= MAX_COORDINATE:
            return f"a polygon has coordinates beyond {MAX_COORDINATE:g} pixels"
    return None


def _is_plain(polygon: Any) -> bool:
    """Whether nothing is wrong with a polygon: a fast check, as most of them are in order."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    try:
        total = math.fsum(polygon)  # not finite if one of them is not; refuses all but numbers
    except (TypeError, OverflowError, ValueError):
        return False
    limits = max(polygon) < MAX_COORDINATE and min(polygon) > -MAX_COORDINATE
    return math.isfinite(total) and limits and bool not in set(map(type, polygon))


def _run_lengths_problem(rle: object, size: tuple[int, int]) -> tuple[str, str] | None:
    if not isinstance(rle, dict):
        return MALFORMED, f"a mask is a list of polygons or run lengths, not {str(rle)[:80]}"
    if rle.get("size") != list(size):
        return (
            MALFORMED,
            f"run lengths of (height, width) {rle.get('size')} in an image of {list(size)}",
        )
    counts = rle.get("counts")
    if isinstance(counts, str):
        try:
            counts = counts_of_text(counts)
        except ValueError as error:
            return MALFORMED, str(error)
    if not isinstance(counts, list):
        return MALFORMED, f"run lengths without counts: {sorted(rle)}"
    if not all(type(count) is int and count >= 0 for count in counts):
        return MALFORMED, "run lengths must be integers that are not negative"
    if sum(counts) != size[0] * size[1]:
        return MALFORMED, f"run lengths add up to {sum(counts)}, not to {size[0] * size[1]} pixels"
    return None if any(counts[1::2]) else (EMPTY, NO_PIXEL)


def is_id(value: object) -> bool:
    """Whether a value can be an id."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be a name; JSON can hold halves of characters."""
    return isinstance(value, str) and bool(value) and not re.search("[\ud800-\udfff]", value)


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be computed with: not one of hundreds of digits."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300  # false for NaN
    )
