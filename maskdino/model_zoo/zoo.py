"""Configurations, released weights and models by name, in the manner of `detectron2.model_zoo`."""

import difflib
import hashlib
import logging
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.config import load_config

from .catalogue import RELEASED, ReleasedModel, find_released

logger = logging.getLogger(__name__)


def _configs_folder() -> Path:
    """The folder of configurations: inside an installed package, or at the root of a checkout.

    Raises:
        FileNotFoundError: if there is neither.
    """
    installed = Path(__file__).resolve().parent / "configs"
    checkout = Path(__file__).resolve().parents[2] / "configs"
    for folder in (installed, checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no configurations at {installed} nor {checkout}; install maskdino again"
    )


def list_configs(trained: bool = False) -> list[str]:
    """Names of shipped configurations, sorted; with `trained`, of those with released weights."""
    folder = _configs_folder()
    paths = (p for p in folder.rglob("*.yaml") if not p.name.startswith("Base"))
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    released = {model.config for model in RELEASED}
    return [name for name in names if name in released or not trained]


def get_config_file(name: str) -> str:
    """The path of a shipped configuration.

    Args:
        name: relative to `configs/`, such as `coco/instance/maskdino_R50.yaml`; the ending may be
            left out.

    Raises:
        FileNotFoundError: if there is none of this name; the message suggests close ones.
    """
    name = name.removesuffix(".yaml") + ".yaml"
    path = _configs_folder() / name
    if not path.is_file():
        close = difflib.get_close_matches(name, list_configs(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see maskdino.model_zoo.list()"
        raise FileNotFoundError(f"no configuration {name!r} in the model zoo; {hint}")
    return str(path)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """Reads a shipped configuration.

    Args:
        name: as for `get_config_file`.
        trained: take the released weights as MODEL.WEIGHTS, with the values that they were trained
            with, where these differ from the configuration's. Otherwise MODEL.WEIGHTS starts a
            training.

    Raises:
        FileNotFoundError: if there is no such configuration.
        KeyError: if `trained` and no weights were released.
    """
    path = get_config_file(name)
    if not trained:
        return load_config(path)
    model = find_released(name)
    return load_config(path, [*model.overrides, "MODEL.WEIGHTS", model.url])


def get_checkpoint_url(name: str) -> str:
    """The address of released weights; `name` and errors as for `find_released`."""
    return find_released(name).url


def download(name: str) -> str:
    """Downloads released weights, with a progress bar, unless they are in iopath's cache.

    Args:
        name: as for `find_released`.

    Returns:
        the path of the local file.

    Raises:
        KeyError: if no weights were released under this name.
        ConnectionError: if the file cannot be downloaded.
        ValueError: if the file's checksum is not the one in the catalogue.
    """
    model = find_released(name)
    try:
        path = PathManager.get_local_path(model.url)
    except OSError as error:  # what urllib raises for every failure of the network
        raise ConnectionError(
            f"cannot download {model.url} ({error}); without network, "
            "copy the file to this machine and give its path as MODEL.WEIGHTS"
        ) from error
    _check_sha256(model, path)
    return path


def _check_sha256(model: ReleasedModel, path: str) -> None:
    if model.sha256 is None:
        logger.warning("%s is used unchecked: no checksum of it is known", model.file)
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        raise ValueError(
            f"{path} has sha256 {digest.hexdigest()} instead of {model.sha256}; "
            "delete it and download it again"
        )


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Builds a model of the zoo, in training mode, and loads its weights.

    Args:
        name: as for `get_config_file`.
        trained: load the released weights; otherwise those that start a training (ImageNet's, as a
            rule).
        device: where the model is put; None: the GPU if there is one.

    Raises:
        FileNotFoundError, KeyError, ConnectionError, ValueError: as `get_config` and `download`
        say.
    """
    cfg = get_config(name, trained)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = download(name) if trained else cfg.MODEL.WEIGHTS
    model = build_model(cfg)
    MaskDINOCheckpointer(model, require_all=trained).load(weights)
    return model
