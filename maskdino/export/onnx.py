"""Exported networks in onnxruntime, in the place of the model in PyTorch.

    predictor = onnx_predictor("maskdino.onnx")
    result = predictor("photo.jpg")

Shape key: B images, Q queries, C channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from yaml import YAMLError

from maskdino.categories import Categories
from maskdino.config import load_config
from maskdino.inference.predictor import MaskDINOPredictor, PredictorOptions
from maskdino.postprocess import InferenceOptions
from maskdino.structures import Predictions
from maskdino.visualization.images import padded_size

if TYPE_CHECKING:
    import onnxruntime

METADATA_KEY = "maskdino"
# What the metadata of files of others raise.
BROKEN = (LookupError, ValueError, TypeError, AssertionError, AttributeError)
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


def open_session(
    model: str | os.PathLike | bytes, device: torch.device | str = "cpu"
) -> onnxruntime.InferenceSession:
    """Loads an ONNX file, or its content, on a device.

    Raises:
        ModuleNotFoundError: there is no onnxruntime.
        FileNotFoundError: there is no such file.
        ValueError: onnxruntime cannot read the file, or has no support for the device.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ONNX files need onnxruntime: pip install onnxruntime") from error
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise FileNotFoundError(f"there is no ONNX file {model}")
    device = torch.device(device)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type != "cpu":
        wanted = f"{device.type.upper()}ExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise ValueError(
                f"this onnxruntime has no support for device {device}; "
                "for CUDA install onnxruntime-gpu"
            )
        providers.insert(0, (wanted, {"device_id": device.index or 0}))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # what concerns the file is raised; the rest is of no use here
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers)
    # onnxruntime has an exception of its own for each kind of failure, all plain RuntimeErrors or
    # direct children of Exception.
    except Exception as error:
        name = "the exported program" if isinstance(model, bytes) else model
        raise ValueError(f"onnxruntime cannot run {name}: {error}") from error


class OnnxNetwork:
    """An exported network; called like `maskdino.inference.predictor.TorchNetwork`."""

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu") -> None:
        """Opens the file.

        Args:
            path: written by tools/export_model.py with `--outputs predictions`.
            device: where onnxruntime computes; results come back to the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no exported network, or gives results of one task.
        """
        self.session = open_session(path, device)
        properties = self.session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in properties:
            raise ValueError(f"{path} was not written by tools/export_model.py")
        try:
            self.metadata = ExportedMetadata(**json.loads(properties[METADATA_KEY]))
            cfg = self.metadata.cfg()
        except (*BROKEN, YAMLError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{path} was not written by tools/export_model.py: {said}") from error
        if self.metadata.outputs != "predictions":
            raise ValueError(
                f"{path} gives results of the task {self.metadata.outputs!r}; the predictor needs "
                "an export with --outputs predictions"
            )
        inputs = [(entry.name, len(entry.shape)) for entry in self.session.get_inputs()]
        if inputs != [("images", 4)]:
            raise ValueError(f"{path} has the inputs {inputs}, where images are expected")
        self._mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of the only canvas the network takes; None: it takes any."""
        height, width = self.session.get_inputs()[0].shape[2:]
        fixed = isinstance(height, int) and isinstance(width, int)
        return (height, width) if fixed else None

    def __call__(self, images: list[Tensor]) -> tuple[Predictions, Tensor | None, Size]:
        """See `maskdino.inference.predictor.Network`."""
        batch = self.batch(images)
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {"images": batch.numpy()})
        found = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
        predictions = Predictions(
            found["class_logits"], found["boxes"], found.get("mask_embeddings")
        )
        return predictions, found.get("pixel_embedding"), (batch.shape[2], batch.shape[3])

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, h, w) on one canvas: (B, 3, height, width) float32; see `batch_of`."""
        return batch_of(images, self._mean, self.canvas, self.metadata.unit, self.metadata.smallest)


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
    device: torch.device | str | None = None,
    size: int | None = None,
    max_detections: int | None = None,
    **asked: Any,
) -> MaskDINOPredictor:
    """A predictor that computes in onnxruntime; the file also holds the configuration.

    Args:
        path: as for `OnnxNetwork`.
        device: None: the CPU.
        size: as for `MaskDINOPredictor.from_config`; a file with a fixed canvas determines it.
        max_detections: likewise.
        asked: likewise, `confidence_threshold`, `tasks` and `batch_size`.

    Raises:
        FileNotFoundError, ValueError: as `OnnxNetwork` says, or a size for a fixed canvas.
    """
    network = OnnxNetwork(path, "cpu" if device is None else device)
    cfg = network.metadata.cfg()
    if size is not None and network.canvas is not None:
        raise ValueError(f"{path} has the fixed canvas {network.canvas}: size {size} cannot be had")
    if max_detections is not None:
        cfg.TEST.DETECTIONS_PER_IMAGE = max_detections
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
