"""Mask DINO in slow loops: a second, independent writing of what the released models compute.

It reads like the rules of the paper and of the released models: one image at a time, weights under
released names, options under released keys. It shares no code with the package, so that both can
only agree where both are right (or misread a rule in the same way).

Shape key: C channels, S tokens, Q queries, K class logits, P points; h, w pixels of a level or of
the pixel embedding. Boxes are cx, cy, w, h, divided by the padded canvas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ENCODER = "sem_seg_head.pixel_decoder."
DECODER = "sem_seg_head.predictor."
DECODER_HEADS = 8
POINTS = 4


class Prediction(NamedTuple):
    """(Q, K) class logits, (Q, 4) boxes, (Q, h, w) mask logits."""

    class_logits: Tensor
    boxes: Tensor
    mask_logits: Tensor

    def of(self, queries: slice) -> Prediction:
        """The predictions of some queries."""
        return Prediction(*(values[queries] for values in self))


class Noised(NamedTuple):
    """Denoising queries of one image: slots that hold (label, box) or nothing, times groups."""

    slots: list[tuple[int, Tensor] | None]
    groups: int

    @property
    def number(self) -> int:
        """How many queries these are."""
        return len(self.slots) * self.groups


def canonical(name: str) -> str:
    """The one name of a module that released files hold under several."""
    name = re.sub(r"predictor\.(decoder\.)?bbox_embed\.\d+\.", "predictor._bbox_embed.", name)
    return name.replace("predictor.decoder.norm.", "predictor.decoder_norm.")


def sine(values: Tensor, channels: int) -> Tensor:
    """Sine embedding of values (...) to (..., channels): sin on even channels, cos on odd ones."""
    columns = []
    for channel in range(channels):
        angle = values / 10000 ** (2 * (channel // 2) / channels)
        columns.append(angle.cos() if channel % 2 else angle.sin())
    return torch.stack(columns, dim=-1)


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """(h * w, C): half of the channels for y, then half for x."""
    rows = [(y + 1) / (height + 1e-6) * 2 * math.pi for y in range(height) for _ in range(width)]
    columns = [(x + 1) / (width + 1e-6) * 2 * math.pi for _ in range(height) for x in range(width)]
    half = channels // 2
    return torch.cat([sine(torch.tensor(rows), half), sine(torch.tensor(columns), half)], dim=-1)


def cell_centres(height: int, width: int) -> list[tuple[float, float]]:
    """(x, y) of each cell of a level, row by row."""
    return [((x + 0.5) / width, (y + 0.5) / height) for y in range(height) for x in range(width)]


def logit(values: Tensor) -> Tensor:
    """Inverse sigmoid of values that are first brought into [0, 1], with eps 1e-5."""
    values = values.clamp(0, 1)
    return torch.log(values.clamp(min=1e-5) / (1 - values).clamp(min=1e-5))


def bilinear(picture: Tensor, places: Tensor) -> Tensor:
    """Samples (C, h, w) at places (..., P, 2), (x, y) in [0, 1], to (C, ..., P); 0 outside."""
    grid = (2 * places - 1).reshape(1, -1, 1, 2)
    samples = F.grid_sample(picture[None], grid, padding_mode="zeros", align_corners=False)
    return samples.reshape(len(picture), *places.shape[:-1])


def tokens(levels: list[Tensor]) -> Tensor:
    """(S, C) of levels (C, h, w)."""
    return torch.cat([level.flatten(1).t() for level in levels])


def mask_to_box(mask: Tensor, kind: str) -> list[float]:
    """x0, y0, x1, y1 in pixels of the foreground of one mask (h, w)."""
    rows, columns = torch.where(mask)
    if not len(rows):
        return [1e8, 1e8, 0.0, 0.0] if kind == "mask2box" else [0.0] * 4
    further = 0 if kind == "mask2box" else 1
    ends = (int(columns.max()) + further, int(rows.max()) + further)
    return [float(x) for x in (columns.min(), rows.min(), *ends)]


class SlowMaskDINO:
    """All behind the backbone.

    Args:
        weights: tensors under released names; of a module with several names any one.
        config: nested mapping with released keys.
    """

    def __init__(self, weights: dict[str, Tensor], config: dict) -> None:
        self.weights = {canonical(name): tensor for name, tensor in weights.items()}
        self.head = config["MODEL"]["SEM_SEG_HEAD"]
        self.options = config["MODEL"]["MaskDINO"]
        self.low2high = self.head["FEATURE_ORDER"] == "low2high"
        self.class_head = f"{DECODER}class_embed"
        self.box_head = f"{DECODER}_bbox_embed"

    # Parts with weights

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].t() + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (len(weight),), weight, bias)

    def mlp(self, x: Tensor, name: str, layers: int) -> Tensor:
        for i in range(layers):
            x = self.linear(x, f"{name}.layers.{i}")
            x = x if i == layers - 1 else x.relu()
        return x

    def feedforward(self, x: Tensor, name: str) -> Tensor:
        return self.linear(self.linear(x, f"{name}.linear1").relu(), f"{name}.linear2")

    def convolution(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride=stride, padding=padding)

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.group_norm(x[None], 32, weight, bias)[0]

    def deformable_attention(
        self,
        name: str,
        queries: Tensor,
        levels: list[Tensor],
        heads: int,
        locate: Callable[[Tensor, int, int], Tensor],
    ) -> Tensor:
        """Deformable attention of queries (Q, C) to levels (C, h, w).

        `locate` turns the offsets (Q, P, 2) of a level of height and width into places.
        """
        number, channels = queries.shape
        shape = (number, heads, len(levels), POINTS)
        offsets = self.linear(queries, f"{name}.sampling_offsets").view(*shape, 2)
        weights = self.linear(queries, f"{name}.attention_weights").view(number, heads, -1)
        weights = weights.softmax(-1).view(shape)
        values = [
            self.linear(level.flatten(1).t(), f"{name}.value_proj").t().view(level.shape)
            for level in levels
        ]
        result = []
        for head, channel in enumerate(range(0, channels, channels // heads)):
            total = torch.zeros(channels // heads, number)
            for i, value in enumerate(values):
                picture = value[channel : channel + channels // heads]
                places = locate(offsets[:, head, i], *picture.shape[1:])
                total = total + (bilinear(picture, places) * weights[:, head, i]).sum(-1)
            result.append(total)
        return self.linear(torch.cat(result).t(), f"{name}.output_proj")

    # Encoder

    def encode(self, features: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features (C', h, w) of one image to the decoder's levels, and the pixel embedding."""
        used = self.head["DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"]  # finest first
        order = used if self.low2high else used[::-1]
        levels = [self.projected(i, features[name]) for i, name in enumerate(order)]
        if self.head["TOTAL_NUM_FEATURE_LEVELS"] > len(used):
            extra = self.projected(len(used), features[used[-1]], stride=2, padding=1)
            levels = [*levels, extra] if self.low2high else [extra, *levels]
        for i in range(self.head["TRANSFORMER_ENC_LAYERS"]):
            levels = self.encoder_layer(f"{ENCODER}transformer.encoder.layers.{i}", levels)
        finest = levels[0] if self.low2high else levels[-1]
        return levels[::-1], self.pixel_embedding(features["res2"], finest)

    def projected(self, index: int, feature: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        name = f"{ENCODER}input_proj.{index}"
        return self.group_norm(self.convolution(feature, f"{name}.0", stride, padding), f"{name}.1")

    def encoder_layer(self, name: str, levels: list[Tensor]) -> list[Tensor]:
        """Every token attends to all levels, around its cell's centre on each of them."""
        embeddings = self.weights[f"{ENCODER}transformer.level_embed"]
        shapes = [level.shape[1:] for level in levels]
        position = torch.cat(
            [sine_positions(*shape, embeddings.shape[1]) + embeddings[i]
             for i, shape in enumerate(shapes)]
        )  # fmt: skip
        centres = torch.tensor([centre for shape in shapes for centre in cell_centres(*shape)])

        def locate(offsets: Tensor, height: int, width: int) -> Tensor:
            return centres[:, None] + offsets / torch.tensor([width, height])

        x = tokens(levels)
        attended = self.deformable_attention(
            f"{name}.self_attn", x + position, levels, self.options["NHEADS"], locate
        )
        x = self.norm(x + attended, f"{name}.norm1")
        x = self.norm(x + self.feedforward(x, name), f"{name}.norm2")
        split = x.split([height * width for height, width in shapes])
        return [part.t().view(-1, *shape) for part, shape in zip(split, shapes, strict=True)]

    def pixel_embedding(self, res2: Tensor, finest: Tensor) -> Tensor:
        lateral = self.convolution(res2, f"{ENCODER}adapter_1")
        lateral = self.group_norm(lateral, f"{ENCODER}adapter_1.norm")
        size = lateral.shape[1:]
        x = lateral + F.interpolate(finest[None], size, mode="bilinear", align_corners=False)[0]
        x = self.convolution(x, f"{ENCODER}layer_1", padding=1)
        x = self.group_norm(x, f"{ENCODER}layer_1.norm").relu()
        return self.convolution(x, f"{ENCODER}mask_features")

    # Queries

    def classes_and_masks(self, content: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, K) class logits and (Q, h, w) mask logits; the decoder norm comes first."""
        content = self.norm(content, f"{DECODER}decoder_norm")
        embeddings = self.mlp(content, f"{DECODER}mask_embed", 3)
        masks = (embeddings @ pixels.flatten(1)).view(-1, *pixels.shape[1:])
        return self.linear(content, self.class_head), masks

    def select(self, levels: list[Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Prediction]:
        """Content and anchor logits of the selected queries, and the encoder's prediction."""
        anchors = []
        for k, level in enumerate(levels):
            size = 0.05 * 2**k
            anchors += [[x, y, size, size] for x, y in cell_centres(*level.shape[1:])]
        valid = torch.tensor([all(0.01 < value < 0.99 for value in anchor) for anchor in anchors])
        anchors = torch.tensor(anchors)
        anchor_logits = torch.log(anchors / (1 - anchors))
        anchor_logits[~valid] = math.inf
        memory = tokens(levels).masked_fill(~valid[:, None], 0.0)
        candidates = self.norm(
            self.linear(memory, f"{DECODER}enc_output"), f"{DECODER}enc_output_norm"
        )
        scores = self.linear(candidates, self.class_head).max(-1).values
        number = min(self.options["NUM_OBJECT_QUERIES"], len(scores))
        best = scores.argsort(descending=True)[:number]
        content = candidates[best]
        box_logits = self.mlp(content, self.box_head, 3) + anchor_logits[best]
        classes, masks = self.classes_and_masks(content, pixels)
        first_anchors = box_logits.detach()
        kind = self.options["INITIALIZE_BOX_TYPE"]
        if kind != "no":
            first_anchors = self.mask_enhanced(masks.detach() > 0, kind)
        return content.detach(), first_anchors, Prediction(classes, box_logits.sigmoid(), masks)

    def mask_enhanced(self, masks: Tensor, kind: str) -> Tensor:
        """Anchor logits (Q, 4) of the boxes of masks (Q, h, w)."""
        height, width = masks.shape[1:]
        boxes = []
        for mask in masks:
            x0, y0, x1, y1 = mask_to_box(mask, kind)
            centre = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
            boxes.append([*centre, (x1 - x0) / width, (y1 - y0) / height])
        return logit(torch.tensor(boxes))

    def noised_queries(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """Content and anchor logits of denoising queries, without noise."""
        labels = self.weights[f"{DECODER}label_enc.weight"]
        content, anchor_logits = [], []
        for slot in noised.slots * noised.groups:
            content.append(torch.zeros(labels.shape[1]) if slot is None else labels[slot[0]])
            anchor_logits.append(torch.zeros(4) if slot is None else logit(slot[1]))
        return torch.stack(content), torch.stack(anchor_logits)

    # Decoder

    def predict(
        self, levels: list[Tensor], pixels: Tensor, noised: Noised | None = None
    ) -> tuple[list[Prediction], Prediction | None]:
        """All predictions, denoising queries first, and the encoder's where it selects queries.

        The first one is the initial prediction, if it is wanted; then come the layers.
        """
        if self.options["TWO_STAGE"]:
            content, anchor_logits, proposal = self.select(levels, pixels)
        else:
            content = self.weights[f"{DECODER}query_feat.weight"]
            anchor_logits, proposal = self.weights[f"{DECODER}query_embed.weight"], None
        hidden = torch.zeros(len(content), len(content), dtype=torch.bool)
        if noised is not None and noised.number:
            more_content, more_logits = self.noised_queries(noised)
            content = torch.cat([more_content, content])
            anchor_logits = torch.cat([more_logits, anchor_logits])
            hidden = hidden_from(noised, len(content))
        predictions = []
        if self.options["INITIAL_PRED"]:
            classes, masks = self.classes_and_masks(content, pixels)
            predictions.append(Prediction(classes, anchor_logits.sigmoid(), masks))
        entered = anchor = anchor_logits.sigmoid()
        for i in range(self.options["DEC_LAYERS"]):
            content = self.decoder_layer(
                f"{DECODER}decoder.layers.{i}", content, anchor, levels, hidden
            )
            normed = self.norm(content, f"{DECODER}decoder_norm")
            boxes = (self.mlp(normed, self.box_head, 3) + logit(entered)).sigmoid()
            classes, masks = self.classes_and_masks(normed, pixels)
            predictions.append(Prediction(classes, boxes, masks))
            # Look forward twice: the next prediction's gradient reaches this layer's box.
            entered = (self.mlp(content, self.box_head, 3) + logit(anchor)).sigmoid()
            anchor = entered.detach()
        return predictions, proposal

    def decoder_layer(
        self, name: str, x: Tensor, anchor: Tensor, levels: list[Tensor], hidden: Tensor
    ) -> Tensor:
        """(Q, C) content after one layer; `hidden` (Q, Q): who may not see whom."""
        coordinates = [sine(anchor[:, i] * 2 * math.pi, 128) for i in (1, 0, 2, 3)]  # y, x, w, h
        position = self.mlp(torch.cat(coordinates, dim=-1), f"{DECODER}decoder.ref_point_head", 2)
        x = self.norm(x + self.self_attention(name, x, position, hidden), f"{name}.norm2")

        def locate(offsets: Tensor, height: int, width: int) -> Tensor:  # noqa: ARG001
            return anchor[:, None, :2] + offsets / POINTS * anchor[:, None, 2:] * 0.5

        attended = self.deformable_attention(
            f"{name}.cross_attn", x + position, levels, DECODER_HEADS, locate
        )
        x = self.norm(x + attended, f"{name}.norm1")
        return self.norm(x + self.feedforward(x, name), f"{name}.norm3")

    def self_attention(self, name: str, x: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        weights = self.weights[f"{name}.self_attn.in_proj_weight"].chunk(3)
        biases = self.weights[f"{name}.self_attn.in_proj_bias"].chunk(3)
        inputs = (x + position, x + position, x)
        query, key, value = (
            a @ weight.t() + bias for a, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        each, result = x.shape[1] // DECODER_HEADS, []
        for head in range(DECODER_HEADS):
            part = slice(head * each, (head + 1) * each)
            scores = query[:, part] @ key[:, part].t() / math.sqrt(each)
            seen = scores.masked_fill(hidden, -math.inf).softmax(-1)
            result.append(seen @ value[:, part])
        return self.linear(torch.cat(result, dim=1), f"{name}.self_attn.out_proj")


def hidden_from(noised: Noised, number: int) -> Tensor:
    """(number, number) bool: whether query i may not see query j; denoising queries come first."""
    hidden = torch.zeros(number, number, dtype=torch.bool)
    size = len(noised.slots)
    for i in range(number):
        for j in range(noised.number):
            hidden[i, j] = i >= noised.number or i // size != j // size
    return hidden
