"""Detection and instance segmentation of one image.

Shape key: Q queries, K classes, N best pairs of query and class, R pairs that are kept, U different
queries among them, C channels; output OH, OW pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from maskdino.ops.host import OnItsWay, Steps, true_first
from maskdino.ops.points import joined
from maskdino.ops.rle import encode_mask, encode_packed
from maskdino.postprocess.frame import (
    Frame,
    maps_at_once,
    mask_limits,
    mask_parts,
    output_boxes,
    output_foregrounds,
)
from maskdino.postprocess.options import InferenceOptions
from maskdino.structures import Predictions

UNCOUNTED_PIXELS = 1 << 26  # of masks that a GPU makes before it is known which are kept
MASK_BYTES_AT_ONCE = 1 << 27  # packed masks of one image that exist on the device at one time


@dataclass(frozen=True)
class Pairs:
    """The best pairs of a query and a class, best first by class score."""

    scores: Tensor  # (R,)
    queries: Tensor  # (R,) int64
    labels: Tensor  # (R,) int64
    kept: Tensor  # (R,) bool
    different: Tensor  # (U,) int64 the queries of which masks are made
    which: Tensor | None  # (R,) int64 index into `different`; None: each pair has a mask of its own
    counts: tuple[int, ...]  # U numbers of pairs, on the host, where there is `which`


class LateInstances(Instances):
    """Instances on their way from a GPU: who looks at their fields waits for them, in any thread.

    What the host has to do, as to encode masks, is done then.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        tensors: OnItsWay,
        made: Callable[[list[Tensor]], dict[str, Any]],
    ) -> None:
        super().__init__(image_size)
        self._tensors, self._made = tensors, made
        del self.__dict__["_fields"]  # which would hide those below

    @functools.cached_property
    def _fields(self) -> dict[str, Any]:
        return self._made(self._tensors.arrived())

    def __reduce__(self) -> tuple:
        """Copies, as those for other processes, are of what has arrived."""
        return _instances, (self.image_size, self._fields)


def top_pairs(
    class_logits: Tensor, options: InferenceOptions, is_thing: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses the best pairs of a query and a class.

    Args:
        class_logits: (..., Q, K).
        options: thresholds.
        is_thing: (K,) bool; only of panoptic models pairs with stuff are left out.

    Returns:
        (..., N) each: class scores, best first; queries; classes; and whether to keep a pair.
    """
    class_scores = options.class_scores(class_logits)
    num_queries, num_classes = class_scores.shape[-2:]
    number = min(options.max_detections, num_queries * num_classes)
    scores, index = class_scores.flatten(-2).topk(number, sorted=True)
    queries, labels = index // num_classes, index % num_classes
    # A mask's quality is at most 1: what is below stays below.
    kept = scores >= options.score_threshold
    if options.panoptic_on:
        kept = kept & is_thing[labels]
    return scores, queries, labels, kept


def _best_pairs(
    class_logits: Tensor, frame: Frame, options: InferenceOptions, is_thing: Tensor
) -> Steps[Pairs]:
    """The best pairs; those that are kept, where the host asks for their numbers.

    While a GPU waits for the host it can make many masks that nobody needs, if they are small.
    """
    scores, queries, labels, kept = top_pairs(class_logits, options, is_thing)
    # No number of one image may shape a traced program.
    uncounted = torch.jit.is_tracing() or (
        scores.device.type != "cpu"
        and 0 < len(scores) * math.prod(frame.output) <= UNCOUNTED_PIXELS
    )
    if uncounted:
        return Pairs(scores, queries, labels, kept, queries, None, ())
    counts = queries.new_zeros(class_logits.shape[0]).scatter_add_(0, queries, kept.long())
    (on_host,) = yield (counts,)
    numbers = tuple(count for count in on_host.tolist() if count)
    first = true_first(kept)[: sum(numbers)]
    used = counts > 0
    return Pairs(
        scores[first],
        queries[first],
        labels[first],
        kept[first],
        true_first(used)[: len(numbers)],
        (used.cumsum(0) - 1)[queries[first]],
        numbers,
    )


def instance_steps(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    frame: Frame,
    options: InferenceOptions,
    is_thing: Tensor,
    compact: bool,
    features: bool,
) -> Steps[Instances]:
    """Detection and instance segmentation; see `postprocess`."""
    pairs = yield from _best_pairs(predictions.class_logits, frame, options, is_thing)
    fields = {
        "pred_boxes": output_boxes(predictions.boxes[pairs.queries], frame),
        "scores": pairs.scores,
        "pred_classes": pairs.labels,
    }
    if features:
        if predictions.content is None:
            raise ValueError("this network, as exported ones, gives no features of objects")
        fields["features"] = predictions.content[pairs.queries].float()
    encoded, quality, kept = None, list[Tensor](), pairs.kept
    if predictions.mask_embeddings is not None:
        embeddings, pixel_embedding = mask_parts(predictions, pixel_embedding)
        limits = mask_limits(predictions.boxes, options.mask_limit)
        limits = None if limits is None else limits[pairs.different]
        wanted = embeddings[pairs.different], pixel_embedding, frame, limits
        packed = compact and embeddings.device.type != "cpu"
        found = output_foregrounds(*wanted, quality=options.mask_scoring, packed=packed)
        parts = _foregrounds(found, quality)
        if compact:
            encoded = yield from _encoded(parts, frame)
        else:
            fields["pred_masks"] = _written(parts, pairs, frame)
    if quality:
        means = joined(quality)
        fields["scores"] = pairs.scores * (means if pairs.which is None else means[pairs.which])
        kept = kept & (fields["scores"] >= options.score_threshold)
    if compact:
        later = options.run_lengths and kept.is_cuda
        return (yield from _on_host(fields, kept, pairs, encoded, frame, later=later))
    if torch.jit.is_tracing():
        return _as_instances({name: value[kept] for name, value in fields.items()}, frame)
    if quality or pairs.which is None:
        masks, order = fields.pop("pred_masks", None), true_first(kept)
        fields = {name: value[order] for name, value in fields.items()}
        (on_host,) = yield (kept,)
        index = order[: np.count_nonzero(on_host)]
        fields = {name: value[: len(index)] for name, value in fields.items()}
        if masks is not None:
            # A view of small masks would keep those in memory that are left out.
            copied = pairs.which is None and len(index) < len(masks)
            fields["pred_masks"] = masks[index] if copied else _moved_up(masks, index)
    return _as_instances(fields, frame)


def _as_instances(fields: dict, frame: Frame) -> Instances:
    fields["pred_boxes"] = Boxes(fields["pred_boxes"])
    return _instances(frame.output, fields)


def _instances(size: tuple[int, int], fields: dict) -> Instances:
    return Instances(size, **fields)


def mean_probability(probs: Tensor, foreground: Tensor) -> Tensor:
    """Mean of probabilities (..., OH, OW) over each mask, bool of this shape: (...)."""
    return (probs * foreground).sum((-2, -1)) / (foreground.sum((-2, -1)) + 1e-6)


def _foregrounds(
    found: Iterator[tuple[Tensor, Tensor | None]], quality: list[Tensor]
) -> Iterator[Tensor]:
    """Masks as `found` has them, a few at a time; `quality` gets the mean probability over each."""
    for foreground, means in found:
        if means is not None:
            quality.append(means)
        yield foreground


def _written(parts: Iterator[Tensor], pairs: Pairs, frame: Frame) -> Tensor:
    """Masks (R, OH, OW) bool of the pairs, from those of the U queries.

    Each mask is written where it belongs: a large image has no room for another copy of all.
    """
    if pairs.which is None:
        return joined(list(parts))
    shape = (len(pairs.scores), *frame.output)
    masks = torch.empty(shape, dtype=torch.bool, device=pairs.scores.device)
    rows, begin, end = pairs.which.argsort(stable=True), 0, 0
    for foreground in parts:
        first, last = end, end + sum(pairs.counts[begin : begin + len(foreground)])
        for some in rows[first:last].split(len(foreground)):
            masks.index_copy_(0, some, foreground[pairs.which[some] - begin])
        begin, end = begin + len(foreground), last
    return masks


def _encoded(parts: Iterator[Tensor], frame: Frame) -> Steps[tuple[list[dict], list[Tensor]]]:
    """Masks of the U queries, of a GPU packed: run lengths of those on the host, and the last."""
    rles: list[dict] = []
    packed: list[Tensor] = []
    for foreground in parts:
        if foreground.device.type == "cpu":
            rles += [encode_mask(mask) for mask in foreground.numpy()]
            continue
        packed.append(foreground)
        if sum(part.numel() for part in packed) >= MASK_BYTES_AT_ONCE:
            rles += _unpacked((yield packed), frame)
            packed = []
    return rles, packed


def _unpacked(packed: Iterable[Tensor], frame: Frame) -> list[dict]:
    """Run lengths of packed masks on the host."""
    return [rle for part in packed for rle in encode_packed(part.numpy(), frame.output)]


def _on_host(
    fields: dict[str, Tensor],
    kept: Tensor,
    pairs: Pairs,
    encoded: tuple[list[dict], list[Tensor]] | None,
    frame: Frame,
    *,
    later: bool,
) -> Steps[Instances]:
    """The objects that are kept, on the host, perhaps later."""
    before, last = ([], []) if encoded is None else encoded
    names, with_masks, counted = tuple(fields), encoded is not None, pairs.which is not None

    def made(found: list[Tensor]) -> dict[str, Any]:
        # Holds nothing of the GPU's, whose memory is free as soon as the copies are on their way.
        values, (kept, which, *masks) = found[: len(names)], found[len(names) :]
        index = kept.nonzero()[:, 0]
        result: dict[str, Any] = dict(zip(names, (value[index] for value in values), strict=True))
        result["pred_boxes"] = Boxes(result["pred_boxes"])
        if with_masks:
            if not counted:  # masks of one query are equal
                _, first, query = np.unique(which, return_index=True, return_inverse=True)
                which = torch.from_numpy(first[query])
            rows = which[index].tolist()
            rles = dict(enumerate(before))
            if there := sorted({row for row in rows if row >= len(before)}):
                packed = joined(masks)[[row - len(before) for row in there]]
                rles |= zip(there, _unpacked([packed], frame), strict=True)
            result["pred_rles"] = [dict(rles[row]) for row in rows]
        return result

    which = pairs.queries if pairs.which is None else pairs.which
    asked = (*fields.values(), kept, which, *last)
    if later:
        return LateInstances(frame.output, OnItsWay(asked), made)
    return _instances(frame.output, made((yield asked)))


def _moved_up(masks: Tensor, index: Tensor) -> Tensor:
    """`masks[index]` for ascending (r,) int64 indices, in the memory of `masks`."""
    if len(index) == len(masks):
        return masks
    at_once = maps_at_once(masks[0].numel())
    for begin in range(0, len(index), at_once):
        some = index[begin : begin + at_once]
        masks[begin : begin + len(some)] = masks[some]
    return masks[: len(index)]
