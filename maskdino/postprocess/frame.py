"""Between the frames of the network, the image and the output.

Shape key: Q queries, R of them, C channels; canvas H, W; image h, w; output OH, OW pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops.boxes import cxcywh_to_xyxy, pixels_inside
from maskdino.ops.constants import is_traced
from maskdino.ops.host import pack_masks
from maskdino.ops.ms_deform_attn import has_compiled
from maskdino.structures import Predictions

ELEMENTS_AT_ONCE = 1 << 25  # resized mask probabilities that exist at one time (128 MiB of float32)
MOST_LINES_OF_BITS = 12000  # of an output whose masks the compiled library packs
MAP_VALUES_AT_ONCE = 1 << 28  # values of compact maps; those of larger images are enlarged


@dataclass(frozen=True)
class Frame:
    """Sizes (height, width) in pixels: padded canvas, the image on it, the output asked for."""

    canvas: tuple[int, int]
    image: tuple[int, int]
    output: tuple[int, int]


def resize_to_canvas(maps: Tensor, frame: Frame) -> Tensor:
    """(R, H/4, W/4) to (R, h, w): resized to the padded canvas, then cropped to the image."""
    maps = F.interpolate(maps[None], size=frame.canvas, mode="bilinear", align_corners=False)[0]
    return maps[:, : frame.image[0], : frame.image[1]]


def resize_to_output(maps: Tensor, frame: Frame) -> Tensor:
    """(R, h, w) to (R, OH, OW)."""
    if frame.output == frame.image:
        return maps
    return F.interpolate(maps[None], size=frame.output, mode="bilinear", align_corners=False)[0]


def maps_at_once(area: int) -> int:
    """How many maps of so many pixels may be worked on at one time."""
    return max(1, ELEMENTS_AT_ONCE // max(1, area))


def output_masks(
    embeddings: Tensor, pixel_embedding: Tensor, frame: Frame, limits: Tensor | None = None
) -> Iterator[Tensor]:
    """Mask logits of queries in the output frame, a few queries at a time: (r, OH, OW).

    They are float32, and not rounded to the type of the embeddings on the way.

    Args:
        embeddings: (R, C).
        pixel_embedding: (C, H/4, W/4).
        frame: the sizes.
        limits: (R, 4) cx, cy, w, h of the canvas, outside of which a mask's logits are -inf
            (`mask_limits`); None: masks reach as far as they do.
    """
    for maps, boxes in _maps(embeddings, pixel_embedding, frame, limits):
        yield _output_logits(maps, boxes, frame)


def output_foregrounds(
    embeddings: Tensor,
    pixel_embedding: Tensor,
    frame: Frame,
    limits: Tensor | None = None,
    *,
    quality: bool,
    packed: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Where masks of queries are in the output frame, a few queries at a time.

    Args:
        embeddings: (R, C).
        pixel_embedding: (C, H/4, W/4).
        frame: the sizes.
        limits: as for `output_masks`.
        quality: whether the mean probability over each mask is asked for.
        packed: whether masks are wanted as bits (`pack_masks`).

    Returns:
        (r, OH, OW) bool, or (r, P) uint8; and that mean (r,), or None.
    """
    for maps, boxes in _maps(embeddings, pixel_embedding, frame, limits):
        sizes = frame.canvas, frame.image, frame.output
        at_once = boxes is None and _in_one_pass(maps)
        if at_once and packed and maps.is_cuda and frame.output[0] <= MOST_LINES_OF_BITS:
            bits, means = torch.ops.maskdino.resized_packed_masks(maps, *sizes, quality)
            yield bits, means if quality else None
            continue
        if at_once:
            foreground, means = torch.ops.maskdino.resized_masks(maps, *sizes, True, quality)
        else:
            logits = _output_logits(maps, boxes, frame)
            foreground = logits > 0
            if quality:  # nothing as large as the probabilities is made once more
                total = logits.sigmoid_().mul_(foreground).sum((-2, -1))
                means = total / (mask_areas(foreground) + 1e-6)
        yield pack_masks(foreground) if packed else foreground, means if quality else None


def _maps(
    embeddings: Tensor, pixel_embedding: Tensor, frame: Frame, limits: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Mask logits (r, H/4, W/4) of a few queries at a time, and the limits of these (r, 4)."""
    made = pixel_embedding.shape[1:] if _in_one_pass(embeddings) else frame.canvas
    at_once = maps_at_once(max(math.prod(made), math.prod(frame.output)))
    features = pixel_embedding.flatten(1)
    halves = embeddings.dtype == features.dtype in (torch.float16, torch.bfloat16)
    # Products of two such numbers are exact in float32, in which tensor cores add them.
    in_float = halves and features.is_cuda and hasattr(torch.ops.aten.mm, "dtype")
    if not in_float:
        embeddings, features = embeddings.float(), features.float()
    for begin in range(0, len(embeddings), at_once):  # nothing at all where there are no queries
        few = slice(begin, begin + at_once)
        with torch.autocast(features.device.type, enabled=False):
            both = embeddings[few], features
            maps = torch.mm(*both, torch.float32) if in_float else torch.mm(*both)
        yield maps.unflatten(1, pixel_embedding.shape[1:]), None if limits is None else limits[few]


def _output_logits(maps: Tensor, limits: Tensor | None, frame: Frame) -> Tensor:
    if _in_one_pass(maps):
        sizes = frame.canvas, frame.image, frame.output
        logits = torch.ops.maskdino.resized_masks(maps, *sizes, False, False)[0]
    else:
        logits = resize_to_output(resize_to_canvas(maps, frame), frame)
    if limits is None:
        return logits
    boxes = output_boxes(limits, frame)
    return logits.masked_fill_(~pixels_inside(boxes, frame.output), -math.inf)


def _in_one_pass(maps: Tensor) -> bool:
    """Whether the compiled library resizes maps, without what lies between map and output."""
    # One that was built before it had this on a GPU lacks the second.
    operator = {"cpu": "resized_masks", "cuda": "resized_packed_masks"}.get(maps.device.type)
    return (
        operator is not None
        and not (is_traced() or maps.requires_grad)
        and has_compiled(operator, maps.device)
    )


def mask_areas(masks: Tensor) -> Tensor:
    """Pixels (N,) int32 of masks (N, OH, OW) bool."""
    if masks.device.type != "cpu" or torch.jit.is_tracing():
        # A GPU first makes numbers of the type of the sum, of all pixels.
        return masks.sum((-2, -1), dtype=torch.int32)
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.int32)


def mask_limits(boxes: Tensor, factor: float, things: Tensor | None = None) -> Tensor | None:
    """Where masks end at the latest: at the predicted boxes, enlarged by a factor.

    A model that has seen little knows where objects are long before its masks tell one object from
    the next: mask embeddings must learn positions, boxes know them. Inside of its box a mask of
    "some object" is the object's mask.

    Args:
        boxes: (..., 4) cx, cy, w, h.
        factor: TEST.MASK_LIMIT; 0: masks have no limit.
        things: (...) bool, which queries are things: stuff has no limit. None: all are.

    Returns:
        (..., 4), or None without a limit.
    """
    if not factor:
        return None
    center, size = boxes.float().split(2, dim=-1)
    size = size * factor
    if things is not None:
        size = torch.where(things[..., None], size, 4.0)  # from any place, this reaches everywhere
    return torch.cat([center, size], dim=-1)


def output_boxes(boxes: Tensor, frame: Frame) -> Tensor:
    """(R, 4) cx, cy, w, h of the canvas to xyxy pixels of the output."""
    height, width = (
        output * canvas / image
        for output, canvas, image in zip(frame.output, frame.canvas, frame.image, strict=True)
    )
    corners = cxcywh_to_xyxy(boxes.float())  # a tensor of our own
    corners[..., 0::2].mul_(width)
    corners[..., 1::2].mul_(height)
    return corners


def mask_parts(predictions: Predictions, pixel_embedding: Tensor | None) -> tuple[Tensor, Tensor]:
    """What masks are made of: mask embeddings (..., Q, C) and the pixel embedding.

    Raises:
        ValueError: the model has no mask branch.
    """
    if predictions.mask_embeddings is None or pixel_embedding is None:
        raise ValueError("a model without masks gives boxes only")
    return predictions.mask_embeddings, pixel_embedding


def coarse_frame(frame: Frame, values_per_pixel: int) -> Frame:
    """The frame, or for huge images one whose output has the network's size."""
    values = values_per_pixel * math.prod(frame.output)
    return frame if values <= MAP_VALUES_AT_ONCE else replace(frame, output=frame.image)


def full_size(labels: Tensor, frame: Frame) -> Tensor:
    """A map of integers at the size of the output."""
    if tuple(labels.shape) == frame.output:
        return labels
    # Integers below 2 ** 24 are exact in float32, which all interpolation knows.
    enlarged = F.interpolate(labels[None, None].float(), size=frame.output, mode="nearest-exact")
    return enlarged[0, 0].to(labels.dtype)
