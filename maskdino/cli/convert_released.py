"""Turns a configuration of the released Mask DINO code, and its weights, into this project's.

  --config maskdino_R50.yaml --weights maskdino_r50.pth --output converted
  --config my_fork.yaml --output converted

writes converted/config.yaml and, of weights, converted/model.pth. MODEL.WEIGHTS accepts a released
checkpoint as it is, too; of configurations of forks, keys that no code here knows are named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode

from maskdino.checkpoint.loading import load_trained
from maskdino.checkpoint.reading import read_checkpoint, shapes_of
from maskdino.checkpoint.released_config import convert_config, set_value
from maskdino.checkpoint.released_weights import (
    ReleasedStructure,
    convert_weights,
    is_released,
    refuse_foreign,
)
from maskdino.checkpoint.released_yaml import read_released_yaml
from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.config import load_config
from maskdino.config.loading import get_value, one_line
from maskdino.model import MaskDINO
from maskdino.system.files import write_text, written_whole

OTHER_MODELS = {
    "MASK_DINO": "this project",
    "MASK_FORMER": "Mask2Former or MaskFormer",
    "ONE_FORMER": "OneFormer",
    "DETR": "DETR",
}


def convert(config: Path, weights: Path | None, output: Path) -> list[str]:
    """Writes the converted files, weights too if there are, and returns what a user should know.

    Raises:
        OSError: a file cannot be read, or the output is there already.
        ValueError: a file is none, or the checkpoint does not fit the configuration.
    """
    for name in ("config.yaml", "model.pth"):
        if (output / name).exists():
            raise FileExistsError(f"{output} already has a {name}; choose another folder")
    cfg = load_config(None, ["MODEL.DEVICE", "cpu"])
    values = _read(config)
    try:
        remarks = convert_config(values, cfg)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        OverflowError,
    ) as error:
        raise CommandError(f"{config}: {one_line(error)}") from error
    if weights is None:
        if cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS:
            remarks.append(
                f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, a file of a backbone: `maskdino convert "
                "backbone` makes of its source one that fits"
            )
        try:
            with torch.device("meta"):
                MaskDINO(cfg)
        except (KeyError, ValueError) as error:
            raise CommandError(f"{config} describes no model: {one_line(error)}") from error
    else:
        remarks += _convert_weights(weights, output, cfg)
    values = {"VERSION": cfg.VERSION, **differences(cfg, load_config())}
    write_text(output / "config.yaml", yaml.safe_dump(values, sort_keys=True))
    return remarks


def _read(config: Path) -> dict[str, Any]:
    values = read_released_yaml(config)
    model = values.get("MODEL")
    nodes = model if isinstance(model, dict) else {}
    for node, owner in OTHER_MODELS.items():
        if node in nodes and "MaskDINO" not in nodes:
            raise CommandError(f"{config} is a configuration of {owner}: it has MODEL.{node}")
    return values


def _convert_weights(weights: Path, output: Path, cfg: CfgNode) -> list[str]:
    """Writes the weights, which decide where the configuration disagrees; returns remarks."""
    state = read_checkpoint(str(weights))["model"]
    refuse_foreign(state, str(weights))
    if not is_released(state):
        raise CommandError(
            f"{weights} has no released Mask DINO names; its first is {next(iter(state), None)!r}"
        )
    shapes, remarks = shapes_of(state), []
    for key, value in ReleasedStructure.from_shapes(shapes).config_values(shapes).items():
        if (found := get_value(cfg, key)) != value:
            remarks.append(
                f"the configuration disagrees with the checkpoint: {key} is {found!r}, set to "
                f"{value!r}"
            )
            set_value(cfg, key, value)
    model = MaskDINO(cfg)
    output.mkdir(parents=True, exist_ok=True)
    cfg.MODEL.WEIGHTS = str(output / "model.pth")
    with written_whole(cfg.MODEL.WEIGHTS) as path:
        torch.save({"model": convert_weights(state, model.encoder.num_heads)}, path)
        load_trained(model, cfg, str(path))
    return remarks


def differences(cfg: CfgNode, default: CfgNode) -> dict[str, Any]:
    """The keys of `cfg` whose value is not the default, as plain nested values."""
    changed: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            inner = differences(value, default.get(key, CfgNode()))
            if inner:
                changed[key] = inner
        elif key != "DEVICE" and (key not in default or default[key] != value):
            changed[key] = list(value) if isinstance(value, tuple) else value
    return changed


@errors_in_one_line()
def main(words: list[str] | None = None) -> int:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="released YAML file")
    parser.add_argument("--weights", type=Path, help="released .pth file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args(words)
    for remark in convert(arguments.config, arguments.weights, arguments.output):
        print(remark)
    print(f"wrote {arguments.output / 'config.yaml'}")
    if arguments.weights is not None:
        print(f"wrote {arguments.output / 'model.pth'}; every weight has found its place")
    return 0
