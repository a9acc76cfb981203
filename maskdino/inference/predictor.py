"""The public way to use a trained model: pictures in, typed results out.

    import maskdino
    model = maskdino.MaskDINOPredictor.from_config("coco/instance/maskdino_R50", "model_final.pth")
    result = model("photo.jpg")
    result.save("drawn.png")

Shape key: B images, Q queries, K classes, C channels, N objects, H, W pixels of a picture.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor

from maskdino.checkpoint.loading import load_trained
from maskdino.devices import pick_device
from maskdino.inference.options import PredictorOptions
from maskdino.model import InferenceOptions, MaskDINO
from maskdino.model_zoo import read_config
from maskdino.ops.host import Steps, pack_masks, run_steps, unpack_mask
from maskdino.postprocess import (
    Frame,
    best_pairs,
    masks_and_quality,
    output_boxes,
    panoptic_inference,
    semantic_inference,
)
from maskdino.structures import Predictions
from maskdino.visualization.images import ImageSource, load_image, network_image
from maskdino.visualization.results import Categories, ImageResult, encode_mask

MASK_BYTES_AT_ONCE = 1 << 27  # packed masks of one picture that exist on the device at one time
MAP_VALUES_AT_ONCE = 1 << 28  # values of class maps; label maps of larger pictures are enlarged
WINDOW = 4  # batches of pictures that are read ahead, so that those of one size meet


class Network(Protocol):
    """What the predictor asks of the network, whichever runtime computes it."""

    def __call__(self, images: list[Tensor]) -> tuple[Predictions, Tensor | None, tuple[int, int]]:
        """From B pictures (3, h, w) uint8 in INPUT.FORMAT.

        Returns:
            Predictions (B, Q, ...), the pixel embedding (B, C, H / 4, W / 4) or None, and the size
            of the padded canvas.
        """


class TorchNetwork:
    """The model in PyTorch, in the precision of TEST.PRECISION."""

    def __init__(self, model: MaskDINO) -> None:
        self.model = model.eval()

    def __call__(self, images: list[Tensor]) -> tuple[Predictions, Tensor | None, tuple[int, int]]:
        batch = self.model.preprocess([{"image": image} for image in images]).tensor
        predictions, pixels = self.model.predict_precisely(batch)
        return predictions, pixels, tuple(batch.shape[-2:])


class MaskDINOPredictor:
    """Objects, panoptic segments and class maps of pictures.

    Pictures are read by the network in batches of equal padded size, so that a picture's result
    does not depend on the others.
    """

    def __init__(
        self,
        network: Network,
        *,
        categories: Categories,
        inference: InferenceOptions,
        is_thing: Tensor,
        options: PredictorOptions,
    ) -> None:
        """
        Args:
            network: computes predictions.
            categories: names of the classes.
            inference: how predictions become results (`model.inference`).
            is_thing: (K,) bool (`model.is_thing`).
            options: what is asked for.
        """
        self.network, self.categories, self.inference = network, categories, inference
        self.is_thing, self.options = is_thing, options

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike,
        weights: str | os.PathLike | None = None,
        *,
        device: str | torch.device | None = None,
        confidence_threshold: float = 0.5,
        tasks: Sequence[str] | None = None,
        size: int | None = None,
        max_detections: int | None = None,
        batch_size: int = 1,
        opts: Sequence[str] = (),
    ) -> MaskDINOPredictor:
        """Builds a trained model.

        Args:
            config: path of a YAML file, or its name below `configs`: "coco/instance/maskdino_R50".
            weights: checkpoint, ours or a released one, by path, address, or name of the model zoo;
                "released": what was released for this configuration; None: MODEL.WEIGHTS of the
                configuration.
            device: None: the configuration's, or the CPU where there is no GPU.
            confidence_threshold: objects with a lower score are left out.
            tasks: of "instance", "panoptic" and "semantic"; None: those the model was trained for.
            size: pixels of the shorter edge at which the network reads pictures; None: the
                configuration's.
            max_detections: at most so many objects for each picture; None: the configuration's.
            batch_size: pictures that the network reads at one time.
            opts: keys and values that override the configuration.

        Raises:
            FileNotFoundError: there is no such configuration or checkpoint.
            ConnectionError: the released weights cannot be downloaded.
            ValueError: the checkpoint does not fit, or an argument is out of range.
        """
        cfg = read_config(config, weights, opts, whole=True)
        cfg.MODEL.DEVICE = str(pick_device(device, cfg.MODEL.DEVICE))
        if max_detections is not None:
            cfg.TEST.DETECTIONS_PER_IMAGE = max_detections
        model = build_model(cfg)
        load_trained(model, cfg)
        return cls.from_model(
            model,
            cfg,
            confidence_threshold=confidence_threshold,
            tasks=tasks,
            size=size,
            batch_size=batch_size,
        )

    @classmethod
    def from_model(
        cls,
        model: MaskDINO,
        cfg: CfgNode,
        *,
        confidence_threshold: float = 0.5,
        tasks: Sequence[str] | None = None,
        size: int | None = None,
        batch_size: int = 1,
    ) -> MaskDINOPredictor:
        """From a model that is there already; see `from_config`."""
        options = PredictorOptions.from_config(
            cfg,
            confidence_threshold=confidence_threshold,
            tasks=tasks,
            size=size,
            batch_size=batch_size,
        )
        return cls(
            TorchNetwork(model),
            categories=Categories.from_config(cfg),
            inference=model.inference,
            is_thing=model.is_thing,
            options=options,
        )

    def __call__(
        self, images: ImageSource | Iterable[ImageSource], channel_order: str = "RGB"
    ) -> ImageResult | list[ImageResult]:
        """Predicts.

        Args:
            images: one picture or many; see `maskdino.visualization.images.load_image`.
                Arrays and tensors with four dimensions are many.
            channel_order: "RGB" or "BGR", of arrays and tensors.

        Returns:
            One result, or a list in the order of the pictures.

        Raises:
            ImageError: something is no picture; names it.
        """
        single = isinstance(images, str | os.PathLike | Image.Image)
        single = single or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
        results = list(self.stream([images] if single else images, channel_order))
        return results[0] if single else results

    def stream(
        self, images: Iterable[ImageSource], channel_order: str = "RGB"
    ) -> Iterator[ImageResult]:
        """Predicts many pictures, in order; few of them are in memory at one time."""
        iterator = enumerate(images)
        at_once = self.options.batch_size
        ahead = at_once * WINDOW if at_once > 1 else 1
        while window := list(itertools.islice(iterator, ahead)):
            groups, results = defaultdict(list), {}
            for number, source in window:
                picture = _Picture.read(number, source, channel_order, self.options)
                groups[picture.canvas].append(picture)
            for group in groups.values():
                for begin in range(0, len(group), at_once):
                    batch = group[begin : begin + at_once]
                    found = self._predict(batch)
                    results |= {p.number: r for p, r in zip(batch, found, strict=True)}
            yield from (results[number] for number, _ in window)

    @torch.inference_mode()
    def _predict(self, pictures: list[_Picture]) -> list[ImageResult]:
        predictions, pixels, canvas = self.network([picture.tensor for picture in pictures])
        results = []
        for i, picture in enumerate(pictures):
            frame = Frame(canvas, tuple(picture.tensor.shape[-2:]), picture.size)
            of_image = predictions.map(lambda x, i=i: x[i])
            parts = self._postprocess(of_image, None if pixels is None else pixels[i], frame)
            results.append(
                ImageResult(
                    picture.name, picture.size, self.categories, source=picture.source, **parts
                )
            )
        return results

    def _postprocess(self, predictions: Predictions, pixels: Tensor | None, frame: Frame) -> dict:
        """Fields of the result of one picture; predictions (Q, ...), pixels (C, H/4, W/4)."""
        tasks = {
            "instance": self._objects,
            "panoptic": self._segments,
            "semantic": self._label_map,
        }
        computations = [tasks[task](predictions, pixels, frame) for task in self.options.tasks]
        return {name: value for part in run_steps(computations) for name, value in part.items()}

    def _objects(
        self, predictions: Predictions, pixels: Tensor | None, frame: Frame
    ) -> Steps[dict]:
        """The objects above the threshold, best first."""
        inference, threshold = self.inference, self.options.confidence_threshold
        scores = inference.class_scores(predictions.class_logits)
        if inference.panoptic_on:
            scores = scores.masked_fill(~self.is_thing, -1)
        pairs = yield from best_pairs(scores, inference.max_detections, threshold, None)
        boxes, scores = output_boxes(predictions.boxes[pairs.queries], frame), pairs.scores
        on_host, packed, qualities = [], [], []
        if predictions.mask_embeddings is not None:
            embeddings = predictions.mask_embeddings[pairs.different]
            for foreground, quality in masks_and_quality(embeddings, pixels, frame):
                packed.append(pack_masks(foreground))
                qualities.append(quality)
                if sum(part.numel() for part in packed) >= MASK_BYTES_AT_ONCE:
                    on_host += yield packed
                    packed = []
            if inference.mask_scoring and qualities:
                scores = scores * torch.cat(qualities)[pairs.which]
        numbers = (boxes, scores, scores >= threshold, pairs.labels, pairs.which)
        found = yield (*numbers, *packed)
        boxes, scores, kept, labels, which = (part.numpy() for part in found[: len(numbers)])
        order = np.argsort(-scores, kind="stable")
        order, rles = order[kept[order]], None
        if predictions.mask_embeddings is not None:
            masks = [mask for part in on_host + found[len(numbers) :] for mask in part.numpy()]
            rles = _encoded(masks, which[order], frame.output)
        return {
            "boxes": _clipped(boxes[order], frame.output),
            "scores": scores[order],
            "class_ids": labels[order],
            "rles": rles,
        }

    def _segments(self, predictions: Predictions, pixels: Tensor, frame: Frame) -> Steps[dict]:
        inference, map_frame = self.inference, _map_frame(frame, 8)
        best = inference.class_scores(predictions.class_logits).amax(-1)
        scores, labels = inference.class_probs(predictions.class_logits).max(-1)
        ids, segments = yield from panoptic_inference.steps(
            best > inference.panoptic_score_threshold,
            scores,
            labels,
            predictions.mask_embeddings,
            pixels,
            map_frame,
            is_thing=self.is_thing,
            overlap_threshold=inference.panoptic_overlap_threshold,
        )
        (ids,) = yield (_full_size(ids, frame),)
        return {"panoptic_ids": ids.numpy(), "segments": tuple(segments)}

    def _label_map(self, predictions: Predictions, pixels: Tensor, frame: Frame) -> Steps[dict]:
        probs = self.inference.class_probs(predictions.class_logits)
        total = semantic_inference(
            probs,
            predictions.mask_embeddings,
            pixels,
            _map_frame(frame, probs.shape[1]),
            sum_in_output_frame=self.inference.sum_in_output_frame,
        )
        # 255 means "ignored" in maps of 8 bits.
        dtype = torch.uint8 if probs.shape[1] <= 255 else torch.int32
        (labels,) = yield (_full_size(total.argmax(0).to(dtype), frame),)
        return {"label_map": labels.numpy()}


@dataclass(frozen=True)
class _Picture:
    """A picture on its way through the network."""

    number: int
    name: str
    source: ImageSource  # its path, or its pixels
    size: tuple[int, int]
    tensor: Tensor  # (3, h, w) uint8
    canvas: tuple[int, int]

    @staticmethod
    def read(
        number: int, source: ImageSource, channel_order: str, options: PredictorOptions
    ) -> _Picture:
        image = load_image(source, channel_order)
        size, canvas = options.sizes_of(image.shape[:2])
        is_file = isinstance(source, str | os.PathLike)
        return _Picture(
            number,
            str(source) if is_file else f"image {number}",
            source if is_file else image,
            image.shape[:2],
            network_image(image, size, options.image_format),
            canvas,
        )


def _map_frame(frame: Frame, values_per_pixel: int) -> Frame:
    """The frame, or for huge pictures one whose output has the network's size."""
    values = values_per_pixel * frame.output[0] * frame.output[1]
    return frame if values <= MAP_VALUES_AT_ONCE else replace(frame, output=frame.image)


def _encoded(
    masks: Sequence[np.ndarray], which: np.ndarray, size: tuple[int, int]
) -> tuple[dict, ...]:
    """Packed masks to COCO's compressed form, each once, and of these the masks in `which`."""
    rles = {i: encode_mask(unpack_mask(masks[i], size)) for i in set(which.tolist())}
    return tuple(dict(rles[i]) for i in which.tolist())


def _clipped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) cut at the border of a picture."""
    if not np.isfinite(boxes).all():
        raise FloatingPointError("the model predicts boxes that are not finite; see its weights")
    height, width = size
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32))


def _full_size(labels: Tensor, frame: Frame) -> Tensor:
    """A map of integers at the size of the picture."""
    if tuple(labels.shape) != frame.output:
        # Integers below 2 ** 24 are exact in float32, which all interpolation knows.
        enlarged = F.interpolate(
            labels[None, None].float(), size=frame.output, mode="nearest-exact"
        )
        labels = enlarged[0, 0].to(labels.dtype)
    return labels
