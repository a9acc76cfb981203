"""From predictions to results in the frame of the image, for each of the tasks.

All functions treat one image. Those that need numbers on the host (how many objects there are)
also come as `function.steps`, for `maskdino.ops.host.run_steps`, which asks once for several tasks.

Shape key: Q queries, K classes, N best pairs of query and class, R pairs that are kept, U different
queries among them, C channels; canvas H, W; image h, w; output OH, OW pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from maskdino.ops.boxes import cxcywh_to_xyxy
from maskdino.ops.host import Steps, in_steps, to_device, true_first

ELEMENTS_AT_ONCE = 1 << 25  # resized mask probabilities that exist at one time (128 MiB of float32)


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


def output_masks(embeddings: Tensor, pixel_embedding: Tensor, frame: Frame) -> Iterator[Tensor]:
    """Mask logits of queries in the output frame, a few queries at a time: (r, OH, OW).

    They are float32, and not rounded to the type of the embeddings on the way.
    """
    pixels = max(frame.canvas[0] * frame.canvas[1], frame.output[0] * frame.output[1])
    at_once = max(1, ELEMENTS_AT_ONCE // pixels)
    embeddings, features = embeddings.float(), pixel_embedding.flatten(1).float()
    for begin in range(0, len(embeddings), at_once):  # nothing at all where there are no queries
        with torch.autocast(features.device.type, enabled=False):
            maps = torch.mm(embeddings[begin : begin + at_once], features)
        maps = maps.unflatten(1, pixel_embedding.shape[1:])
        yield resize_to_output(resize_to_canvas(maps, frame), frame)


def output_boxes(boxes: Tensor, frame: Frame) -> Tensor:
    """(R, 4) cx, cy, w, h of the canvas to xyxy pixels of the output."""
    height, width = (
        output * canvas / image
        for output, canvas, image in zip(frame.output, frame.canvas, frame.image, strict=True)
    )
    x, y = cxcywh_to_xyxy(boxes.float()).unflatten(-1, (2, 2)).unbind(-1)
    return torch.stack([x * width, y * height], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Pairs:
    """The best pairs of a query and a class, best first by class score."""

    scores: Tensor  # (R,)
    queries: Tensor  # (R,) int64
    labels: Tensor  # (R,) int64
    different: Tensor  # (U,) int64 the queries, each once, in ascending order
    which: Tensor  # (R,) int64 index into `different`
    counts: tuple[int, ...]  # U numbers of pairs, on the host


def best_pairs(
    class_scores: Tensor, max_detections: int, score_threshold: float, is_thing: Tensor | None
) -> Steps[Pairs]:
    """Chooses; arguments as of `instance_inference`. Asks the host once, for the numbers."""
    num_queries, num_classes = class_scores.shape
    number = min(max_detections, class_scores.numel())
    scores, index = class_scores.flatten().topk(number, sorted=True)
    queries, labels = index // num_classes, index % num_classes
    kept = scores >= score_threshold  # a mask's quality is at most 1: what is below stays below
    if is_thing is not None:
        kept = kept & is_thing[labels]
    counts = queries.new_zeros(num_queries).scatter_add_(0, queries, kept.long())
    (on_host,) = yield (counts,)
    numbers = tuple(count for count in on_host.tolist() if count)
    first = true_first(kept)[: sum(numbers)]
    used = counts > 0
    return Pairs(
        scores[first],
        queries[first],
        labels[first],
        true_first(used)[: len(numbers)],
        (used.cumsum(0) - 1)[queries[first]],
        numbers,
    )


@in_steps
def instance_inference(
    class_scores: Tensor,
    boxes: Tensor,
    mask_embeddings: Tensor | None,
    pixel_embedding: Tensor | None,
    frame: Frame,
    *,
    max_detections: int,
    score_threshold: float,
    mask_scoring: bool,
    is_thing: Tensor | None = None,
) -> Steps[Instances]:
    """Detection and instance segmentation.

    Args:
        class_scores: (Q, K) in [0, 1].
        boxes: (Q, 4) cx, cy, w, h of the canvas.
        mask_embeddings: (Q, C), or None without a mask branch.
        pixel_embedding: (C, H/4, W/4), or None.
        frame: the sizes.
        max_detections: that many best (query, class) pairs are kept.
        score_threshold: pairs with a lower final score are left out.
        mask_scoring: whether the score is multiplied by the mean mask probability over the mask.
        is_thing: (K,) bool; of the best pairs those of other classes are left out. None for all.

    Returns:
        `pred_boxes`, `scores`, `pred_classes` and, with a mask branch, `pred_masks` (R, OH, OW)
        bool, best first by class score.
    """
    if torch.jit.is_tracing():
        return _traced_instances(
            class_scores,
            boxes,
            mask_embeddings,
            pixel_embedding,
            frame,
            max_detections=max_detections,
            score_threshold=score_threshold,
            mask_scoring=mask_scoring,
            is_thing=is_thing,
        )
    pairs = yield from best_pairs(class_scores, max_detections, score_threshold, is_thing)
    scores, queries, labels = pairs.scores, pairs.queries, pairs.labels
    result = Instances(frame.output)
    if mask_embeddings is not None:
        embeddings = mask_embeddings[pairs.different]
        masks, quality = _masks_of_pairs(embeddings, pixel_embedding, frame, pairs)
        if mask_scoring:
            scores = scores * quality[pairs.which]
            kept = scores >= score_threshold
            (number,) = yield (kept.sum(),)
            if number < len(scores):
                index = true_first(kept)[: int(number)]
                scores, queries, labels = scores[index], queries[index], labels[index]
                masks = _moved_up(masks, index)
        result.pred_masks = masks
    result.pred_boxes = Boxes(output_boxes(boxes[queries], frame))
    result.scores = scores
    result.pred_classes = labels
    return result


def _traced_instances(
    class_scores: Tensor,
    boxes: Tensor,
    mask_embeddings: Tensor | None,
    pixel_embedding: Tensor | None,
    frame: Frame,
    *,
    max_detections: int,
    score_threshold: float,
    mask_scoring: bool,
    is_thing: Tensor | None,
) -> Instances:
    """`instance_inference` for torch.jit.trace: no number of one image shapes the program.

    So masks are made of every pair, also of those that share a query or are left out.
    """
    num_classes = class_scores.shape[1]
    scores, index = class_scores.flatten().topk(min(max_detections, class_scores.numel()))
    queries, labels = index // num_classes, index % num_classes
    kept = scores >= score_threshold
    if is_thing is not None:
        kept = kept & is_thing[labels]
    result = Instances(frame.output)
    if mask_embeddings is not None:
        found = masks_and_quality(mask_embeddings[queries], pixel_embedding, frame)
        masks, quality = (torch.cat(parts) for parts in zip(*found, strict=True))
        scores = scores * quality if mask_scoring else scores
        kept = kept & (scores >= score_threshold)
        result.pred_masks = masks[kept]
    result.pred_boxes = Boxes(output_boxes(boxes[queries[kept]], frame))
    result.scores = scores[kept]
    result.pred_classes = labels[kept]
    return result


def masks_and_quality(
    embeddings: Tensor, pixel_embedding: Tensor, frame: Frame
) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks (r, OH, OW) bool, a few at a time, and the mean probability (r,) over each."""
    for logits in output_masks(embeddings, pixel_embedding, frame):
        foreground = logits > 0
        total = (logits.sigmoid_() * foreground).sum((1, 2))
        yield foreground, total / (foreground.sum((1, 2)) + 1e-6)


def _masks_of_pairs(
    embeddings: Tensor, pixel_embedding: Tensor, frame: Frame, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """Masks (R, OH, OW) bool of pairs, and the quality (U,) of those of the queries.

    Each mask is written where it belongs: a large image has no room for another copy of all.
    """
    shape = (len(pairs.scores), *frame.output)
    masks = torch.empty(shape, dtype=torch.bool, device=embeddings.device)
    qualities = [embeddings.new_zeros(0, dtype=torch.float32)]
    rows, begin, end = pairs.which.argsort(stable=True), 0, 0
    for foreground, quality in masks_and_quality(embeddings, pixel_embedding, frame):
        first, last = end, end + sum(pairs.counts[begin : begin + len(foreground)])
        for some in rows[first:last].split(len(foreground)):
            masks.index_copy_(0, some, foreground[pairs.which[some] - begin])
        qualities.append(quality)
        begin, end = begin + len(foreground), last
    return masks, torch.cat(qualities)


def _moved_up(masks: Tensor, index: Tensor) -> Tensor:
    """`masks[index]` for ascending (r,) int64 indices, in the memory of `masks`."""
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, masks[0].numel()))
    for begin in range(0, len(index), at_once):
        some = index[begin : begin + at_once]
        masks[begin : begin + len(some)] = masks[some]
    return masks[: len(index)]


def semantic_inference(
    class_probs: Tensor,
    mask_embeddings: Tensor,
    pixel_embedding: Tensor,
    frame: Frame,
    *,
    sum_in_output_frame: bool,
) -> Tensor:
    """Semantic segmentation: mask times class probabilities, summed over queries.

    Args:
        class_probs: (Q, K).
        mask_embeddings: (Q, C).
        pixel_embedding: (C, H/4, W/4).
        frame: the sizes.
        sum_in_output_frame: whether mask logits are resized to the output before the sum (models
            that also do instance or panoptic segmentation), or the sum afterwards.

    Returns:
        (K, OH, OW) float32.
    """
    tile = frame if sum_in_output_frame else replace(frame, output=frame.image)
    shape, begin = (class_probs.shape[1], tile.output[0] * tile.output[1]), 0
    total = torch.zeros(shape, dtype=torch.float32, device=class_probs.device)
    for logits in output_masks(mask_embeddings, pixel_embedding, tile):
        probs = class_probs[begin : begin + len(logits)].float()
        total.addmm_(probs.t(), logits.sigmoid_().flatten(1))
        begin += len(logits)
    total = total.unflatten(1, tile.output)
    return total if sum_in_output_frame else resize_to_output(total, frame)


@in_steps
def panoptic_inference(
    keep: Tensor,
    scores: Tensor,
    labels: Tensor,
    mask_embeddings: Tensor,
    pixel_embedding: Tensor,
    frame: Frame,
    *,
    is_thing: Tensor,
    overlap_threshold: float,
) -> Steps[tuple[Tensor, list[dict]]]:
    """Panoptic segmentation: a pixel goes to the query of largest score times mask probability.

    Args:
        keep: (Q,) bool, which queries take part.
        scores, labels: (Q,) score and class of each query.
        mask_embeddings: (Q, C).
        pixel_embedding: (C, H/4, W/4).
        frame: the sizes.
        is_thing: (K,) bool.
        overlap_threshold: a segment is dropped when the pixels it wins are fewer than this share of
            the pixels where its own mask probability is at least 0.5.

    Returns:
        Segment ids (OH, OW) int32, 0 where there is none, and for each segment `id`, `isthing`,
        `category_id`, and for things `score`. Segments of one stuff class are merged.
    """
    (number,) = yield (keep.sum(),)
    if not number:
        return torch.zeros(frame.output, dtype=torch.int32, device=keep.device), []
    chosen = true_first(keep)[: int(number)]
    scores, labels = scores[chosen].float(), labels[chosen]
    winner, inside, own = _winners(scores, mask_embeddings[chosen], pixel_embedding, frame)
    won, left = _pixels_won(winner, inside, len(chosen))
    table = torch.stack([own, won, left, labels, is_thing[labels].long()])
    table, scores = yield table, scores
    ids, segments = _segments(table.tolist(), scores.tolist(), overlap_threshold)
    ids = to_device(ids, torch.int32, winner.device)
    return torch.where(inside, ids[winner], 0).to(torch.int32), segments


def _winners(
    scores: Tensor, embeddings: Tensor, pixel_embedding: Tensor, frame: Frame
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pixel the query (OH, OW) int64 with the largest score times probability, and whether
    it lies in that query's mask (OH, OW) bool; of each query its mask's area (U,) int64."""
    best = torch.full(frame.output, -1.0, device=scores.device)
    winner = torch.zeros(frame.output, dtype=torch.int64, device=scores.device)
    inside = torch.zeros(frame.output, dtype=torch.bool, device=scores.device)
    own_area, begin = [], 0
    for logits in output_masks(embeddings, pixel_embedding, frame):
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
    table: list[list[int]], scores: list[float], overlap_threshold: float
) -> tuple[list[int], list[dict]]:
    """Segment id of each query (0: none), and the segments."""
    ids, segments, stuff = [], [], {}
    for own, won, left, label, thing, score in zip(*table, scores, strict=True):
        if not (own and left) or won / own < overlap_threshold:
            ids.append(0)
        elif not thing and label in stuff:
            ids.append(stuff[label])
        else:
            segment = {"id": len(segments) + 1, "isthing": bool(thing), "category_id": label}
            segments.append(segment | {"score": score} if thing else segment)
            ids.append(segment["id"])
            if not thing:
                stuff[label] = segment["id"]
    return ids, segments
