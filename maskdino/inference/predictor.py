"""The public way to use a trained model: images in, typed results out.

    import maskdino
    model = maskdino.MaskDINOPredictor.from_config("coco/instance/maskdino_R50", "model_final.pth")
    result = model("photo.jpg")
    result.save("drawn.png")

Shape key: B images, Q queries, K classes, C channels, N objects, H, W pixels of an image.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor

from maskdino.categories import Categories
from maskdino.checkpoint.loading import load_trained
from maskdino.checkpoint.pretrained import find_pretrained, save_pretrained
from maskdino.inference.image import PreparedImage
from maskdino.inference.options import PredictorOptions
from maskdino.inference.sliced import predict_sliced
from maskdino.inference.tiles import TiledImage
from maskdino.model import MaskDINO
from maskdino.model_zoo import build_pretrained, read_config
from maskdino.postprocess import Frame, InferenceOptions, postprocess
from maskdino.structures import Predictions
from maskdino.system.devices import pick_device
from maskdino.visualization.images import ImageSource
from maskdino.visualization.results import ImageResult

READ_AHEAD = 4  # batches of images that are read ahead, so that those of one size meet


class Network(Protocol):
    """What the predictor asks of the network, whichever runtime computes it."""

    def __call__(self, images: list[Tensor]) -> tuple[Predictions, Tensor | None, tuple[int, int]]:
        """From B images (3, h, w) uint8 in INPUT.FORMAT.

        Returns:
            Predictions (B, Q, ...), the pixel embedding (B, C, H / 4, W / 4) or None, and the size
            of the padded canvas.
        """


class TorchNetwork:
    """The model in PyTorch, in the precision of TEST.PRECISION."""

    def __init__(self, model: MaskDINO) -> None:
        self.model = model.eval()

    def __call__(self, images: list[Tensor]) -> tuple[Predictions, Tensor | None, tuple[int, int]]:
        """See `Network`."""
        batch = self.model.preprocess([{"image": image} for image in images]).tensor
        height, width = batch.shape[-2:]
        return *self.model.predict_precisely(batch), (height, width)


class MaskDINOPredictor:
    """Objects, panoptic segments and class maps of images.

    Images are read by the network in batches of equal padded size, so that an image's result
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
        configuration: str | None = None,
    ) -> None:
        """Joins the parts; see `from_config`, `from_pretrained` and `from_model`.

        Args:
            network: computes predictions.
            categories: the classes, as results name them.
            inference: how predictions become results (`model.inference`).
            is_thing: (K,) bool (`model.is_thing`).
            options: what is asked for.
            configuration: of the model, as text, for `save_pretrained`.
        """
        self.network, self.categories, self.inference = network, categories, inference
        self.is_thing, self.options, self.configuration = is_thing, options, configuration

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
        features: bool = False,
        dataset: str | None = None,
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
            tasks: one or more of "instance", "panoptic" and "semantic"; None: those the model was
                trained for.
            size: pixels of the shorter edge at which the network reads images; None: the
                configuration's.
            max_detections: at most so many objects for each image; None: the configuration's.
            batch_size: images that the network reads at one time.
            features: whether results hold the content feature of each object.
            dataset: registered name of the dataset whose classes are meant; it is read if need be.
                None: the first of the configuration that is registered, as far as its classes are
                known.
            opts: keys and values that override the configuration.

        Raises:
            FileNotFoundError: there is no such configuration or checkpoint.
            ConnectionError: the released weights cannot be downloaded.
            ValueError: the checkpoint does not fit, or an argument is out of range.
        """
        cfg = read_config(config, weights, [*opts, *_at_most(max_detections)], whole=True)
        cfg.MODEL.DEVICE = str(pick_device(device, cfg.MODEL.DEVICE))
        model = build_model(cfg)
        load_trained(model, cfg)
        return cls.from_model(
            model,
            cfg,
            confidence_threshold=confidence_threshold,
            tasks=tasks,
            size=size,
            batch_size=batch_size,
            features=features,
            dataset=dataset,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        max_detections: int | None = None,
        opts: Sequence[str] = (),
        **asked: Any,
    ) -> MaskDINOPredictor:
        """Builds a model of a folder that `save_pretrained` or `maskdino publish` wrote.

        Args:
            source: the folder; or a file of weights with its configuration; or "user/name" of a
                model of the Hugging Face Hub. See `maskdino.load_pretrained`, also for errors.
            revision: of the hub's.
            device: see `from_config`, as for all others.
            max_detections: at most so many objects for each image.
            opts: keys and values that override the configuration.
            asked: further ones.
        """
        found = find_pretrained(source, revision)
        opts = [*opts, *_at_most(max_detections)]
        model, cfg = build_pretrained(found, device=device, opts=opts)
        return cls.from_model(model, cfg, categories=found.categories, **asked)

    def save_pretrained(self, folder: str | os.PathLike, **facts: Any) -> Path:
        """Writes the model as a folder, which `from_pretrained` reads.

        Args:
            folder: made if need be; tasks, threshold and size of this predictor are not in it.
            facts: see `maskdino.save_pretrained`, also for errors.

        Raises:
            ValueError: this predictor has no model in PyTorch.
        """
        if not isinstance(self.network, TorchNetwork) or self.configuration is None:
            raise ValueError("an exported network cannot be saved: save the model that it is of")
        cfg = CfgNode.load_cfg(self.configuration)
        return save_pretrained(self.network.model, cfg, folder, categories=self.categories, **facts)

    @classmethod
    def from_model(
        cls,
        model: MaskDINO,
        cfg: CfgNode,
        *,
        dataset: str | None = None,
        categories: Categories | None = None,
        **asked: Any,
    ) -> MaskDINOPredictor:
        """From a model that is there already.

        Args:
            model: in PyTorch.
            cfg: its configuration.
            dataset: see `from_config`.
            categories: the classes, where neither a dataset nor the configuration tells them.
            asked: as for `from_config`: `confidence_threshold`, `tasks`, `size`, `batch_size` and
                `features`.
        """
        if dataset is not None:
            categories = Categories.of_dataset(dataset, cfg.MODEL.MASK_DINO.NUM_CLASSES)
        return cls(
            TorchNetwork(model),
            categories=Categories.from_config(cfg) if categories is None else categories,
            inference=model.inference,
            is_thing=model.is_thing,
            options=PredictorOptions.from_config(cfg, **asked),
            configuration=cfg.dump(),
        )

    def with_options(self, **changes: Any) -> MaskDINOPredictor:
        """A predictor of the same network with other `PredictorOptions`, such as `tasks`."""
        predictor = copy.copy(self)
        predictor.options = replace(self.options, **changes)
        return predictor

    def __call__(
        self, images: ImageSource | Iterable[ImageSource], channel_order: str = "RGB"
    ) -> ImageResult | list[ImageResult]:
        """Predicts.

        Args:
            images: one or many; see `maskdino.visualization.images.load_image`.
                Arrays and tensors with four dimensions are many.
            channel_order: "RGB" or "BGR", of arrays and tensors.

        Returns:
            One result, or a list in the order of the images.

        Raises:
            ImageError: something is no image; names it.
        """
        if (
            isinstance(images, str | os.PathLike | Image.Image)
            or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
            or not isinstance(images, Iterable)  # as what OpenCV gives for a file that is missing
        ):
            return next(self.stream([images], channel_order))
        return list(self.stream(images, channel_order))

    def stream(
        self, images: Iterable[ImageSource], channel_order: str = "RGB"
    ) -> Iterator[ImageResult]:
        """Predicts many images, in order; few of them are in memory at one time.

        Where the options name slices (TEST.SLICES of the configuration), each is `sliced`.
        """
        if self.options.slices is not None:
            for number, source in enumerate(images):
                result = self.sliced(source, channel_order=channel_order)
                is_file = isinstance(source, str | os.PathLike)
                yield result if is_file else replace(result, name=f"image {number}")
            return
        iterator = enumerate(images)
        at_once = self.options.batch_size
        ahead = at_once * READ_AHEAD if at_once > 1 else 1
        while sources := list(itertools.islice(iterator, ahead)):
            groups: dict[tuple[int, int], list[PreparedImage]] = defaultdict(list)
            results: dict[int, ImageResult] = {}
            for number, source in sources:
                image = PreparedImage.read(number, source, channel_order, self.options)
                groups[image.canvas].append(image)
            for group in groups.values():
                for begin in range(0, len(group), at_once):
                    batch = group[begin : begin + at_once]
                    found = self._predict(batch)
                    results |= {x.number: r for x, r in zip(batch, found, strict=True)}
            yield from (results[number] for number, _ in sources)

    def sliced(
        self,
        image: ImageSource | TiledImage,
        size: int | None = None,
        overlap: float | None = None,
        *,
        channel_order: str = "RGB",
        progress: bool = False,
    ) -> ImageResult:
        """Predicts a large image in overlapping slices, and joins what their edges cut.

        Slices are read by the network as images are, `batch_size` at one time, and each may show
        `max_detections` objects. The network's size of reading is that of slices: choose `size` so
        that objects appear in a slice as large as in the images of training. An object is whole if
        it is smaller than the overlap, or if two slices see it alike where they overlap.

        Args:
            image: see `maskdino.visualization.images.load_image`. Files in formats that can be
                (`maskdino.inference.tiles`) are read in parts.
            size: height and width of a slice in pixels. An image that is not larger is predicted
                as it is. None: that of the options, or 1024.
            overlap: least share of a slice that the next one sees again, in [0, 0.9]. None: that
                of the options, or 0.2.
            channel_order: "RGB" or "BGR", of arrays and tensors.
            progress: show a bar.

        Raises:
            ImageError: it is no image; names it.
            ValueError: the size or overlap is out of range, or scores of all classes were asked for
                that need more than 2 GB.
        """
        tiled = image if isinstance(image, TiledImage) else TiledImage(image, channel_order)
        is_file = isinstance(tiled.source, str | os.PathLike)
        usual = self.options.slices or (1024, 0.2)
        return predict_sliced(
            self.with_options(class_scores=True, slices=None).stream,
            tiled,
            size=usual[0] if size is None else size,
            overlap=usual[1] if overlap is None else overlap,
            name=str(tiled.source) if is_file else "image 0",
            progress=progress,
            class_scores=self.options.class_scores,
        )

    @torch.inference_mode()
    def _predict(self, images: list[PreparedImage]) -> list[ImageResult]:
        predictions, pixel_embedding, canvas = self.network([image.tensor for image in images])
        options = replace(self.inference, score_threshold=self.options.confidence_threshold)
        results = []
        for i, image in enumerate(images):
            height, width = image.tensor.shape[-2:]
            found = postprocess(
                predictions.of_image(i),
                None if pixel_embedding is None else pixel_embedding[i],
                Frame(canvas, (height, width), image.size),
                options,
                self.is_thing,
                tasks=self.options.tasks,
                compact=True,
                features=self.options.features,
                class_maps=self.options.class_scores,
            )
            results.append(image.result(found, self.categories))
        return results


def _at_most(max_detections: int | None) -> list[str]:
    """The key of a configuration, and its value, where it is asked for."""
    return [] if max_detections is None else ["TEST.DETECTIONS_PER_IMAGE", str(max_detections)]
