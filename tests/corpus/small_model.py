"""A small Mask DINO with random weights, made once, and the words of commands that use it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from maskdino.model import MaskDINO
from tests.helpers import tiny_cfg


@cache
def model_folder() -> Path:
    """A folder with `config.yaml` and `weights.pth`."""
    folder = Path(tempfile.mkdtemp(prefix="corpus_model"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": MaskDINO(cfg).state_dict()}, folder / "weights.pth")
    return folder


def prediction_words(
    *words: object, config: object = None, weights: object = None, overrides: tuple[str, ...] = ()
) -> list[str]:
    """The words of `maskdino predict` with the model."""
    config = config or model_folder() / "config.yaml"
    weights = weights or model_folder() / "weights.pth"
    ending = ["--config-file", config, "--opts", "MODEL.WEIGHTS", weights, *overrides]
    return [*map(str, words), *map(str, ending)]
