"""Models from folders and files that hold all that is needed to use them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from maskdino.checkpoint.loading import load_trained
from maskdino.checkpoint.pretrained import Pretrained, find_pretrained
from maskdino.model import MaskDINO
from maskdino.model_zoo.zoo import read_config
from maskdino.system.devices import pick_device


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
