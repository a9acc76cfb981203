"""Ground truth as results: of a dataset's files, and of what a mapper made of them."""

from __future__ import annotations

import numpy as np
from detectron2.structures import BoxMode

from maskdino.categories import Categories
from maskdino.data.reading import DataError, read_map, segment_indices
from maskdino.ops.rle import encode_mask, encode_segmentation
from maskdino.visualization.images import load_image
from maskdino.visualization.results import ImageResult


def ground_truth_of(record: dict, categories: Categories) -> ImageResult:
    """All annotations of an image, at its own size; crowd regions are left out.

    Args:
        record: detectron2's dataset dict, with "file_name" and any of "annotations",
            "pan_seg_file_name" with "segments_info", "sem_seg_file_name".
        categories: the classes of the dataset.
    """
    name = record["file_name"]
    if "height" in record and "width" in record:
        size = (record["height"], record["width"])
    else:
        size = load_image(name).shape[:2]
    parts = _object_parts(record.get("annotations"), size)
    if "pan_seg_file_name" in record:
        parts |= _panoptic_parts(record, categories)
    if "sem_seg_file_name" in record:
        parts["label_map"] = read_map(record["sem_seg_file_name"], None)
    if not parts:
        raise DataError(f"image {name} comes without annotations that could be drawn")
    return ImageResult(name, size, categories, source=name, **parts)


def ground_truth_of_example(
    example: dict, categories: Categories, image_format: str
) -> ImageResult:
    """What the model is trained with: the augmented image and its objects or segments.

    Args:
        example: the result of a training mapper.
        categories: the classes of the dataset.
        image_format: INPUT.FORMAT.
    """
    image = load_image(example["image"], image_format)
    objects = example["instances"]
    rles = None
    if objects.has("gt_masks"):
        masks = objects.gt_masks
        rles = tuple(encode_mask(masks[i].to_bool()[0].numpy()) for i in range(len(masks)))
    return ImageResult(
        str(example["file_name"]),
        image.shape[:2],
        categories,
        boxes=objects.gt_boxes.tensor.numpy(),
        class_ids=objects.gt_classes.numpy(),
        rles=rles,
        source=image,
    )


def _object_parts(annotations: list[dict] | None, size: tuple[int, int]) -> dict:
    if annotations is None:
        return {}
    kept = [a for a in annotations if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
    parts = {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "class_ids": np.array([a["category_id"] for a in kept], np.int64),
    }
    if kept and all(a.get("segmentation") for a in kept):
        parts["rles"] = tuple(encode_segmentation(a["segmentation"], size) for a in kept)
    return parts


def _panoptic_parts(record: dict, categories: Categories) -> dict:
    colors = read_map(record["pan_seg_file_name"], "RGB")
    segments = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
    ids = segment_indices(colors, [segment["id"] for segment in segments])
    described = []
    for i, segment in enumerate(segments, start=1):
        label = segment["category_id"]
        parts = {"id": i, "category_id": label, "isthing": categories.is_thing[label]}
        # Predictions in COCO's format may have it.
        described.append(parts | {key: segment[key] for key in ("score",) if key in segment})
    return {"panoptic_ids": ids.astype(np.int32), "segments": tuple(described)}
