"""Panoptic segmentation of one image.

Shape key: Q queries, K classes, U queries that take part, C channels; output OH, OW pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maskdino.ops.host import Steps, to_device, true_first
from maskdino.postprocess.frame import (
    Frame,
    coarse_frame,
    full_size,
    mask_limits,
    mask_parts,
    output_masks,
)
from maskdino.postprocess.options import InferenceOptions
from maskdino.structures import Predictions

VALUES_PER_PIXEL = 8  # of a map while it is made


def segment_candidates(
    class_logits: Tensor, options: InferenceOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., Q, K) logits to which queries take part in panoptic results, their scores, classes."""
    best = options.class_scores(class_logits).amax(-1)
    scores, labels = options.class_probs(class_logits).max(-1)
    return best > options.panoptic_score_threshold, scores, labels


def is_segment(own: Tensor, won: Tensor, left: Tensor, options: InferenceOptions) -> Tensor:
    """Whether enough is left of queries; all (..., Q), in pixels.

    Args:
        own: where a query's own mask probability is at least 0.5.
        won: where its score times mask probability is the largest.
        left: both.
        options: the share of the former that must be won.
    """
    return (own > 0) & (left > 0) & (won >= options.panoptic_overlap_threshold * own)


def leading_queries(labels: Tensor, valid: Tensor, things: Tensor) -> Tensor:
    """Which query leads the segment of each: itself or, of stuff, the first of its class.

    Args:
        labels: (..., Q) int64 classes.
        valid: (..., Q) bool, which queries are segments.
        things: (..., Q) bool, which are things.
    """
    itself = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
    stuff = valid & ~things
    same = (labels[..., :, None] == labels[..., None, :]) & stuff[..., None, :]
    return torch.where(stuff, same.to(torch.int64).argmax(-1), itself)


def panoptic_steps(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    frame: Frame,
    options: InferenceOptions,
    is_thing: Tensor,
    compact: bool,
    on_host: bool,
) -> Steps[tuple[Tensor, list[dict]]]:
    """A pixel goes to the query of largest score times mask probability; see `postprocess`."""
    embeddings, pixel_embedding = mask_parts(predictions, pixel_embedding)
    takes_part, scores, labels = segment_candidates(predictions.class_logits, options)
    made = coarse_frame(frame, VALUES_PER_PIXEL) if compact else frame
    (number,) = yield (takes_part.sum(),)
    device = torch.device("cpu") if on_host else scores.device
    if not number:
        return torch.zeros(frame.output, dtype=torch.int32, device=device), []
    chosen = true_first(takes_part)[: int(number)]
    scores, labels = scores[chosen].float(), labels[chosen]
    limits = mask_limits(predictions.boxes[chosen], options.mask_limit, is_thing[labels])
    masks = output_masks(embeddings[chosen], pixel_embedding, made, limits)
    winner, inside, own = _winners(scores, masks, made.output)
    won, left = _pixels_won(winner, inside, len(chosen))
    table = torch.stack([own, won, left, labels, is_thing[labels].long()])
    rows = torch.where(inside, winner + 1, 0).to(torch.int32)  # of the table, or 0
    table, scores, *copy = yield table, scores, *([rows] if on_host else [])
    numbers, segments = _segments(table, scores, options)
    rows, number_of = copy[0] if on_host else rows, to_device([0, *numbers], torch.int32, device)
    ids = number_of.index_select(0, rows.flatten()).view(rows.shape)
    return full_size(ids, frame), segments


def _winners(
    scores: Tensor, mask_logits: Iterator[Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """To which query each pixel of a map goes.

    Returns:
        The query (OH, OW) int64 with the largest score times probability; whether the pixel lies in
        that query's mask (OH, OW) bool; and of each query its mask's area (U,) int64.
    """
    best = torch.full(size, -1.0, device=scores.device)
    winner = torch.zeros(size, dtype=torch.int64, device=scores.device)
    inside = torch.zeros(size, dtype=torch.bool, device=scores.device)
    own_area, begin = [], 0
    for logits in mask_logits:
        probs = logits.sigmoid_()
        own_area.append((probs >= 0.5).sum((1, 2)))
        weighted, index = (probs * scores[begin : begin + len(probs), None, None]).max(0)
        better = weighted > best
        best = torch.where(better, weighted, best)
        winner = torch.where(better, index + begin, winner)
        inside = torch.where(better, probs.gather(0, index[None])[0] >= 0.5, inside)
        begin += len(probs)
    return winner, inside, torch.cat(own_area)


def _pixels_won(winner: Tensor, inside: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Pixels (U,) int64 that each query wins, and those of them that lie in its mask.

    Each column of the image has counters of its own, as many threads that add to one would queue.
    """
    width = winner.shape[1]
    column = torch.arange(width, device=winner.device)
    counter = ((2 * winner + inside) * width + column).flatten()
    counts = counter.new_zeros(number * 2 * width)
    counts.scatter_add_(0, counter, counter.new_ones(1).expand(len(counter)))
    counts = counts.view(number, 2, width).sum(2)
    return counts.sum(1), counts[:, 1]


def _segments(
    table: Tensor, scores: Tensor, options: InferenceOptions
) -> tuple[list[int], list[dict]]:
    """The number of each query's segment (0: none), and the segments.

    Args:
        table: (5, U) int64, on the host: the areas of `is_segment`, class, and whether a thing.
        scores: (U,).
        options: as for `is_segment`.
    """
    own, won, left, labels, things = table
    valid = is_segment(own.double(), won, left, options)
    leading = leading_queries(labels, valid, things.bool()).tolist()
    numbers, segments = [0] * len(leading), list[dict]()
    for query in valid.nonzero()[:, 0].tolist():
        if leading[query] == query:
            thing = bool(things[query])
            segment = {"id": len(segments) + 1, "isthing": thing}
            segment["category_id"] = int(labels[query])
            segments.append(segment | ({"score": float(scores[query])} if thing else {}))
            numbers[query] = len(segments)
        numbers[query] = numbers[leading[query]]
    return numbers, segments
