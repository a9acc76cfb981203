"""Exported networks in onnxruntime or OpenVINO, in the place of the model in PyTorch.

    predictor = onnx_predictor("maskdino.onnx")
    result = predictor("photo.jpg")
    predictor = onnx_predictor("maskdino.onnx", engine="openvino")

Shape key: B images, Q queries, C channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from yaml import YAMLError

from maskdino.categories import Categories
from maskdino.config import load_config
from maskdino.config.checks import check_values
from maskdino.export.engines import ENGINES, Engine, Shape
from maskdino.inference.predictor import MaskDINOPredictor, PredictorOptions
from maskdino.postprocess import InferenceOptions
from maskdino.structures import Predictions
from maskdino.system.errors import BROKEN
from maskdino.visualization.images import padded_size

METADATA_KEY = "maskdino"
Size = tuple[int, int]


@dataclass(frozen=True)
class ExportedMetadata:
    """What an exported file tells of itself.

    Attributes:
        config: the configuration of the model, as YAML.
        outputs: as of `maskdino.export.trace.ExportOptions`.
        mask_size: "full" or "quarter".
        unit: sides of canvases are multiples of this many pixels.
        smallest: the least side of a canvas.
    """

    config: str
    outputs: str
    mask_size: str
    unit: int
    smallest: int

    def to_json(self) -> str:
        """As the file holds it."""
        return json.dumps(vars(self))

    def cfg(self) -> CfgNode:
        """The configuration of the model."""
        cfg = load_config()
        cfg.merge_from_other_cfg(CfgNode.load_cfg(self.config))
        return cfg


class OnnxNetwork:
    """An exported network; called like `maskdino.inference.predictor.TorchNetwork`."""

    def __init__(
        self,
        path: str | os.PathLike,
        device: torch.device | str = "cpu",
        engine: str = "onnx",
        threads: int | None = None,
    ) -> None:
        """Opens the file.

        Args:
            path: written by tools/export_model.py with `--outputs predictions`.
            device: where the engine computes; results come back to the CPU.
            engine: "onnx" (onnxruntime) or "openvino".
            threads: of the CPU; None: the engine's choice.

        Raises:
            ModuleNotFoundError: the engine is not installed.
            FileNotFoundError: there is no such file.
            ValueError: the file is no exported network, gives results of one task, or its graph is
                not of the model that its configuration tells of.
        """
        self.engine = ENGINES[engine](path, device, threads)
        if METADATA_KEY not in self.engine.metadata:
            raise ValueError(f"{path} was not written by tools/export_model.py")
        try:
            self.metadata = ExportedMetadata(**json.loads(self.engine.metadata[METADATA_KEY]))
            cfg = self.metadata.cfg()
        except (AssertionError, YAMLError, *BROKEN) as error:  # of files of others
            said = " ".join(str(error).split())
            raise ValueError(f"{path} was not written by tools/export_model.py: {said}") from error
        if self.metadata.outputs != "predictions":
            raise ValueError(
                f"{path} gives results of the task {self.metadata.outputs!r}; the predictor needs "
                "an export with --outputs predictions"
            )
        _check_graph(path, self.engine, cfg)
        self._mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of the only canvas the network takes; None: it takes any."""
        height, width = self.engine.inputs["images"][2:]
        return None if height is None or width is None else (height, width)

    def __call__(self, images: list[Tensor]) -> tuple[Predictions, Tensor | None, Size]:
        """See `maskdino.inference.predictor.Network`."""
        batch = self.batch(images)
        found = self.engine.run({"images": batch})
        predictions = Predictions(
            found["class_logits"], found["boxes"], found.get("mask_embeddings")
        )
        return predictions, found.get("pixel_embedding"), (batch.shape[2], batch.shape[3])

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, h, w) on one canvas: (B, 3, height, width) float32; see `batch_of`."""
        return batch_of(images, self._mean, self.canvas, self.metadata.unit, self.metadata.smallest)


def _check_graph(path: str | os.PathLike, engine: Engine, cfg: CfgNode) -> None:
    """Compares what a graph reads and gives with what its configuration tells.

    Raises:
        ValueError: it is the graph of another model.
    """
    node = cfg.MODEL.MASK_DINO
    classes = node.NUM_CLASSES + (node.LOSS.CLASSIFICATION == "cross_entropy")
    outputs: dict[str, Shape] = {"class_logits": (None, None, classes), "boxes": (None, None, 4)}
    if node.MASK_ON:
        channels = node.HIDDEN_DIM
        outputs["mask_embeddings"] = (None, None, channels)
        outputs["pixel_embedding"] = (None, channels, None, None)
    for kind, expected, found in (
        ("inputs", {"images": (None, 3, None, None)}, engine.inputs),
        ("outputs", outputs, engine.outputs),
    ):
        if set(found) != set(expected) or not all(
            _fits(found[name], shape) for name, shape in expected.items()
        ):
            raise ValueError(
                f"{path} is the graph of another model: its {kind} are {dict(found)}, where its "
                f"configuration tells of {expected}"
            )


def _fits(found: Shape, expected: Shape) -> bool:
    """Whether a shape can be the expected one, axes that vary aside."""
    return len(found) == len(expected) and all(
        None in pair or pair[0] == pair[1] for pair in zip(found, expected, strict=True)
    )


def batch_of(
    images: Sequence[Tensor], fill: Tensor, canvas: Size | None, unit: int, smallest: int
) -> Tensor:
    """Images (3, h, w) on one canvas: (B, 3, height, width) float32.

    Args:
        images: B of them.
        fill: (3, 1, 1), the value of what is outside of an image.
        canvas: (height, width); None: the least in which all fit.
        unit: edges of canvases are multiples of so many pixels.
        smallest: the least edge of a canvas.

    Raises:
        ValueError: an image is larger than the canvas.
    """
    largest = [max(image.shape[axis] for image in images) for axis in (1, 2)]
    canvas = padded_size(largest, unit, smallest) if canvas is None else canvas
    if any(edge > room for edge, room in zip(largest, canvas, strict=True)):
        raise ValueError(f"an image of {largest} pixels does not fit on the canvas {canvas}")
    batch = fill.expand(len(images), -1, *canvas).clone()
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def onnx_predictor(
    path: str | os.PathLike,
    *,
    engine: str = "onnx",
    device: torch.device | str | None = None,
    size: int | None = None,
    max_detections: int | None = None,
    **asked: Any,
) -> MaskDINOPredictor:
    """A predictor in another engine than PyTorch; the file also holds the configuration.

    Args:
        path: as for `OnnxNetwork`.
        engine: likewise.
        device: None: the CPU.
        size: as for `MaskDINOPredictor.from_config`; a file with a fixed canvas determines it.
        max_detections: likewise.
        asked: likewise, `confidence_threshold`, `tasks` and `batch_size`.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: as `OnnxNetwork` says, or a size for a
            fixed canvas.
    """
    network = OnnxNetwork(path, "cpu" if device is None else device, engine)
    cfg = network.metadata.cfg()
    if size is not None and network.canvas is not None:
        raise ValueError(f"{path} has the fixed canvas {network.canvas}: size {size} cannot be had")
    if max_detections is not None:
        cfg.TEST.DETECTIONS_PER_IMAGE = max_detections
        check_values(cfg)
    categories = Categories.from_config(cfg)
    return MaskDINOPredictor(
        network,
        categories=categories,
        inference=InferenceOptions.from_config(cfg),
        is_thing=torch.tensor(categories.is_thing),
        options=replace(
            PredictorOptions.from_config(cfg, size=size, **asked), canvas=network.canvas
        ),
    )
