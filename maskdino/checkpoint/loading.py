"""From MODEL.WEIGHTS to the configuration, before a model is built, and to the built model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.ema import build_average
from maskdino.checkpoint.reading import (
    CheckpointError,
    fetch,
    is_of_backbone,
    read_checkpoint,
    shapes_of,
)
from maskdino.checkpoint.released_weights import (
    EMPTY_MASKS,
    LARGEST_PROPOSALS,
    ReleasedStructure,
    is_released,
    refuse_foreign,
)
from maskdino.config.loading import read_file

logger = logging.getLogger(__name__)


def settle_weights(
    cfg: CfgNode, overrides: Sequence[str] = (), *, resume: bool = False, whole: bool = False
) -> None:
    """Writes into a configuration what its MODEL.WEIGHTS mean for the model, before it is built.

    Released files decide what an empty mask gives and which level has the largest proposals; no
    tensor of them tells a loader. A run that goes on keeps what its own configuration says.

    Args:
        cfg: changed in place.
        overrides: keys and values that the user gave, which have the last word.
        resume: the last checkpoint of OUTPUT_DIR is loaded in their place.
        whole: the file must hold a whole Mask DINO (to predict), not a backbone alone.

    Raises:
        FileNotFoundError, ConnectionError: there is no such file, or it cannot be downloaded.
        ValueError: the file cannot be read, or holds another model.
    """
    saved = Path(cfg.OUTPUT_DIR, "config.yaml")
    if resume and saved.is_file():
        try:
            node = read_file(str(saved))["MODEL"]["MASK_DINO"]["QUERY_SELECTION"]
            values = {key: node[key.rpartition(".")[2]] for key in (EMPTY_MASKS, LARGEST_PROPOSALS)}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{saved}, of the run that goes on, is no whole configuration ({error}): mend it, "
                "or remove the file"
            ) from error
    elif cfg.MODEL.WEIGHTS:
        values = _decided_by(cfg.MODEL.WEIGHTS, whole)
    else:
        return
    node = cfg.MODEL.MASK_DINO.QUERY_SELECTION
    for key, value in values.items():
        name = key.rpartition(".")[2]
        if key not in overrides[::2] and node[name] != value:
            logger.info('%s is "%s", as for %s.', key, value, cfg.MODEL.WEIGHTS)
            node[name] = value


def _decided_by(weights: str, whole: bool) -> dict[str, str]:
    path = fetch(weights)
    data = read_checkpoint(path, "meta")
    state = data["model"]
    refuse_foreign(state, path)
    if is_released(state):
        return ReleasedStructure.from_shapes(shapes_of(state)).decided
    backbone = data.get("matching_heuristics") or is_of_backbone(state)
    if whole and backbone:
        raise not_whole(weights)
    return {}


def not_whole(weights: str) -> ValueError:
    """The error of weights that start a training, where a model is to predict."""
    return CheckpointError(
        f"{weights} starts a training: it holds no whole Mask DINO, but a backbone; to predict, "
        'give weights=FILE, or weights="released" for those of the paper\'s authors (--weights, or '
        "MODEL.WEIGHTS; trained=True in maskdino.model_zoo)"
    )


def load_trained(model: nn.Module, cfg: CfgNode, path: str | None = None) -> None:
    """Loads all weights of a model; the averaged ones where the run kept an average (SOLVER.EMA).

    Args:
        model: of the configuration.
        cfg: as `settle_weights` left it.
        path: of the checkpoint; None: MODEL.WEIGHTS.

    Raises:
        ValueError: the file does not hold all weights of the model.
    """
    average = build_average(cfg, model)
    parts: dict[str, Any] = {} if average is None else {"ema": average}
    checkpointer = MaskDINOCheckpointer(model, require_all=True, **parts)
    checkpointer.load(cfg.MODEL.WEIGHTS if path is None else path)
    if average is not None and average.restored:
        logger.info("These are the averaged weights.")
        model.load_state_dict(average.state_dict())
