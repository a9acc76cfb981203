"""Post-processing of whole batches as one program of fixed shapes, for exported networks.

`maskdino.postprocess` computes the same for one image at a time, and spends work only where there
is something; a program that is traced once cannot choose, so here every query counts, and what is
left out has the score 0.

Shape key: B images, Q queries, K classes, N detections, C channels; H, W pixels of the masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.model import InferenceOptions
from maskdino.ops.boxes import cxcywh_to_xyxy
from maskdino.ops.points import mask_logits
from maskdino.structures import Predictions

Size = tuple[int, int]


def instances(
    predictions: Predictions,
    pixels: Tensor | None,
    inside: Tensor,
    canvas: Size,
    mask_size: Size,
    inference: InferenceOptions,
    is_thing: Tensor,
) -> dict[str, Tensor]:
    """The best objects of each image.

    Args:
        predictions: of the last layer, (B, Q, ...).
        pixels: the pixel embedding (B, C, H/4, W/4), or None without a mask branch.
        inside: (B, H, W) bool, which pixels of a mask belong to the image.
        canvas: (height, width) of the padded images.
        mask_size: (height, width) of the masks.
        inference: how predictions become results.
        is_thing: (K,) bool.

    Returns:
        `boxes` (B, N, 4) x0, y0, x1, y1 in pixels of the input, `scores` (B, N) and `labels`
        (B, N), best class score first, and with a mask branch `masks` (B, N, H, W) bool. N is
        TEST.DETECTIONS_PER_IMAGE; the score of what is left out (below the threshold, or stuff of
        a panoptic model) is 0.
    """
    class_scores = inference.class_scores(predictions.class_logits)
    _, queries, classes = class_scores.shape
    scores, index = class_scores.flatten(1).topk(min(inference.max_detections, queries * classes))
    query, label = index // classes, index % classes
    kept = scores >= inference.score_threshold
    if inference.panoptic_on:
        kept = kept & is_thing[label]
    chosen = predictions.map(lambda x: x.gather(1, query[..., None].expand(-1, -1, x.shape[2])))
    found = {"boxes": cxcywh_to_xyxy(chosen.boxes.float()) * _pixels_per_canvas(canvas, scores)}
    if pixels is not None:
        maps = mask_maps(chosen.mask_embeddings, pixels, mask_size)
        found["masks"] = (maps > 0) & inside[:, None]
        if inference.mask_scoring:
            total = (maps.sigmoid() * found["masks"]).sum((2, 3))
            scores = scores * total / (found["masks"].sum((2, 3)) + 1e-6)
            kept = kept & (scores >= inference.score_threshold)
    return {**found, "scores": scores * kept, "labels": label}


def semantic(
    predictions: Predictions,
    pixels: Tensor,
    mask_size: Size,
    inference: InferenceOptions,
) -> dict[str, Tensor]:
    """`class_maps` (B, K, H, W) float32: sums over queries of class times mask probability."""
    probs = inference.class_probs(predictions.class_logits)
    maps = mask_maps(predictions.mask_embeddings, pixels, mask_size).sigmoid()
    total = torch.bmm(probs.transpose(1, 2), maps.flatten(2))
    return {"class_maps": total.unflatten(2, tuple(mask_size))}


def panoptic(
    predictions: Predictions,
    pixels: Tensor,
    inside: Tensor,
    mask_size: Size,
    inference: InferenceOptions,
    is_thing: Tensor,
) -> dict[str, Tensor]:
    """Segments that do not overlap; arguments as for `instances`.

    Returns:
        `segment_ids` (B, H, W) int64: 0 where there is none, else 1 + the query of the segment;
        and by query `segment_labels` (B, Q), `segment_scores` (B, Q), 0 for queries that are no
        segment. Segments of one stuff class are merged into the first.
    """
    best = inference.class_scores(predictions.class_logits).amax(-1)
    scores, labels = inference.class_probs(predictions.class_logits).max(-1)
    takes_part = best > inference.panoptic_score_threshold  # (B, Q)
    probs = mask_maps(predictions.mask_embeddings, pixels, mask_size).sigmoid()
    foreground = (probs >= 0.5) & inside[:, None]
    weights = torch.where(takes_part, scores, -1.0)
    winner = (probs * weights[..., None, None]).argmax(1)  # (B, H, W)
    won_inside = foreground.gather(1, winner[:, None])[:, 0]
    own = foreground.sum((2, 3))
    won = _count(winner, inside, own)
    left = _count(winner, won_inside, own)
    enough = won >= inference.panoptic_overlap_threshold * own
    is_segment = takes_part & (own > 0) & (left > 0) & enough
    number = _first_of_class(labels, is_segment, is_thing)
    ids = torch.where(is_segment, number + 1, 0)
    shown = ids.gather(1, winner.flatten(1)).unflatten(1, tuple(mask_size))
    leads = is_segment & (number == torch.arange(number.shape[1], device=number.device))
    return {
        "segment_ids": torch.where(won_inside, shown, 0),
        "segment_labels": labels,
        "segment_scores": scores * leads,
    }


def mask_maps(embeddings: Tensor, pixels: Tensor, mask_size: Size) -> Tensor:
    """Mask logits (B, N, H, W) float32 at a size."""
    maps = mask_logits(embeddings, pixels).float()
    if tuple(maps.shape[2:]) == tuple(mask_size):
        return maps
    return F.interpolate(maps, size=mask_size, mode="bilinear", align_corners=False)


def inside_image(image_sizes: Tensor, canvas: Size, mask_size: Size) -> Tensor:
    """Which pixels of masks lie in the image.

    Args:
        image_sizes: (B, 2) int64 height and width of each image on its padded canvas.
        canvas, mask_size: (height, width).

    Returns:
        (B, H, W) bool: True where the pixel's centre lies in the image.
    """
    rows, columns = (
        (torch.arange(pixels, device=image_sizes.device) + 0.5) * edge < size[:, None] * pixels
        for size, edge, pixels in zip(image_sizes.unbind(1), canvas, mask_size, strict=True)
    )
    return rows[:, :, None] & columns[:, None]


def _pixels_per_canvas(canvas: Size, like: Tensor) -> Tensor:
    """(4,) width, height, width, height; filled, so that a size that varies stays a variable."""
    height, width = canvas
    return torch.cat([like.new_full((1,), edge) for edge in (width, height, width, height)])


def _count(winner: Tensor, where: Tensor, like: Tensor) -> Tensor:
    """How many pixels (of those in `where`) each query has won: (B, Q)."""
    ones = where.flatten(1).to(like.dtype)
    return torch.zeros_like(like).scatter_add(1, winner.flatten(1), ones)


def _first_of_class(labels: Tensor, is_segment: Tensor, is_thing: Tensor) -> Tensor:
    """(B, Q) whose segment each query is part of: its own, or the first of its stuff class."""
    own = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    stuff = is_segment & ~is_thing[labels]
    same = (labels[:, :, None] == labels[:, None]) & stuff[:, None] & stuff[:, :, None]
    return torch.where(stuff, same.to(torch.int64).argmax(2), own)
