"""Errors in annotations of COCO's panoptic format, and in their maps, in one line each.

Shape key: H, W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata

from maskdino.data.annotation_checks import (
    TOLERABLE,
    check_images,
    format_problem,
    is_id,
    is_number,
)
from maskdino.data.folders import HOW_TO_ALLOW, check_names, leaves
from maskdino.data.reading import DataError, check_same_size, read_map, segment_indices

MOST_IDS = 1 << 24  # that three channels of 8 bits can tell


def check_panoptic(content: object, metadata: Metadata, *, measured: bool) -> None:
    """Checks the content of a JSON file.

    Args:
        content: of the file.
        metadata: of `register_panoptic_folder`.
        measured: whether PQ is measured on it, which needs more than training does.

    Raises:
        DataError: names the file and the first thing that is wrong.
    """
    needed = ("images", "annotations", *["categories"] * measured)
    problem = format_problem(content, needed, panoptic=True)
    if problem is None and isinstance(content, dict):
        problem = next(_problems(content, needed, metadata, measured), None)
    if problem is not None:
        raise DataError(f"{metadata.panoptic_json} is not in COCO's panoptic format: {problem}")


def _problems(
    content: dict, needed: Sequence[str], metadata: Metadata, measured: bool
) -> Iterator[str]:
    yield from (f"{name!r} is empty" for name in needed if not content[name])
    any_path = metadata.get("any_path", False)
    findings = [*check_images(content["images"])]
    findings += [] if any_path else check_names(content["images"], metadata.image_root)
    yield from (f"{x.kind}: {x.detail}" for x in findings if x.kind not in TOLERABLE)
    if measured:
        for category in content["categories"]:
            if not {"id", "name", "isthing"} <= category.keys() or not is_id(category["id"]):
                yield f"a category without id, name or isthing: {ascii(category)[:200]}"
    known = {
        *metadata.thing_dataset_id_to_contiguous_id,
        *metadata.stuff_dataset_id_to_contiguous_id,
    }
    root = "" if any_path else metadata.panoptic_root
    images, seen = {image["id"] for image in content["images"]}, set()
    for annotation in content["annotations"]:
        image = annotation.get("image_id")
        if not is_id(image) or image not in images:
            yield f"an annotation has the unknown image_id {ascii(image)[:100]}"
        if image in seen:
            yield f"several annotations of image {image!r}"
        seen.add(image)
        problem = annotation_problem(annotation, root, known, measured=measured)
        if problem:
            yield f"annotation of image {image!r}: {': '.join(problem)}"


def annotation_problem(
    annotation: dict,
    root: str,
    known: Container,
    *,
    measured: bool = False,
    advice: str = HOW_TO_ALLOW,
) -> tuple[str, str] | None:
    """What is wrong with the annotation of an image, but for its map: kind and details.

    Args:
        annotation: with "file_name" and "segments_info", if it is in order.
        root: folder of the map; "": any will do.
        known: ids of categories.
        measured: see `check_panoptic`.
        advice: what to do about a map out of its folder.
    """
    name, segments = annotation.get("file_name"), annotation.get("segments_info")
    if not isinstance(name, str) or not name:
        return "annotation without a PNG file", f"file_name {ascii(name)[:100]}"
    if leaves(root, name):
        kind = "PNG file out of its folder"
        return kind, f"the file name {name[:200]!a} leads out of {root}: {advice}"
    if not isinstance(segments, list) or not all(isinstance(x, dict) for x in segments):
        return "segments_info is no list of segments", f"{name}: {ascii(segments)[:80]}"
    seen: set[int] = set()
    for segment in segments:
        number = segment.get("id")
        if type(number) is not int or not 0 < number < MOST_IDS or number in seen:
            kind = "segment ids must be whole numbers from 1 to 16777215, each once"
            return kind, f"{name}: {ascii(number)[:80]}"
        seen.add(number)
        problem = _segment_problem(segment, known, measured)
        if problem:
            return problem[0], f"{name}: {problem[1]}"
    return None


def _segment_problem(segment: dict, known: Container, measured: bool) -> tuple[str, str] | None:
    category, crowd = segment.get("category_id"), segment.get("iscrowd", 0)
    area: Any = segment.get("area")
    if not is_id(category) or category not in known:
        kind = "segment of an unknown category_id: add the category, or remove the segment"
        return kind, f"category {ascii(category)[:80]}"
    if not isinstance(crowd, int) or crowd not in (0, 1):
        return "iscrowd is neither 0 nor 1", f"segment {segment['id']}: {ascii(crowd)[:80]}"
    if measured and not (is_number(area) and area >= 0):
        return "area is no number of pixels", f"segment {segment['id']}: {ascii(area)[:80]}"
    return None


def read_segments(record: dict, size: tuple[int, int], *, measured: bool = False) -> np.ndarray:
    """Reads the map of a dataset dict, whose image is (H, W), for training or for PQ.

    Returns:
        (H, W, 3) uint8, in which all segments have pixels.

    Raises:
        DataError: names the map.
    """
    name = record["pan_seg_file_name"]
    colors = read_map(name, None if measured else "RGB")
    if colors.ndim != 3 or colors.shape[2] < 3 or colors.dtype != np.uint8:
        raise DataError(
            f"panoptic map {name} has shape {colors.shape} and type {colors.dtype}; PQ needs "
            "three channels of 8 bits: red, green and blue"
        )
    check_same_size(np.empty(size), colors, record["file_name"], name)
    ids = [segment["id"] for segment in record["segments_info"]]
    if len(set(ids)) != len(ids) or not all(0 < i < MOST_IDS for i in ids):
        raise DataError(f"segment ids of {name} must differ and lie in [1, 2**24): {ids}")
    areas = np.bincount(segment_indices(colors, ids).ravel(), minlength=len(ids) + 1)[1:]
    missing = [i for i, area in zip(ids, areas, strict=True) if area == 0]
    if missing:
        raise DataError(
            f"panoptic map {name} has no pixel of the segments {missing} that its annotation lists"
        )
    return colors[..., :3]
