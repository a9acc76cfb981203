"""Checkpoints are found, downloaded where need be, and read without running code from them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

# What a pickle of numpy arrays (ImageNet weights of detectron2's model zoo) may contain.
_PICKLE_GLOBALS = {
    "_codecs": {"encode"},
    "collections": {"OrderedDict"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
}


def fetch(weights: str) -> str:
    """The path of a checkpoint on this machine, downloaded if it is an address.

    Args:
        weights: path, or address (`https://...`, `detectron2://...`).

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: it cannot be downloaded.
    """
    path = weights
    if "://" in weights:
        try:
            path = PathManager.get_local_path(weights)
        except OSError as error:  # what urllib raises for every failure of the network
            raise ConnectionError(
                f"cannot download {weights} ({error}); without network, copy the file to this "
                'machine and give its path as MODEL.WEIGHTS or --weights; MODEL.WEIGHTS "" starts '
                "a training from random weights"
            ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    return path


def read_checkpoint(path: str, device: str = "cpu") -> dict[str, Any]:
    """Reads a file into a dict with the tensors, by the file's names, under "model".

    Args:
        path: of a `.pth` file, or a `.pkl` file of numpy arrays.
        device: of the tensors of a `.pth` file; "meta": their shapes alone are read.

    Raises:
        ValueError: the file is none, was cut off, or holds more than tensors and plain values.
    """
    data = _read_pickle(path) if path.endswith(".pkl") else _read_torch(path, device)
    if path.endswith(".pkl") and "__author__" not in data:
        state = data.get("blobs", data)
        state = {name: value for name, value in state.items() if not name.endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    if "model" not in data:
        data = {"model": data.get("model_state", data.get("state_dict", data))}
    return data


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _read_torch(path: str, device: str) -> dict[str, Any]:
    mapped = device == "meta" and zipfile.is_zipfile(path)  # else all of the file would be read
    try:
        return torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and is not loaded, because that "
            "could run code; "
            f'save its weights alone, as torch.save({{"model": model.state_dict()}}, path). '
            f"({error})"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint, or was cut off: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _PICKLE_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only arrays are read from .pkl files"
        )


def _read_pickle(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError) as error:  # refused, or cut off
            raise ValueError(f"{path} is not loaded: {error}") from error
