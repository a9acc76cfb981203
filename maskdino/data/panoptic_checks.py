"""Errors in annotations of COCO's panoptic format, and in their maps, in one line each.

Shape key: H, W pixels of an image.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np
from detectron2.data.catalog import Metadata

from maskdino.data.annotation_checks import TOLERABLE, check_images, is_id
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
    file = metadata.panoptic_json
    problem = _format_problem(content, ("images", "annotations", *["categories"] * measured))
    if problem is None and isinstance(content, dict):
        problem = next(_problems(content, metadata, measured), None)
    if problem is not None:
        raise DataError(f"{file} is not in COCO's panoptic format: {problem}")


def _format_problem(content: object, needed: Collection[str]) -> str | None:
    if not isinstance(content, dict):
        return f"it holds a single {type(content).__name__}"
    for name in needed:
        entries = content.get(name)
        if name not in content:
            return f"it lacks {name!r}; it has {', '.join(content)[:200] or 'nothing'}"
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return f"{name!r} must be a list of objects"
        if not entries:
            return f"{name!r} is empty"
    return None


def _problems(content: dict, metadata: Metadata, measured: bool) -> Iterator[str]:
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
    images, seen = {image["id"] for image in content["images"]}, set()
    for annotation in content["annotations"]:
        image, name = annotation.get("image_id"), annotation.get("file_name")
        if not is_id(image) or image not in images:
            yield f"an annotation has the unknown image_id {ascii(image)[:100]}"
        if image in seen:
            yield f"several annotations of image {image!r}"
        seen.add(image)
        if not isinstance(name, str) or not name:
            yield f"the annotation of image {image!r} has the file_name {ascii(name)[:100]}"
        if not any_path and leaves(metadata.panoptic_root, name):
            place = metadata.panoptic_root
            yield f"the file name {name[:200]!a} leads out of {place}: {HOW_TO_ALLOW}"
        segments = annotation.get("segments_info")
        if not isinstance(segments, list) or not all(isinstance(x, dict) for x in segments):
            yield f"segments_info of {name} must be a list of objects"
        yield from (f"{name}: {x}" for x in _segment_problems(segments, known, measured))


def _segment_problems(segments: list[dict], known: set, measured: bool) -> Iterator[str]:
    seen = set()
    for segment in segments:
        number, category = segment.get("id"), segment.get("category_id")
        crowd, area = segment.get("iscrowd", 0), segment.get("area")
        if type(number) is not int or not 0 < number < MOST_IDS:
            yield f"segment id {ascii(number)[:100]} is no integer from 1 to 2**24 - 1"
        if number in seen:
            yield f"several segments have the id {number}"
        seen.add(number)
        if not is_id(category) or category not in known:
            text = ascii(category)[:100]
            yield f"segment {number} has the category_id {text}, which the dataset does not know"
        if not isinstance(crowd, int) or crowd not in (0, 1):
            yield f"segment {number}: iscrowd is neither 0 nor 1, but {ascii(crowd)[:100]}"
        if isinstance(area, bool) or not isinstance(area, int | float):
            area = math.nan
        if measured and not 0 <= area < math.inf:
            area = segment.get("area")
            yield f"segment {number} has the area {ascii(area)[:100]}; PQ needs pixels"


def read_segments(record: dict, size: tuple[int, int], *, measured: bool = False) -> np.ndarray:
    """Reads the map of a dataset dict.

    Args:
        record: with "file_name", "pan_seg_file_name" and "segments_info".
        size: (H, W) of its image.
        measured: whether PQ is measured on it, by a program that reads colors alone.

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
