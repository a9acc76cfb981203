"""From predictions to results in the frame of the image, for each of the tasks.

Shape key: Q queries, K classes, R results, C channels; canvas H, W; image h, w; output OH, OW
pixels. All functions treat one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from maskdino.ops.boxes import cxcywh_to_xyxy

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
    """Mask logits of queries in the output frame, a few queries at a time: (r, OH, OW) float32."""
    pixels = max(frame.canvas[0] * frame.canvas[1], frame.output[0] * frame.output[1])
    at_once = max(1, ELEMENTS_AT_ONCE // pixels)
    for begin in range(0, len(embeddings), at_once):  # nothing at all where there are no queries
        part = embeddings[begin : begin + at_once]
        maps = torch.mm(part, pixel_embedding.flatten(1)).float()
        maps = maps.unflatten(1, pixel_embedding.shape[1:])
        yield resize_to_output(resize_to_canvas(maps, frame), frame)


def output_boxes(boxes: Tensor, frame: Frame) -> Tensor:
    """(R, 4) cx, cy, w, h of the canvas to xyxy pixels of the output."""
    height, width = (
        output * canvas / image
        for output, canvas, image in zip(frame.output, frame.canvas, frame.image, strict=True)
    )
    return cxcywh_to_xyxy(boxes.float()) * boxes.new_tensor(
        [width, height, width, height], dtype=torch.float32
    )


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
) -> Instances:
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
    num_classes = class_scores.shape[1]
    number = min(max_detections, class_scores.numel())
    scores, index = class_scores.flatten().topk(number, sorted=True)
    query, label = index // num_classes, index % num_classes
    kept = scores >= score_threshold  # a mask's quality is at most 1: what is below stays below
    if is_thing is not None:
        kept = kept & is_thing[label]
    scores, query, label = scores[kept], query[kept], label[kept]
    result = Instances(frame.output)
    if mask_embeddings is not None:
        unique, which = query.unique(return_inverse=True)
        masks, quality = _masks_and_quality(mask_embeddings[unique], pixel_embedding, frame)
        if mask_scoring:
            scores = scores * quality[which]
        keep = scores >= score_threshold
        scores, query, label, which = scores[keep], query[keep], label[keep], which[keep]
        result.pred_masks = masks[which]
    result.pred_boxes = Boxes(output_boxes(boxes[query], frame))
    result.scores = scores
    result.pred_classes = label
    return result


def _masks_and_quality(
    embeddings: Tensor, pixel_embedding: Tensor, frame: Frame
) -> tuple[Tensor, Tensor]:
    """Masks (R, OH, OW) bool and the mean probability (R,) over the foreground of each."""
    masks = torch.empty(len(embeddings), *frame.output, dtype=torch.bool, device=embeddings.device)
    quality, begin = [embeddings.new_zeros(0, dtype=torch.float32)], 0
    for logits in output_masks(embeddings, pixel_embedding, frame):
        foreground = masks[begin : begin + len(logits)]
        torch.gt(logits, 0, out=foreground)
        total = (logits.sigmoid_() * foreground).sum((1, 2))
        quality.append(total / (foreground.sum((1, 2)) + 1e-6))
        begin += len(logits)
    return masks, torch.cat(quality)


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
) -> tuple[Tensor, list[dict]]:
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
    scores, labels, embeddings = scores[keep].float(), labels[keep], mask_embeddings[keep]
    # Of each pixel: score times probability of the winner so far, the winner, and whether the
    # winner's mask is there.
    best = torch.full(frame.output, -1.0, device=scores.device)
    winner = torch.zeros(frame.output, dtype=torch.int64, device=scores.device)
    inside = torch.zeros(frame.output, dtype=torch.bool, device=scores.device)
    own_area, begin = [torch.zeros(0, dtype=torch.int64, device=scores.device)], 0
    for logits in output_masks(embeddings, pixel_embedding, frame):
        probs = logits.sigmoid_()
        own_area.append((probs >= 0.5).sum((1, 2)))
        weighted, index = (probs * scores[begin : begin + len(probs), None, None]).max(0)
        better = weighted > best
        best = torch.where(better, weighted, best)
        winner = torch.where(better, index + begin, winner)
        inside = torch.where(better, probs.gather(0, index[None])[0] >= 0.5, inside)
        begin += len(probs)
    number = len(scores)
    won = torch.bincount(winner.flatten(), minlength=number)[:number]
    left = torch.bincount(winner[inside], minlength=number)[:number]
    table = torch.stack([torch.cat(own_area), won, left, labels, is_thing[labels].long()]).tolist()
    ids, segments = _segments(table, scores.tolist(), overlap_threshold)
    lookup = torch.tensor([*ids, 0], dtype=torch.int32, device=scores.device)
    return torch.where(inside, lookup[winner], 0).to(torch.int32), segments


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
