"""Checks of detectron2's records that a function of the user gives, in place of a file."""

from __future__ import annotations

import math
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from maskdino.data.reading import DataError

NEEDED = ("file_name", "image_id", "height", "width")  # of each image
MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def check_records(name: str) -> None:
    """Checks a dataset that is judged as COCO's are, but has no file in COCO's format.

    Detectron2 makes such a file, but at the first evaluation alone.

    Raises:
        DataError: something is missing, or is of a kind that such a file cannot hold.
    """
    records = DatasetCatalog.get(name)
    if not isinstance(records, list):
        raise DataError(f"dataset {name!r} gives {type(records).__name__}: no list of records")
    seen = set()
    for number, record in enumerate(records):
        missing = [key for key in NEEDED if key not in record]
        if missing:
            file = record.get("file_name", "without file name")
            raise DataError(f"dataset {name!r}: image {number}, {file}, lacks {', '.join(missing)}")
        if record["image_id"] in seen:
            raise DataError(f"dataset {name!r}: image_id {record['image_id']!r} stands twice")
        seen.add(record["image_id"])
        for annotation in record.get("annotations", ()):
            problem = _problem(annotation)
            if problem:
                raise DataError(
                    f"dataset {name!r}: an annotation of image {record['file_name']}: {problem}"
                )


def _problem(annotation: dict[str, Any]) -> str | None:
    """What the evaluation cannot get along with, if anything."""
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if box is None or len(box) != 4 or not all(map(math.isfinite, box)):
        return f"bbox is {box}; it must be four numbers"
    if mode not in MODES:
        return f"bbox_mode is {mode}; it must be BoxMode.XYXY_ABS or BoxMode.XYWH_ABS"
    mask = annotation.get("segmentation")
    is_polygons = isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)
    if not (mask is None or is_polygons or isinstance(mask, dict)):
        return (
            "segmentation is an array, or holds some; it must be a list of polygons, each a list "
            "of numbers, or COCO's run lengths (pycocotools.mask.encode)"
        )
    return None
