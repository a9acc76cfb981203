"""From a configuration, by path or name, and a checkpoint to a model that is ready to predict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode

from maskdino import model_zoo
from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.ema import WeightAverage
from maskdino.config import load_config
from maskdino.devices import configured_device, find_device
from maskdino.model import MaskDINO

RELEASED = "released"  # in place of a path: the weights that the authors of the paper published


def read_config(
    config: str | os.PathLike, weights: str | os.PathLike | None, opts: Sequence[str]
) -> CfgNode:
    """The configuration, with MODEL.WEIGHTS as `MaskDINOPredictor.from_config` tells.

    Raises:
        FileNotFoundError: there is no such configuration or checkpoint.
        ValueError: neither `weights` nor the configuration names a checkpoint.
    """
    if weights == RELEASED:
        overrides = model_zoo.find_released(str(config)).overrides
        cfg = load_config(str(find_config(config)), [*overrides, *opts])
        cfg.MODEL.WEIGHTS = model_zoo.download(str(config))
        return cfg
    cfg = load_config(str(find_config(config)), list(opts))
    path = str(cfg.MODEL.WEIGHTS if weights is None else weights)
    if not path:
        raise ValueError("the configuration names no MODEL.WEIGHTS: give the path of a checkpoint")
    if "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    cfg.MODEL.WEIGHTS = path
    return cfg


def find_config(config: str | os.PathLike) -> Path:
    """The path of a configuration, given as path or as name in the model zoo.

    Raises:
        FileNotFoundError: there is none; the message names those most like it.
    """
    return Path(config) if Path(config).is_file() else Path(model_zoo.get_config_file(str(config)))


def load_weights(model: MaskDINO, cfg: CfgNode) -> None:
    """Loads MODEL.WEIGHTS; the averaged weights where the run kept an average (SOLVER.EMA).

    Raises:
        ValueError: the file does not hold all weights of the model.
    """
    average = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
    parts = {} if average is None else {"ema": average}
    MaskDINOCheckpointer(model, require_all=True, **parts).load(cfg.MODEL.WEIGHTS)
    if average is not None and average.restored:
        model.load_state_dict(average.state_dict())


def pick_device(wanted: str | torch.device | None, configured: str) -> torch.device:
    """The device that was asked for, else the configured one, else, without a GPU, the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if wanted is None:
        return configured_device(configured)
    return find_device(wanted, "the device asked for")
