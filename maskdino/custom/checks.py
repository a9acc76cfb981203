"""Errors in annotations and their images, and warnings about what is unusual."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from maskdino.custom.annotations import Annotations
from maskdino.custom.maps import in_threads
from maskdino.data.annotation_checks import (
    Finding,
    check_annotations,
    check_categories,
    check_images,
    is_id,
    where,
)
from maskdino.data.folders import WITHIN, check_names
from maskdino.data.images import BROKEN_IMAGE, decode, orientation
from maskdino.ops.rle import encode_segmentation
from maskdino.system.words import counted

TINY = 4  # pixels of the shorter side
RARE = 10  # objects of a class
IMBALANCE = 20  # objects of the most common class for each one of the rarest
OVERLAP = 0.5  # least intersection over union of a box and its mask's box
IN_A_FOLDER = f"{WITHIN}, or give one that holds them all, with --data or --train-images"


def check(data: Annotations, *, need_all_masks: bool = False) -> list[Finding]:
    """Checks all of the annotations, and reads every image; label images were checked when read.

    Args:
        data: what was read.
        need_all_masks: whether objects without a mask are wrong where others have one (mask AP
            cannot be measured), or only worth a warning.
    """
    findings = [*check_categories(data.categories), *check_images(data.images)]
    findings += check_names(data.images, str(data.image_root), IN_A_FOLDER)
    if any(finding.image is None for finding in findings):
        return findings  # without usable lists, all that follows would be noise
    bad = {finding.image for finding in findings}
    good = [(i, image) for i, image in enumerate(data.images) if i not in bad]
    findings += _check_files(data, good)
    if data.maps is None:
        sizes = {image["id"]: (int(image["height"]), int(image["width"])) for _, image in good}
        wrong = list(check_annotations(data.annotations, data.images, data.categories, sizes))
        findings += wrong
        findings += _check_geometry(data, sizes, {finding.annotation for finding in wrong})
        findings += _check_masks_complete(data, fatal=need_all_masks)
    if not data.objects():
        annotations = counted(len(data.annotations), "annotation")
        findings.append(Finding("there are no objects", annotations))
    return [*findings, *_warnings(data)]


def drop(data: Annotations, findings: Iterable[Finding]) -> Annotations:
    """Leaves out what fatal findings are about."""
    fatal = [finding for finding in findings if finding.fatal]
    return data.without(
        {x.image for x in fatal if x.image is not None},
        {x.annotation for x in fatal if x.annotation is not None},
    )


def _check_files(data: Annotations, images: list[tuple[int, dict]]) -> Iterator[Finding]:
    """Reads all images."""

    def problem(entry: tuple[int, dict]) -> tuple[str, str] | None:
        image = entry[1]
        return file_problem(data.path_of(image), (int(image["height"]), int(image["width"])))

    for (index, image), found in zip(images, in_threads(problem, images), strict=True):
        if found is not None:
            kind, detail = found
            name = f"image {image['id']!r} ({data.path_of(image)})"
            yield Finding(kind, f"{name}: {detail}", image=index)


def file_problem(path: Path, size: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with a file of an image, (H, W) once it is upright: the kind and details."""
    try:
        if not path.is_file():
            return "image file is missing", "no such file"
        with Image.open(path) as image:
            width, height = image.size
            turned = orientation(image) >= 5
            # JPEG files are decoded at an eighth of their size: faster, and cut ends still show.
            image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
            decode(image)
    except Image.DecompressionBombError as error:
        return "image is too large", str(error)
    except BROKEN_IMAGE as error:
        return "image cannot be read", str(error)
    found = (width, height) if turned else (height, width)
    if found == size:
        return None
    kind = "image has another size than its annotations say"
    if turned and size == (height, width):
        kind += (
            ": they have that of the stored pixels, before the EXIF orientation is applied. If the "
            "objects are drawn on these pixels, remove the orientation from the file (exiftool "
            "-Orientation= FILE); if not, correct the size in the annotations"
        )
    hint = " (its EXIF data turn it by 90 degrees)" if turned else ""
    return kind, f"{found}{hint}, not {size}"


def _check_geometry(data: Annotations, sizes: dict, wrong: set[int | None]) -> Iterator[Finding]:
    """Warns of what is unusual about boxes and masks in which nothing is wrong."""
    names = {i.get("id"): i.get("file_name") for i in data.images if is_id(i.get("id"))}
    for index, annotation in enumerate(data.annotations):
        if index not in wrong and annotation["image_id"] in sizes:
            for kind, detail in _geometry_warnings(annotation, sizes[annotation["image_id"]]):
                yield Finding(kind, f"{where(annotation, names)}: {detail}", fatal=False)


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
    noun = "image" if data.task == "semantic" else "object"
    few = RARE if data.maps is None else min(RARE, len(data.images))
    rare = (f"{name}: {counted(count, noun)}" for name, count in counts.items() if 0 < count < few)
    yield from warn("rare class", rare)
    things = {x["name"]: counts[x["name"]] for x in data.categories if x.get("isthing", True)}
    present = [count for count in things.values() if count]
    if present and max(present) > IMBALANCE * min(present):
        listed = ", ".join(f"{name} {count}" for name, count in things.items() if count)
        yield from warn("unbalanced classes", [listed])


def check_pair(train: Annotations, validation: Annotations) -> list[Finding]:
    """Whether validation data have the classes of the training data, and other images."""
    if train.task != validation.task:
        kind = "validation data of another kind than the training data"
        return [Finding(kind, f"{train.task} to train on, {validation.task} to validate on")]
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
