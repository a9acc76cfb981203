"""What runs ONNX files: onnxruntime and OpenVINO, behind one interface."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int | None, ...]  # None: an axis that varies
OPENVINO_DEVICES = {"cpu": "CPU", "xpu": "GPU"}  # PyTorch's names, and OpenVINO's


class Engine(ABC):
    """A loaded graph.

    Attributes:
        metadata: texts that the file carries.
        inputs: their shapes by name.
        outputs: likewise.
    """

    metadata: dict[str, str]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name, on the CPU, of inputs by name, on any device."""
        values = self._compute({name: value.cpu().numpy() for name, value in feed.items()})
        return {
            name: torch.from_numpy(np.asarray(value))
            for name, value in zip(self.outputs, values, strict=True)
        }

    @abstractmethod
    def _compute(self, feed: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        """All outputs in their order."""


class OnnxRuntime(Engine):
    """Computes with onnxruntime."""

    def __init__(
        self,
        model: str | os.PathLike | bytes,
        device: torch.device | str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Loads an ONNX file, or its content.

        Args:
            model: path or content.
            device: on which it computes.
            threads: of the CPU; None: one for each core.

        Raises:
            ModuleNotFoundError: there is no onnxruntime.
            FileNotFoundError: there is no such file.
            ValueError: onnxruntime cannot read the file, or has no support for the device.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "ONNX files need onnxruntime: pip install onnxruntime"
            ) from error
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
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # what concerns the file is raised; the rest is of no use
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=providers)
        # onnxruntime has an exception of its own for each kind of failure, all plain RuntimeErrors
        # or direct children of Exception.
        except Exception as error:
            name = "the exported program" if isinstance(model, bytes) else model
            raise ValueError(f"onnxruntime cannot run {name}: {error}") from error
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        self.inputs, self.outputs = (
            {
                value.name: tuple(axis if isinstance(axis, int) else None for axis in value.shape)
                for value in values
            }
            for values in (self._session.get_inputs(), self._session.get_outputs())
        )

    def _compute(self, feed: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        return self._session.run(list(self.outputs), feed)


class OpenVino(Engine):
    """Computes with OpenVINO, in float32 also where OpenVINO itself would take bfloat16."""

    def __init__(
        self,
        path: str | os.PathLike,
        device: torch.device | str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Loads an ONNX file.

        Args:
            path: of the file.
            device: PyTorch's name, "cpu", "xpu" or, of several, "xpu:1".
            threads: of the CPU; None: OpenVINO's choice.

        Raises:
            ModuleNotFoundError: there is no OpenVINO.
            FileNotFoundError: there is no such file.
            ValueError: OpenVINO cannot read the file, or has no such device.
        """
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "--backend openvino needs OpenVINO: pip install 'maskdino[openvino]'"
            ) from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no ONNX file {path}")
        core = openvino.Core()
        # "GPU", or "GPU.0" and "GPU.1" where there are more.
        there = {name for full in core.available_devices for name in (full, full.partition(".")[0])}
        place = torch.device(device)
        name = OPENVINO_DEVICES.get(place.type, "")
        if place.index:
            name = f"{name}.{place.index}"
        if name not in there:
            known = [ours for ours, its in OPENVINO_DEVICES.items() if its in there]
            raise ValueError(f"OpenVINO does not compute on {device} here, but on {known}")
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            self._network = core.compile_model(model, name, settings)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"OpenVINO cannot run {path}: {said}") from error
        info = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}
        self.metadata = {str(key): str(value) for key, value in info.items()}
        self.inputs, self.outputs = (
            {
                value.any_name: tuple(
                    axis.get_length() if axis.is_static else None for axis in value.partial_shape
                )
                for value in values
            }
            for values in (model.inputs, model.outputs)
        )

    def _compute(self, feed: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        # By place: outputs of the compiled network also have the names of what was left out.
        return self._network(feed).to_tuple()


ENGINES: dict[str, Callable[..., Engine]] = {"onnx": OnnxRuntime, "openvino": OpenVino}
