"""Errors in annotations and their images, and warnings about what is unusual."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from maskdino.custom.annotations import Annotations
from maskdino.data.images import BROKEN, EXIF_ORIENTATION, decode
from maskdino.rle import encode_segmentation

MAX_COORDINATE = 1e5  # pixels; pycocotools walks along every edge
TINY = 4  # pixels of the shorter side
RARE = 10  # objects of a class
IMBALANCE = 20  # objects of the most common class for each one of the rarest
OVERLAP = 0.5  # least intersection over union of a box and its mask's box
READERS = 8  # threads


@dataclass(frozen=True)
class Finding:
    """Something about the data that its owner should know.

    Attributes:
        kind: what it is; findings of a kind are printed together.
        detail: which object it is about, and the wrong value.
        fatal: whether training cannot start with it.
        image: position of the image that could be left out instead, or None.
        annotation: position of the annotation that could be left out instead, or None.
    """

    kind: str
    detail: str
    fatal: bool = True
    image: int | None = None
    annotation: int | None = None

    @property
    def droppable(self) -> bool:
        """Whether leaving out one image or annotation mends it."""
        return self.image is not None or self.annotation is not None


def check(data: Annotations, *, need_all_masks: bool = False) -> list[Finding]:
    """Checks all of the annotations, and reads every image.

    Args:
        data: what was read.
        need_all_masks: whether objects without a mask are wrong where others have one (mask AP
            cannot be measured), or only worth a warning.
    """
    findings = [*_check_categories(data.categories), *_check_images(data)]
    if any(finding.image is None for finding in findings):
        return findings  # without usable lists, all that follows would be noise
    bad = {finding.image for finding in findings}
    good = [(i, image) for i, image in enumerate(data.images) if i not in bad]
    findings += _check_files(data, good)
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for _, image in good}
    findings += _check_annotations(data, sizes)
    findings += _check_masks_complete(data, fatal=need_all_masks)
    if not data.objects():
        findings.append(Finding("there are no objects", f"{len(data.annotations)} annotations"))
    return [*findings, *_warnings(data)]


def drop(data: Annotations, findings: Iterable[Finding]) -> Annotations:
    """Leaves out what fatal findings are about."""
    fatal = [finding for finding in findings if finding.fatal]
    return data.without(
        {x.image for x in fatal if x.image is not None},
        {x.annotation for x in fatal if x.annotation is not None},
    )


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


def _check_categories(categories: list[dict]) -> Iterator[Finding]:
    if not categories:
        yield Finding("there are no classes", "'categories' is empty")
    for category in categories:
        if not _is_id(category.get("id")) or not str(category.get("name", "")):
            yield Finding("category without id or name", str(category))
    for key in ("id", "name"):
        counts = Counter(str(category.get(key)) for category in categories)
        for value, number in counts.items():
            if number > 1:
                yield Finding(f"several categories with one {key}", f"{number} have {value!r}")


def _check_images(data: Annotations) -> Iterator[Finding]:
    if not data.images:
        yield Finding("there are no images", "'images' is empty")
    ids, names = set(), set()
    for index, image in enumerate(data.images):
        problem = _image_problem(image)
        if problem:
            yield Finding(*problem, image=index)
            continue
        name = f"image {image['id']!r} ({image['file_name']})"
        if image["id"] in ids:
            yield Finding("several images with one id", name, image=index)
        elif image["file_name"] in names:
            yield Finding("several images with one file", name, image=index)
        ids.add(image["id"])
        names.add(image["file_name"])


def _image_problem(image: dict) -> tuple[str, str] | None:
    if not _is_id(image.get("id")):
        return "image without id", str(image)[:200]
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        return "image without file name", f"image {image['id']!r}"
    size: list[Any] = [image.get("height"), image.get("width")]
    if not all(_is_number(side) and side >= 1 and side == int(side) for side in size):
        return (
            "image without height and width",
            f"image {image['id']!r} ({image['file_name']}) has {tuple(size)}",
        )
    return None


def _check_files(data: Annotations, images: list[tuple[int, dict]]) -> Iterator[Finding]:
    """Reads all images, several at a time: Pillow decodes outside of Python's lock."""

    def problem(entry: tuple[int, dict]) -> tuple[str, str] | None:
        image = entry[1]
        return file_problem(data.path_of(image), (int(image["height"]), int(image["width"])))

    with ThreadPoolExecutor(READERS) as pool:
        for (index, image), found in zip(images, pool.map(problem, images), strict=True):
            if found is not None:
                kind, detail = found
                name = f"image {image['id']!r} ({data.path_of(image)})"
                yield Finding(kind, f"{name}: {detail}", image=index)


def file_problem(path: Path, size: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with an image file.

    Args:
        path: of the file.
        size: (height, width) that it should have once it is upright.

    Returns:
        The kind of the problem and details, or None.
    """
    if not path.is_file():
        return "image file is missing", "no such file"
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            # JPEG files are decoded at an eighth of their size: faster, and cut ends still show.
            image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
            decode(image)
    except Image.DecompressionBombError as error:
        return "image is too large", str(error)
    except BROKEN as error:
        return "image cannot be read", str(error)
    found = (width, height) if turned else (height, width)
    if found == size:
        return None
    hint = " (its EXIF data turn it by 90 degrees)" if turned else ""
    return "image has another size than its annotations say", f"{found}{hint}, not {size}"


def _check_annotations(data: Annotations, sizes: dict) -> Iterator[Finding]:
    """Checks ids, boxes and masks.

    Args:
        data: whose images and categories are in order.
        sizes: (H, W) of the images by id; annotations of images that are not in it belong to
            images that other findings are about, or to none.
    """
    image_names = {i.get("id"): i.get("file_name") for i in data.images if _is_id(i.get("id"))}
    categories = {category["id"] for category in data.categories}
    seen = set()
    for index, annotation in enumerate(data.annotations):
        image = annotation.get("image_id")
        known = _is_id(image) and image in image_names
        where = f"annotation {annotation.get('id')!r} of image {image!r}"
        where += f" ({image_names[image]})" if known else ""
        number = annotation.get("id")
        problem: tuple[str, str] | None
        if not _is_id(number):
            problem = "annotation without id", str(number)
        elif number in seen:
            problem = "several annotations with one id", "repeats an id"
        elif not known:
            problem = "annotation of an unknown image", "no such image"
        elif not _is_id(annotation.get("category_id")) or (
            annotation["category_id"] not in categories
        ):
            problem = "annotation of an unknown category", f"{annotation.get('category_id')!r}"
        else:
            problem = geometry_problem(annotation, sizes[image]) if image in sizes else None
        seen.add(number if _is_id(number) else None)
        if problem:
            yield Finding(problem[0], f"{where}: {problem[1]}", annotation=index)
        elif image in sizes:
            for kind, detail in _geometry_warnings(annotation, sizes[image]):
                yield Finding(kind, f"{where}: {detail}", fatal=False)


def geometry_problem(annotation: dict, size: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with the box or mask of an annotation of an image (H, W): kind and details."""
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if not box and not segmentation:
        return "neither box nor mask", f"bbox {box!r}, segmentation {segmentation!r}"
    if box:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return "box is not four numbers x, y, width, height", str(box)
        x, y, width, height = box
        if width <= 0 or height <= 0:
            return "box of zero or negative size", str(box)
        if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
            return "box outside of its image", f"{box}, image {size[1]} x {size[0]}"
    return _mask_problem(segmentation, size) if segmentation else None


def _mask_problem(segmentation: Any, size: tuple[int, int]) -> tuple[str, str] | None:
    if isinstance(segmentation, list):
        problem = _polygons_problem(segmentation)
    else:
        problem = _run_lengths_problem(segmentation, size)
    if problem:
        return "mask is malformed", problem
    try:
        rle = encode_segmentation(segmentation, size)
        if isinstance(segmentation, dict):
            mask_util.decode(rle)  # raises where the text is no run lengths of this size
        empty = not mask_util.area(rle)
    except (ValueError, TypeError) as error:
        return "mask is malformed", str(error)
    return ("empty mask", "no pixel of the image belongs to it") if empty else None


def _polygons_problem(polygons: list) -> str | None:
    if all(map(_is_number, polygons)):
        return "a polygon must be in a list of its own: [[x, y, x, y, ...]]"
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(map(_is_number, polygon)):
            return f"a polygon must be a list of numbers, not {str(polygon)[:80]}"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon has {len(polygon)} coordinates; at least 3 pairs are needed"
        if max(map(abs, polygon)) >= MAX_COORDINATE:
            return f"a polygon has coordinates beyond {MAX_COORDINATE:g} pixels"
    return None


def _run_lengths_problem(rle: object, size: tuple[int, int]) -> str | None:
    if not isinstance(rle, dict):
        return f"a mask is a list of polygons or run lengths, not {str(rle)[:80]}"
    if list(rle.get("size") or ()) != list(size):
        return f"run lengths of (height, width) {rle.get('size')} in an image of {list(size)}"
    counts = rle.get("counts")
    if not isinstance(counts, str | list):
        return f"run lengths without counts: {sorted(rle)}"
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return "run lengths must be integers that are not negative"
        if sum(counts) != size[0] * size[1]:
            return f"run lengths add up to {sum(counts)}, not to {size[0] * size[1]} pixels"
    return None


def _geometry_warnings(annotation: dict, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if not box:
        return
    x, y, width, height = box
    if min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1:
        yield "box reaches beyond its image", f"{box}, image {size[1]} x {size[0]}"
    if min(width, height) < TINY:
        yield f"tiny object, less than {TINY} pixels wide or high", str(box)
    if segmentation and not annotation.get("iscrowd"):
        own = mask_util.toBbox(encode_segmentation(segmentation, size))
        overlap = float(mask_util.iou(np.array([box], float), own[None], [0])[0, 0])
        if overlap < OVERLAP:
            yield "box and mask disagree", f"box {box}, box of the mask {own.tolist()}"


def _check_masks_complete(data: Annotations, *, fatal: bool) -> Iterator[Finding]:
    bare = [
        (index, annotation)
        for index, annotation in enumerate(data.annotations)
        if not annotation.get("segmentation") and annotation.get("bbox")
    ]
    if not bare or len(bare) == len(data.annotations):
        return
    kind = "object without a mask, where others have one"
    kind += "; mask AP cannot be measured" if fatal else "; it trains boxes only"
    for index, annotation in bare:
        yield Finding(
            kind,
            f"annotation {annotation.get('id')!r} of image {annotation.get('image_id')!r}",
            fatal=fatal,
            annotation=index if fatal else None,
        )


def _warnings(data: Annotations) -> Iterator[Finding]:
    """What is unusual about the data as a whole."""

    def warn(kind: str, details: Iterable[str]) -> Iterator[Finding]:
        return (Finding(kind, detail, fatal=False) for detail in details)

    used = {str(annotation.get("image_id")) for annotation in data.annotations}
    unused = (x for x in data.images if str(x.get("id")) not in used)
    yield from warn("image without objects", (str(x.get("file_name")) for x in unused))
    repeats = Counter(
        str((x.get("image_id"), x.get("category_id"), x["bbox"]))
        for x in data.annotations
        if x.get("bbox")
    )
    numbers = (f"{n} times {text}" for text, n in repeats.items() if n > 1)
    yield from warn("the same object more than once (image, category, box)", numbers)
    by_category = Counter(str(x.get("category_id")) for x in data.objects())
    counts = {x["name"]: by_category[str(x["id"])] for x in data.categories}
    yield from warn("class without objects", (n for n, c in counts.items() if c == 0))
    rare = (f"{name}: {count} objects" for name, count in counts.items() if 0 < count < RARE)
    yield from warn("rare class", rare)
    present = [count for count in counts.values() if count]
    if present and max(present) > IMBALANCE * min(present):
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        yield from warn("unbalanced classes", [listed])


def check_pair(train: Annotations, validation: Annotations) -> list[Finding]:
    """Whether validation data have the classes of the training data, and other images."""
    names = {str(category["id"]): category["name"] for category in train.categories}
    findings = [
        Finding(
            "validation category that the training data lack, or call otherwise",
            f"{category['id']!r} is {category['name']!r} in {validation.json_file}, and "
            f"{names.get(str(category['id']), 'unknown')!r} in {train.json_file}",
        )
        for category in validation.categories
        if names.get(str(category["id"])) != category["name"]
    ]
    paths = {train.path_of(image).resolve() for image in train.images}
    findings += [
        Finding("image in both training and validation", str(path), fatal=False)
        for path in map(validation.path_of, validation.images)
        if path.resolve() in paths
    ]
    return findings


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
