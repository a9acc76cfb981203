"""Checkpoints are found, downloaded where need be, and read without running code from them."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError
from torch import Tensor

from maskdino.checkpoint.tensor_files import SUFFIX, read_tensors
from maskdino.system.errors import BROKEN, UserError, reason_of

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # the file that names the checkpoint to go on from
ZIP = b"PK\x03\x04"  # how a zip file begins, to PyTorch too
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


class CheckpointError(UserError):
    """A checkpoint cannot be used: the message names the file, and what it holds."""


def fetch(weights: str) -> str:
    """The path of a checkpoint on this machine, downloaded if it is an address.

    Args:
        weights: path, or address (`https://...`, `detectron2://...`).

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: it cannot be downloaded.
        CheckpointError: the address is one of http or ftp, which tell nobody who answers.
    """
    path = weights
    if weights.startswith(("http://", "ftp://")):
        raise CheckpointError(f"{weights} could be changed on its way: use https://")
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


def read_checkpoint(path: str, device: str = "cpu", *, sums: bool = True) -> dict[str, Any]:
    """Reads a file into a dict with the tensors, by the file's names, under "model".

    Args:
        path: of a `.pth` or `.safetensors` file, or a `.pkl` file of numpy arrays.
        device: of the tensors, but for `.pkl`; "meta": their shapes alone are read.
        sums: compare its checksums first; see `check_sums`.

    Raises:
        CheckpointError: the file is none, is damaged, holds more than tensors and plain values, or
            no tensors.
    """
    if sums:
        check_sums(path)
    if path.endswith(SUFFIX):
        data: Any = {"model": _read_safetensors(path, device)}
    else:
        data = _read_pickle(path) if path.endswith(".pkl") else _read_torch(path, device)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds {_what(data)}")
    data = _with_model(data, path)
    _check_state(data["model"], path, device)
    return data


def _with_model(data: dict, path: str) -> dict[str, Any]:
    """Finds the tensors in what a file holds, wherever other programs put them."""
    if path.endswith(".pkl") and "__author__" not in data:
        state = data.get("blobs", data)
        if isinstance(state, dict):
            state = {n: value for n, value in state.items() if not str(n).endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    if "model" not in data:
        data = {"model": data.get("model_state", data.get("state_dict", data))}
    return data


def _check_state(state: object, path: str, device: str) -> None:
    """Checks that there are tensors, by names, and nothing else."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} is no checkpoint: its weights are {_what(state)}")
    if not state:
        raise CheckpointError(f"{path} holds no weights at all: it is empty")
    wrong = {
        str(name): value
        for name, value in state.items()
        if not isinstance(name, str) or not _is_numeric(value)
    }
    if wrong:
        found = ", ".join(f"{name!r}: {_what(value)}" for name, value in list(wrong.items())[:3])
        raise CheckpointError(
            f"{path} holds no weights of a model: {found}, where tensors are expected; save them "
            'as torch.save({"model": model.state_dict()}, path)'
        )
    bare = [name for name, x in state.items() if isinstance(x, Tensor) and x.is_meta]
    if bare and device != "meta":
        raise CheckpointError(f"{path} holds the shape of {bare[0]}, but no values (device meta)")


def _is_numeric(value: object) -> bool:
    """Whether a value is a tensor, or an array that can be one."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufc"
    return isinstance(value, Tensor)


def _what(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return "None" if value is None else f"a {type(value).__name__}{size}"


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def is_of_backbone(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a backbone, and of nothing else."""
    return all(name.startswith("backbone.") for name in names)


def iterations_of(data: Mapping[str, Any]) -> int | None:
    """Steps of training behind what `read_checkpoint` gave; None: it does not tell."""
    iteration = data.get("iteration")
    return iteration + 1 if isinstance(iteration, int) else None


def check_sums(path: str) -> None:
    """Compares what a zip file holds, which is what `torch.save` writes, with its checksums.

    Each entry has its CRC-32 beside it; `torch.load` does not look. Other files have none.
    """
    if _begins_with(path, ZIP):
        status = os.stat(path)
        _check_sums(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache  # a run that goes on asks several times
def _check_sums(path: str, _size: int, _changed: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch writes zeros where it was told to write no checksums.
            has_sums = any(entry.CRC for entry in archive.infolist())
            broken = archive.testzip() if has_sums else None
    except (OSError, *BROKEN) as error:  # the former of a disk, too, that cannot read
        raise CheckpointError(f"{path} is no checkpoint, or was cut off: {error}") from error
    if broken is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of its entry {broken} is wrong; copy or download it "
            "again, or use another"
        )


def _read_torch(path: str, device: str) -> dict[str, Any]:
    mapped = device == "meta" and _begins_with(path, ZIP)  # else all of the file would be read
    try:
        return torch.load(path, map_location=device, mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if not (_begins_with(path, ZIP) or _begins_with(path, pickle.PROTO)):
            raise CheckpointError(f"{path} is no checkpoint, or was cut off") from error
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and is not loaded, because that "
            "could run code; "
            f'save its weights alone, as torch.save({{"model": model.state_dict()}}, path) '
            f"({reason_of(error)})"
        ) from error
    except BROKEN as error:
        said = reason_of(error)[:200]
        raise CheckpointError(f"{path} is no checkpoint, or was cut off: {said}") from error


def _read_safetensors(path: str, device: str) -> dict[str, Tensor]:
    try:
        return read_tensors(path, device)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no checkpoint, or was cut off: {error}") from error


def _begins_with(path: str, mark: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


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
        except (pickle.UnpicklingError, *BROKEN) as error:  # refused, or cut off
            raise CheckpointError(f"{path} is not loaded: {error}") from error


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on."""

    path: str  # of the checkpoint; "": there is none
    note: str = ""  # what was wrong with the one that should have been used; "": nothing


def find_resumption(folder: str) -> Resumption:
    """Finds the checkpoint that `last_checkpoint` names or, where it is broken, the newest other.

    Every checkpoint holds the whole state of a training: one that goes on from an earlier one
    makes the same steps again, to the same result. So nothing but time is lost by it.

    Raises:
        CheckpointError: there were checkpoints, but none can be read.
    """
    if not Path(folder).is_dir():
        return Resumption("")
    fault = f"{Path(folder, LAST)} is missing"
    if Path(folder, LAST).is_file():
        try:
            name = Path(folder, LAST).read_text(encoding="utf-8").strip()
            path = fetch(str(Path(folder, name or "(nothing)")))
            read_checkpoint(path, "meta")
            return Resumption(path)
        except (OSError, ValueError) as error:
            fault = f"{Path(folder, LAST)} names no checkpoint that can be read ({error})"
    elif not any(Path(folder).glob("model_*.pth")):
        return Resumption("")
    for iteration, path in sorted(_of_training(folder), reverse=True):
        if _is_whole(path):
            return Resumption(
                path, f"{fault}: going on from the newest other, {path}, of iteration {iteration}"
            )
    if not Path(folder, LAST).is_file():
        return Resumption("")  # weights that somebody put there
    raise CheckpointError(
        f"{fault}, and there is no other: begin anew with another OUTPUT_DIR, or with --overwrite "
        "instead of --resume"
    )


def _of_training(folder: str) -> list[tuple[int, str]]:
    """The checkpoints of a training in a folder, each with its iteration; sums are not compared."""
    found = []
    for path in Path(folder).glob("model_*.pth"):
        try:
            data = read_checkpoint(str(path), "meta", sums=False)
        except (CheckpointError, OSError):
            continue
        if "trainer" in data and isinstance(data.get("iteration"), int):
            found.append((data["iteration"], str(path)))
    return found


def _is_whole(path: str) -> bool:
    try:
        check_sums(path)
    except (CheckpointError, OSError):
        return False
    return True
