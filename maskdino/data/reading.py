"""Images and label maps from files; whatever is wrong with one names the file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from maskdino.data.images import BROKEN_IMAGE, ImageError, load_image
from maskdino.system.errors import UserError

MOST_CLASSES = 255  # of a label map with 8 bits, one value of which stands for "ignored"


class DataError(UserError):
    """Something is wrong with a dataset: the message names the file, the value, and what to do."""


def read_json(path: str, encoding: str = "utf-8") -> Any:
    """Reads a JSON file of annotations; "utf-8-sig" also takes a mark at the beginning.

    Raises:
        DataError: it is missing, or no JSON in this encoding.
    """
    try:
        with PathManager.open(path, encoding=encoding) as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise DataError(f"there is no annotation file {path}") from error
    except RecursionError as error:
        raise DataError(f"{path} cannot be read as JSON: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Reads an image (H, W, C) uint8, in INPUT.FORMAT, exactly as prediction does (`load_image`).

    Raises:
        DataError: the file is missing, truncated, or no image.
    """
    try:
        image = load_image(file_name)
    except ImageError as error:
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        advice = "" if is_missing else ". Replace the file or remove its annotations"
        raise DataError(f"{error}{advice}") from error
    if image_format == "RGB":
        return image
    # The result may be a view whose memory runs backwards, which PyTorch does not take.
    return np.ascontiguousarray(
        detection_utils.convert_PIL_to_numpy(Image.fromarray(image), image_format)
    )


def read_map(file_name: str, image_format: str | None) -> np.ndarray:
    """Reads an image whose values are labels, which no transparency or profile may change.

    Returns:
        (H, W, 3) uint8 as the format, "RGB", says. None: the values as they are in the file, (H, W)
        of its integer type where it has one channel.

    Raises:
        DataError: the file is missing, truncated, or no image.
    """
    try:
        # Pillow's memory is read-only, which PyTorch, used by fvcore's transforms, warns of.
        return np.array(detection_utils.read_image(file_name, format=image_format))
    except FileNotFoundError as error:
        raise DataError(f"map {file_name} does not exist") from error
    except BROKEN_IMAGE as error:
        raise DataError(
            f"cannot read map {file_name}: {error}. Replace the file or remove its annotations"
        ) from error


def read_label_map(file_name: str, num_classes: int, ignore_label: int) -> np.ndarray:
    """Reads a semantic map: the class of each pixel.

    Returns:
        (H, W) uint8: 0 where the class is to be ignored, else class + 1. With "ignore" at 0,
        whatever a transform pads with zeros is ignored, too.

    Raises:
        DataError: the map cannot be read, has several channels or more than 8 bits, or holds a
            value that is neither a class nor `ignore_label`; or the classes, and "ignore", are more
            than 8 bits can tell.
    """
    if num_classes > MOST_CLASSES:
        raise DataError(
            f"{num_classes} classes are too many: label maps such as {file_name} have 8 bits, for "
            f"at most {MOST_CLASSES} classes and what is ignored"
        )
    labels = read_map(file_name, None)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise DataError(
            f"label map {file_name} has shape {labels.shape} and type {labels.dtype}; "
            "it must have one channel of 8 bits"
        )
    counts = np.bincount(labels.ravel(), minlength=256)
    counts[ignore_label] = 0
    unknown = np.flatnonzero(counts[num_classes:]) + num_classes
    if len(unknown):
        raise DataError(
            f"label map {file_name} holds the values {unknown.tolist()}; "
            f"classes are 0 to {num_classes - 1}, and {ignore_label} is ignored"
        )
    table = np.arange(1, 257).astype(np.uint8)
    table[ignore_label] = 0
    return table[labels]


def check_same_size(
    image: np.ndarray, labels: np.ndarray, image_name: str, label_name: str
) -> None:
    """Raises a DataError unless the label map has the image's height and width."""
    if image.shape[:2] != labels.shape[:2]:
        raise DataError(
            f"label map {label_name} has (height, width) {labels.shape[:2]}, "
            f"but its image {image_name} {image.shape[:2]}"
        )


def ids_of_colors(colors: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of COCO's panoptic format to (H, W) int32 segment ids."""
    red, green, blue = (colors[..., channel].astype(np.int32) for channel in range(3))
    return red | green << 8 | blue << 16


def colors_of_ids(ids: np.ndarray) -> np.ndarray:
    """Segment ids below 2**24, (...), to (..., 3) uint8 of COCO's panoptic format."""
    colors = np.empty((*ids.shape, 3), np.uint8)
    for channel in range(3):  # one by one: maps of large images are of a gigabyte
        colors[..., channel] = ids >> 8 * channel & 255
    return colors


def segment_indices(segment_colors: np.ndarray, segment_ids: list[int]) -> np.ndarray:
    """Looks up the segments of a map in COCO's panoptic format, (H, W, 3) uint8, by N ids.

    The id of a segment is red + 256 green + 65536 blue, in [0, 2**24).

    Returns:
        (H, W) uint16: index + 1 of each pixel's segment; 0 where it belongs to none of them.
    """
    ids = ids_of_colors(segment_colors)
    # Zero pages of the operating system: memory is touched only where ids exist.
    table = np.zeros(1 << 24, np.uint16)
    table[segment_ids] = np.arange(1, len(segment_ids) + 1)
    return table[ids]
