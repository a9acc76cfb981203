"""Images to what the network reads, and the sizes of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from maskdino.data.images import ImageError, ImageSource, load_image

__all__ = [
    "ImageError",
    "ImageSource",
    "fitting_size",
    "load_image",
    "network_image",
    "network_size",
    "padded_size",
]


def network_size(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """The (height, width) at which the network reads an image, as in detectron2's evaluation.

    Args:
        size: (height, width) of the image.
        shortest: INPUT.MIN_SIZE_TEST, wanted pixels of the shorter edge; 0 keeps the size.
        longest: INPUT.MAX_SIZE_TEST, which the longer edge may not exceed.
    """
    if shortest == 0:
        return size
    height, width = ResizeShortestEdge.get_output_shape(*size, shortest, longest)
    return max(1, height), max(1, width)


def padded_size(size: Sequence[int], multiple: int, smallest: int = 0) -> tuple[int, int]:
    """The (height, width) of the canvas of an image: its edges rounded up.

    Args:
        size: (height, width) of the image.
        multiple: each edge of the canvas is one of so many pixels; 0 as 1.
        smallest: the least edge of a canvas, a multiple itself.
    """
    unit = max(1, multiple)
    height, width = (max(smallest, -(-edge // unit) * unit) for edge in size)
    return height, width


def fitting_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of an image that fits on a canvas, shape kept."""
    scale = min(room / edge for edge, room in zip(size, canvas, strict=True))
    height, width = (
        min(room, max(1, int(edge * scale + 0.5))) for edge, room in zip(size, canvas, strict=True)
    )
    return height, width


def network_image(image: np.ndarray, size: tuple[int, int], image_format: str) -> torch.Tensor:
    """(H, W, 3) uint8 RGB to (3, h, w) uint8 in INPUT.FORMAT."""
    if image.shape[:2] != size:
        image = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    if image_format == "BGR":
        image = image[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
