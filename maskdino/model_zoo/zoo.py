"""Configurations, released weights and models by name, in the manner of `detectron2.model_zoo`."""

import difflib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.loading import load_trained, not_whole, settle_weights
from maskdino.checkpoint.pretrained import CONFIG, WEIGHTS, Pretrained, find_pretrained
from maskdino.checkpoint.reading import fetch, find_resumption
from maskdino.config import load_config
from maskdino.config.checks import check_values
from maskdino.model import MaskDINO
from maskdino.system.devices import pick_device

from .catalogue import RELEASED, ReleasedModel, find_released

logger = logging.getLogger(__name__)

LAZY = "lazy/"  # detectron2's LazyConfig files; all others are YAML
RELEASED_WEIGHTS = "released"  # in place of a path: those that were released for the configuration


def _configs_folder() -> Path:
    """The folder of configurations: inside an installed package, or at the root of a checkout."""
    installed = Path(__file__).resolve().parent / "configs"
    checkout = Path(__file__).resolve().parents[2] / "configs"
    for folder in (installed, checkout):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no configurations at {installed} nor {checkout}; install maskdino again"
    )


def list_configs(trained: bool = False, lazy: bool = False) -> list[str]:
    """Names of shipped configurations, sorted: all, or those with released weights (`trained`).

    Either YAML files, which our commands read, or those of detectron2's LazyConfig (`lazy`).
    """
    folder = _configs_folder()
    found = folder.glob(f"{LAZY}*.py") if lazy else folder.rglob("*.yaml")
    paths = (p for p in found if not p.name.startswith("Base"))
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    released = {model.config for model in RELEASED}
    return [name for name in names if name in released or not trained]


def get_config_file(name: str) -> str:
    """The path of a shipped configuration.

    Args:
        name: relative to `configs/`, such as `coco/instance/maskdino_R50.yaml` or
            `lazy/coco_instance_R50.py`; the ending may be left out.

    Raises:
        FileNotFoundError: if there is none of this name; the message suggests close ones.
    """
    ending = ".py" if name.startswith(LAZY) else ".yaml"
    name = name.removesuffix(ending) + ending
    path = _configs_folder() / name
    if not path.is_file():
        close = difflib.get_close_matches(name, list_configs() + list_configs(lazy=True), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see maskdino.model_zoo.list()"
        raise FileNotFoundError(f"no configuration {name!r} in the model zoo; {hint}")
    return str(path)


def get_config(name: str, trained: bool = False) -> CfgNode | DictConfig:
    """Reads a shipped configuration; one of ``lazy/`` as detectron2's LazyConfig.

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
        return LazyConfig.load(path) if name.startswith(LAZY) else load_config(path)
    model = find_released(name)
    return load_config(path, [*model.overrides, "MODEL.WEIGHTS", model.url])


def find_config(config: str | os.PathLike) -> Path:
    """The path of a configuration, given as path, as name in the zoo, or as folder that has one.

    Raises:
        FileNotFoundError: if there is none; the message names those most like it.
        ValueError: if it is a LazyConfig, which our commands do not read.
    """
    path = Path(config, CONFIG) if Path(config).is_dir() else Path(config)
    path = path if path.is_file() else Path(get_config_file(str(config)))
    if path.suffix == ".py":
        raise ValueError(
            f"{path} is a LazyConfig: detectron2's tools/lazyconfig_train_net.py trains it, and "
            "instantiate(model_zoo.get_config(name).model) builds its model"
        )
    return path


def read_config(
    config: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    *,
    whole: bool = False,
    resume: bool = False,
) -> CfgNode:
    """Reads a configuration, with weights, as the model is to be built: the way of all commands.

    Args:
        config: path of a YAML file, name in the zoo, or folder of a model (`save_pretrained`).
        weights: path or address of a checkpoint, ours or a released one; name of a released model;
            "released": what was released for this configuration; "": random weights; None:
            MODEL.WEIGHTS of the configuration or, if it names none, those of the folder.
        overrides: keys and values in turn, which have the last word but for `weights`.
        whole: the weights must be those of a whole model (to predict), not of a backbone alone.
        resume: prefer the last checkpoint of OUTPUT_DIR that can be read, if there is one.

    Returns:
        The configuration, in which stands all that the weights decide; MODEL.WEIGHTS can be loaded.

    Raises:
        FileNotFoundError: if there is no such configuration or checkpoint.
        ConnectionError: if the weights cannot be downloaded.
        KeyError: if a key is unknown, or no weights were released for the configuration.
        ValueError: if a value makes no sense, the weights are of another model, or `whole` and
            there are none; if no checkpoint to resume from can be read; or the configuration is a
            LazyConfig.
    """
    cfg = load_config(find_config(config), overrides)
    check_values(cfg)
    if weights is None and not cfg.MODEL.WEIGHTS and Path(config, WEIGHTS).is_file():
        weights = Path(config, WEIGHTS)
    if weights is not None:
        cfg.MODEL.WEIGHTS = str(weights)
    is_released = any(cfg.MODEL.WEIGHTS in model.names for model in RELEASED)
    if cfg.MODEL.WEIGHTS == RELEASED_WEIGHTS:
        cfg.MODEL.WEIGHTS = download(_name_of(config))
    elif is_released and not Path(cfg.MODEL.WEIGHTS).is_file():
        cfg.MODEL.WEIGHTS = download(cfg.MODEL.WEIGHTS)
    resume = resume and bool(find_resumption(cfg.OUTPUT_DIR).path)
    whole = whole and not resume
    if whole and not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "the configuration names no MODEL.WEIGHTS: give the path of a checkpoint, or "
            f'"{RELEASED_WEIGHTS}"'
        )
    if whole and "://ImageNetPretrained/" in cfg.MODEL.WEIGHTS:
        raise not_whole(cfg.MODEL.WEIGHTS)  # without downloading it
    settle_weights(cfg, overrides, resume=resume, whole=whole)
    return cfg


def _name_of(config: str | os.PathLike) -> str:
    """The name of a configuration in the zoo, of which the path may be given."""
    path, folder = Path(config).resolve(), _configs_folder()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(config)


def get_checkpoint_url(name: str) -> str:
    """The address of released weights; `name` and errors as for `find_released`."""
    return find_released(name).url


def download(name: str) -> str:
    """Downloads released weights, unless they are in iopath's cache; the path of the local file.

    The name is as for `find_released`.

    Raises:
        KeyError: if no weights were released under this name.
        ConnectionError: if the file cannot be downloaded.
        ValueError: if the file's checksum is not the one in the catalogue.
    """
    model = find_released(name)
    path = fetch(model.url)
    _check_sha256(model, path)
    return path


def _check_sha256(model: ReleasedModel, path: str) -> None:
    if model.sha256 is None:
        logger.warning("%s is used unchecked: no checksum of it is known", model.file)
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):  # the whole may be of a gigabyte
            digest.update(piece)
    found = digest.hexdigest()
    if found != model.sha256:
        raise ValueError(
            f"{path} has sha256 {found} instead of {model.sha256}; delete it and download it again"
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
    cfg = read_config(get_config_file(name), RELEASED_WEIGHTS if trained else None)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(cfg)
    MaskDINOCheckpointer(model, require_all=trained).load(cfg.MODEL.WEIGHTS)
    return model


def load_pretrained(
    source: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    revision: str | None = None,
    opts: Sequence[str] = (),
) -> tuple[MaskDINO, CfgNode]:
    """Builds a model of a folder of `save_pretrained`, in evaluation mode.

    Args:
        source: the folder; or a file of weights with its configuration; or "user/name" of a model
            of the Hugging Face Hub.
        device: None: the configuration's, or the CPU where there is no GPU.
        revision: of the hub's.
        opts: keys and values in turn that override the configuration's.

    Returns:
        The model, and its configuration with the file of weights as MODEL.WEIGHTS.

    Raises:
        FileNotFoundError: there is no such folder or file, or it lacks something.
        ConnectionError: the model cannot be downloaded.
        ValueError: the weights do not fit the configuration, or an argument is wrong.
    """
    return build_pretrained(find_pretrained(source, revision), device=device, opts=opts)


def build_pretrained(
    found: Pretrained, *, device: str | torch.device | None = None, opts: Sequence[str] = ()
) -> tuple[MaskDINO, CfgNode]:
    """The model of what was found; see `load_pretrained`."""
    with found.config_file() as config:
        cfg = read_config(config, found.weights, opts, whole=True)
    cfg.MODEL.DEVICE = str(pick_device(device, cfg.MODEL.DEVICE))
    model = build_model(cfg)
    load_trained(model, cfg)
    if found.categories is not None:
        model.is_thing.copy_(torch.tensor(found.categories.is_thing))
    return model.eval(), cfg
