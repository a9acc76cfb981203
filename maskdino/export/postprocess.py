"""Post-processing of whole batches as one program of fixed shapes, for exported networks.

The formulas are those of `maskdino.postprocess`, which treats one image at a time and computes only
what the result shows. A program that is traced once cannot choose what to compute: here all queries
are computed, and what is left out of the result gets the score 0.

Shape key: B images, Q queries, K classes, N detections, C channels; H, W pixels of the masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops.boxes import cxcywh_to_xyxy, pixels_inside
from maskdino.ops.points import mask_logits
from maskdino.postprocess import InferenceOptions
from maskdino.postprocess.frame import mask_limits, mask_parts
from maskdino.postprocess.instances import mean_probability, top_pairs
from maskdino.postprocess.panoptic import is_segment, leading_queries, segment_candidates
from maskdino.structures import Predictions

Size = tuple[int, int]


def results(
    task: str,
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    image_sizes: Tensor | None,
    canvas: Size,
    mask_size: Size,
    options: InferenceOptions,
    is_thing: Tensor,
) -> dict[str, Tensor]:
    """What `instances`, `panoptic` or `semantic` gives, whichever the task names.

    Raises:
        ValueError: the task needs `image_sizes` (B, 2), see `inside_image`, and there are none.
    """
    if task == "semantic":
        return semantic(predictions, pixel_embedding, mask_size, options)
    if image_sizes is None:
        raise ValueError(f"outputs {task!r} need the sizes of the images")
    inside = inside_image(image_sizes, canvas, mask_size)
    if task == "panoptic":
        return panoptic(predictions, pixel_embedding, inside, mask_size, options, is_thing)
    return instances(predictions, pixel_embedding, inside, canvas, mask_size, options, is_thing)


def instances(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    inside: Tensor,
    canvas: Size,
    mask_size: Size,
    options: InferenceOptions,
    is_thing: Tensor,
) -> dict[str, Tensor]:
    """The best objects of each image.

    Args:
        predictions: of the last layer, (B, Q, ...).
        pixel_embedding: (B, C, H/4, W/4), or None without a mask branch.
        inside: (B, H, W) bool, which pixels of a mask belong to the image.
        canvas: (height, width) of the padded images.
        mask_size: (height, width) of the masks.
        options: how predictions become results.
        is_thing: (K,) bool.

    Returns:
        `boxes` (B, N, 4) x0, y0, x1, y1 in pixels of the input, `scores` (B, N) and `labels`
        (B, N), best class score first, and with a mask branch `masks` (B, N, H, W) bool. N is
        TEST.DETECTIONS_PER_IMAGE; the score of what is left out (below the threshold, or stuff of
        a panoptic model) is 0.
    """
    scores, queries, labels, kept = top_pairs(predictions.class_logits, options, is_thing)
    chosen = predictions.map(lambda x: x.gather(1, queries[..., None].expand(-1, -1, x.shape[2])))
    found = {"boxes": cxcywh_to_xyxy(chosen.boxes.float()) * _pixels_per_canvas(canvas, scores)}
    if predictions.mask_embeddings is not None:
        limits = mask_limits(chosen.boxes, options.mask_limit)
        maps = mask_maps(chosen, pixel_embedding, mask_size, limits)
        found["masks"] = (maps > 0) & inside[:, None]
        if options.mask_scoring:
            scores = scores * mean_probability(maps.sigmoid(), found["masks"])
            kept = kept & (scores >= options.score_threshold)
    return {**found, "scores": scores * kept, "labels": labels}


def semantic(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    mask_size: Size,
    options: InferenceOptions,
) -> dict[str, Tensor]:
    """`class_maps` (B, K, H, W) float32: sums over queries of class times mask probability."""
    probs = options.class_probs(predictions.class_logits)
    maps = mask_maps(predictions, pixel_embedding, mask_size).sigmoid()
    total = torch.bmm(probs.transpose(1, 2), maps.flatten(2))
    return {"class_maps": total.unflatten(2, mask_size)}


def panoptic(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    inside: Tensor,
    mask_size: Size,
    options: InferenceOptions,
    is_thing: Tensor,
) -> dict[str, Tensor]:
    """Segments that do not overlap; arguments as for `instances`.

    Returns:
        `segment_ids` (B, H, W) int64: 0 where there is none, else 1 + the query of the segment;
        and by query `segment_labels` (B, Q), `segment_scores` (B, Q), 0 for queries that are no
        segment. Segments of one stuff class are merged into the first.
    """
    takes_part, scores, labels = segment_candidates(predictions.class_logits, options)
    limits = mask_limits(predictions.boxes, options.mask_limit, is_thing[labels])
    probs = mask_maps(predictions, pixel_embedding, mask_size, limits).sigmoid()
    foreground = (probs >= 0.5) & inside[:, None]
    weights = torch.where(takes_part, scores, -1.0)
    winner = (probs * weights[..., None, None]).argmax(1)  # (B, H, W)
    won_inside = foreground.gather(1, winner[:, None])[:, 0]
    own = foreground.sum((2, 3))
    won = _count(winner, inside, own)
    left = _count(winner, won_inside, own)
    valid = takes_part & is_segment(own, won, left, options)
    leading = leading_queries(labels, valid, is_thing[labels])
    ids = torch.where(valid, leading + 1, 0)
    shown = ids.gather(1, winner.flatten(1)).unflatten(1, mask_size)
    leads = valid & (leading == torch.arange(leading.shape[1], device=leading.device))
    return {
        "segment_ids": torch.where(won_inside, shown, 0),
        "segment_labels": labels,
        "segment_scores": scores * leads,
    }


def mask_maps(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    mask_size: Size,
    limits: Tensor | None = None,
) -> Tensor:
    """Mask logits (B, N, H, W) float32 at a size; -inf beyond limits (B, N, 4), if any."""
    maps = mask_logits(*mask_parts(predictions, pixel_embedding)).float()
    if tuple(maps.shape[2:]) != mask_size:
        maps = F.interpolate(maps, size=mask_size, mode="bilinear", align_corners=False)
    if limits is None:
        return maps
    boxes = cxcywh_to_xyxy(limits) * _pixels_per_canvas(mask_size, limits)
    return maps.masked_fill(~pixels_inside(boxes, mask_size), -torch.inf)


def inside_image(image_sizes: Tensor, canvas: Size, mask_size: Size) -> Tensor:
    """Which pixels of masks lie in the image.

    Args:
        image_sizes: (B, 2) int64 height and width of each image on its padded canvas.
        canvas: (height, width) in pixels.
        mask_size: (height, width) of the masks.

    Returns:
        (B, H, W) bool: True where the pixel's center lies in the image.
    """
    rows, columns = (
        (torch.arange(length, device=image_sizes.device) + 0.5) * edge < size[:, None] * length
        for size, edge, length in zip(image_sizes.unbind(1), canvas, mask_size, strict=True)
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
