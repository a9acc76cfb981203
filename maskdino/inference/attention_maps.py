"""How queries come to their results: masks, boxes and sampling points after each decoder layer.

This is what appendix A of the paper draws.
Shape key: B images, Q queries, C channels, M heads, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from maskdino.inference.image import PreparedImage
from maskdino.inference.predictor import MaskDINOPredictor, TorchNetwork
from maskdino.model import MaskDINO
from maskdino.modeling.attention import MultiScaleDeformableAttention
from maskdino.modeling.decoder import DecoderState
from maskdino.ops.masks import RunMask
from maskdino.ops.ms_deform_attn import locations_and_weights
from maskdino.ops.rle import encode_mask
from maskdino.postprocess import Frame
from maskdino.postprocess.frame import mask_limits, output_boxes, output_masks
from maskdino.structures import SpatialShapes
from maskdino.visualization.drawing import Region, draw_regions, line_width
from maskdino.visualization.images import ImageSource

RED, GREEN, BLUE = (230, 30, 30), (30, 220, 30), (40, 90, 255)


@dataclass(frozen=True)
class LayerView:
    """One query at one layer, in pixels of the image.

    Attributes:
        layer: 0 for the query before the first decoder layer.
        label: class with the best score.
        score: its class score in [0, 1].
        box: (4,) x0, y0, x1, y1.
        rle: mask in COCO's compressed form; None without a mask branch.
        points: (M * L * P, 2) x, y that the layer sampled; none at layer 0.
        weights: (M * L * P,) attention weights; those of a head add up to 1.
    """

    layer: int
    label: int
    score: float
    box: np.ndarray
    rle: dict | None
    points: np.ndarray
    weights: np.ndarray

    def draw(self, image: np.ndarray, scale: int = 1) -> np.ndarray:
        """Blue points, the larger the more they weigh; red mask, green box."""
        regions = [Region(GREEN, box=tuple(self.box.tolist()))]
        if self.rle is not None:
            regions.append(Region(RED, mask=RunMask.of(self.rle)))
        drawn = Image.fromarray(draw_regions(image, regions, scale=scale, show_boxes=True))
        drawing = ImageDraw.Draw(drawn)
        unit = max(1.5, line_width(image) * scale / 2)
        # Of M heads with L * P points each, an average point weighs M / number of points.
        average = max(float(self.weights.mean()), 1e-6) if len(self.weights) else 1.0
        for (x, y), weight in zip(scale * self.points, self.weights, strict=True):
            radius = unit * (0.6 + min(1.5, 0.7 * np.sqrt(weight / average)))
            drawing.ellipse([x - radius, y - radius, x + radius, y + radius], fill=BLUE)
        return np.array(drawn)


@torch.inference_mode()
def follow_queries(
    predictor: MaskDINOPredictor, source: ImageSource, queries: int | Sequence[int]
) -> list[tuple[int, list[LayerView]]]:
    """Follows queries through the decoder.

    Args:
        predictor: of a model in PyTorch.
        source: one image.
        queries: numbers of queries; or how many of those with the best final class scores.

    Returns:
        For each query its number and what it was before and after each layer.

    Raises:
        ValueError: there is no such query.
    """
    if not isinstance(predictor.network, TorchNetwork):
        raise ValueError("only a model in PyTorch shows its layers")
    model, options = predictor.network.model, predictor.options
    image = PreparedImage.read(0, source, "RGB", options)
    batch = model.preprocess([{"image": image.tensor}]).tensor
    with _recorded(model) as record:
        _, pixel_embedding = model.predict(batch)
    height, width = image.tensor.shape[1:]
    frame = Frame((batch.shape[2], batch.shape[3]), (height, width), image.size)
    class_logits, _ = model.heads.classes_and_masks(record.states[-1].content)
    scores = model.inference.class_scores(class_logits[0]).amax(-1)
    chosen = _chosen(queries, scores)
    index = torch.tensor(chosen, device=scores.device)
    layers = [
        _views(model, record, layer, index, pixel_embedding, frame)
        for layer in range(len(record.states))
    ]
    return [(number, [views[i] for views in layers]) for i, number in enumerate(chosen)]


@dataclass
class _Record:
    """What passed through the decoder: the state of each layer, and what its sampling read."""

    states: list[DecoderState]
    # Queries (B, Q, C), tokens (B, S, C), shapes of the levels, reference boxes (B, Q, 4).
    sampled: list[tuple[Tensor, Tensor, SpatialShapes, Tensor]]


@contextmanager
def _recorded(model: MaskDINO) -> Iterator[_Record]:
    """Listens to the decoder; nothing of the model is changed."""
    record = _Record([], [])

    def at_sampling(_: nn.Module, arguments: tuple) -> None:
        record.sampled.append(arguments)

    def at_end(_: nn.Module, __: tuple, states: list[DecoderState]) -> None:
        record.states.extend(states)

    handles = [attention.register_forward_pre_hook(at_sampling) for attention in _attentions(model)]
    handles.append(model.decoder.register_forward_hook(at_end))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _attentions(model: MaskDINO) -> list[MultiScaleDeformableAttention]:
    """The deformable attention of each decoder layer."""
    modules = model.decoder.modules()
    return [module for module in modules if isinstance(module, MultiScaleDeformableAttention)]


def _chosen(queries: int | Sequence[int], scores: Tensor) -> list[int]:
    if isinstance(queries, int):
        return scores.topk(min(queries, len(scores))).indices.tolist()
    wrong = [query for query in queries if not 0 <= query < len(scores)]
    if wrong:
        raise ValueError(f"there is no query {wrong[0]}: the model has {len(scores)} on this image")
    return list(queries)


def _views(
    model: MaskDINO,
    record: _Record,
    layer: int,
    index: Tensor,
    pixel_embedding: Tensor | None,
    frame: Frame,
) -> list[LayerView]:
    """All chosen queries at one layer."""
    state = record.states[layer]
    class_logits, embeddings = model.heads.classes_and_masks(state.content)
    scores, labels = model.inference.class_scores(class_logits[0, index]).max(-1)
    boxes = output_boxes(state.boxes[0, index], frame).cpu().numpy()
    rles: list[dict | None] = [None] * len(index)
    if embeddings is not None and pixel_embedding is not None:
        # They end where those of the results end, of which semantic maps have no limit.
        options = model.inference
        things = model.is_thing[labels] if options.panoptic_on else None
        factor = options.mask_limit if options.instance_on or options.panoptic_on else 0.0
        limits = mask_limits(state.boxes[0, index], factor, things)
        parts = output_masks(embeddings[0, index], pixel_embedding[0], frame, limits)
        rles = [encode_mask(mask) for part in parts for mask in (part > 0).cpu().numpy()]
    points = np.zeros((len(index), 0, 2), np.float32)
    weights = np.zeros((len(index), 0), np.float32)
    if layer > 0:
        points, weights = _sampling(model, record, layer - 1, index, frame)
    return [
        LayerView(layer, int(labels[i]), float(scores[i]), boxes[i], rles[i], points[i], weights[i])
        for i in range(len(index))
    ]


def _sampling(
    model: MaskDINO, record: _Record, layer: int, index: Tensor, frame: Frame
) -> tuple[np.ndarray, np.ndarray]:
    """Points (q, M * L * P, 2) in pixels of the image, and their weights (q, M * L * P)."""
    attention = _attentions(model)[layer]
    queries, tokens, spatial_shapes, reference = record.sampled[layer]
    queries, reference = queries[:, index], reference[:, index]
    both = (attention.sampling_offsets(queries), attention.attention_weights(queries))
    locations, weights = locations_and_weights(
        tokens.unflatten(-1, (attention.num_heads, -1)),
        spatial_shapes,
        torch.cat(both, dim=-1),
        reference,
        attention.num_points,
    )
    points = locations[0].flatten(1, 3)  # (q, M * L * P, 2) in [0, 1] of the canvas
    # As boxes without extent, points take the way of boxes to the image.
    boxes = torch.cat([points, torch.zeros_like(points)], dim=-1)
    corners = output_boxes(boxes.flatten(0, 1), frame)[:, :2].view_as(points)
    return corners.cpu().numpy(), weights[0].flatten(1).cpu().numpy()
