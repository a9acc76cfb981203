"""Panoptic segmentation of one image.

Shape key: Q queries, K classes, U queries that take part, C channels; output OH, OW pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maskdino.ops.host import Steps, asked_early, to_device, true_first
from maskdino.ops.points import joined
from maskdino.postprocess.frame import (
    Frame,
    coarse_frame,
    full_size,
    mask_areas,
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
    class_scores = options.class_scores(class_logits)
    scores, labels = options.competing(class_scores).max(-1)
    return class_scores.amax(-1) > options.panoptic_score_threshold, scores, labels


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
    # All that can be launched before the host knows how many take part.
    order = true_first(takes_part)
    scores, labels, embeddings = scores[order].float(), labels[order], embeddings[order]
    things, limits = is_thing[labels], None
    if options.mask_limit:
        limits = mask_limits(predictions.boxes[order], options.mask_limit, things)
    number = int((yield from asked_early(takes_part)).sum())
    device = torch.device("cpu") if on_host else scores.device
    if not number:
        return torch.zeros(frame.output, dtype=torch.int32, device=device), []
    chosen = slice(number)
    scores, labels, things = scores[chosen], labels[chosen], things[chosen]
    limits = None if limits is None else limits[chosen]
    masks = output_masks(embeddings[chosen], pixel_embedding, made, limits)
    places, areas = _places(scores, masks)
    asked = areas, _pixels_won(places, number), labels, things, scores
    found = yield (*asked, *([places.to(torch.int32)] if on_host else []))
    numbers, segments = _segments(options, *found[: len(asked)])
    number_of = to_device(numbers, torch.int32, device)
    places = found[-1] if on_host else places
    ids = number_of.index_select(0, places.flatten()).view(places.shape)
    return full_size(ids, frame), segments


def _places(scores: Tensor, mask_logits: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """To which query each pixel of a map goes.

    Returns:
        (OH, OW) int64, twice the query with the largest score times probability, and 1 more where
        the pixel lies in that query's mask; and of each query its mask's area (U,) int32.
    """
    areas, begin = list[Tensor](), 0
    for logits in mask_logits:
        probs = logits.sigmoid_()
        weighted, query = (probs * scores[begin : begin + len(probs), None, None]).max(0)
        own = probs >= 0.5
        areas.append(mask_areas(own))
        found = torch.add(own.gather(0, query[None])[0], query, alpha=2)
        if not begin:
            best, places = weighted, found
        else:
            better = weighted > best
            best = torch.where(better, weighted, best)
            places = torch.where(better, found + 2 * begin, places)
        begin += len(probs)
    return places, joined(areas)


def _pixels_won(places: Tensor, number: int) -> Tensor:
    """Pixels (U, 2) int64 that each query wins outside of its mask and in it.

    Each column of the image has counters of its own, as many threads that add to one would queue.
    """
    width = places.shape[1]
    column = torch.arange(width, device=places.device)
    counter = torch.add(column, places, alpha=width).flatten()
    counts = counter.new_zeros(number * 2 * width)
    counts.scatter_add_(0, counter, counter.new_ones(1).expand(len(counter)))
    return counts.view(number, 2, width).sum(2)


def _segments(
    options: InferenceOptions,
    areas: Tensor,
    won: Tensor,
    labels: Tensor,
    things: Tensor,
    scores: Tensor,
) -> tuple[list[int], list[dict]]:
    """The segments, and the number of that (0: none) to which each of a map's places belongs.

    Args:
        options: as for `is_segment`.
        areas: (U,) pixels of the masks; on the host, as the others.
        won: (U, 2) see `_pixels_won`.
        labels: (U,) classes.
        things: (U,) bool.
        scores: (U,).
    """
    valid = is_segment(areas.double(), won.sum(1), won[:, 1], options)
    leading = leading_queries(labels, valid, things).tolist()
    classes, is_thing, probs = labels.tolist(), things.tolist(), scores.tolist()
    numbers, segments = [0] * (2 * len(leading)), list[dict]()
    for query in valid.nonzero()[:, 0].tolist():
        if leading[query] == query:
            thing = is_thing[query]
            segment = {"id": len(segments) + 1, "isthing": thing, "category_id": classes[query]}
            segments.append(segment | ({"score": probs[query]} if thing else {}))
            numbers[2 * query + 1] = len(segments)
        numbers[2 * query + 1] = numbers[2 * leading[query] + 1]
    return numbers, segments
