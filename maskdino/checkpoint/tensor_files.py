"""Weights in safetensors files: tensors by name and a few texts, and no code that could run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskdino.system.errors import WriteError
from maskdino.system.files import written_whole

SUFFIX = ".safetensors"


def read_tensors(path: str | os.PathLike, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file, by name; on "meta" their shapes alone are read.

    Raises:
        FileNotFoundError: there is none.
        safetensors.SafetensorError: it holds something else, or was cut off.
    """
    with safe_open(path, "pt") as file:  # which maps the file: nothing is read before it is used
        return {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118


def read_texts(path: str | os.PathLike) -> dict[str, str]:
    """The texts of a file, by name ("metadata"); errors as of `read_tensors`."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> None:
    """Writes tensors, no two of which share memory, whole or not at all (WriteError)."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with written_whole(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # as of any file; the package's own are private
            save_file(whole, temporary, {"format": "pt", **texts})
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:  # the package's own writer raises the latter
        raise WriteError(f"cannot write {path}: {error}") from error
