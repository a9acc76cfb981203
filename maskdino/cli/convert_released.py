"""Turns a configuration and a checkpoint of the released Mask DINO code into this project's.

    python tools/convert_released.py --config maskdino_R50.yaml --weights maskdino_r50.pth \\
        --output converted

writes converted/config.yaml and converted/model.pth. (MODEL.WEIGHTS accepts a released checkpoint
as it is, too; this tool is for its configuration, and says what of it the checkpoint contradicts.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.reading import read_checkpoint, shapes_of
from maskdino.checkpoint.released_config import convert_config, set_value
from maskdino.checkpoint.released_weights import ReleasedStructure, convert_weights, is_released
from maskdino.config import add_maskdino_config
from maskdino.model import MaskDINO


def convert(config: Path, weights: Path, output: Path) -> list[str]:
    """Writes the converted files and returns what a user should know.

    Raises:
        FileExistsError: the output is there already.
        ValueError: the checkpoint is not a released one, or does not fit the configuration.
    """
    if (output / "model.pth").exists() or (output / "config.yaml").exists():
        raise FileExistsError(
            f"{output} already has a config.yaml or model.pth; choose another folder"
        )
    state = read_checkpoint(str(weights))["model"]
    if not is_released(state):
        raise ValueError(
            f"{weights} has no released Mask DINO names; its first is {next(iter(state), None)!r}"
        )
    cfg = _default_cfg()
    released = CfgNode.load_yaml_with_base(str(config))
    remarks = [f"left out, without meaning here: {key}" for key in convert_config(released, cfg)]
    remarks += _follow_weights(cfg, state)
    cfg.MODEL.DEVICE = "cpu"
    converted = convert_weights(state, cfg.MODEL.MASK_DINO.ENCODER.NUM_HEADS)
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"model": converted}, output / "model.pth")
    cfg.MODEL.WEIGHTS = str(output / "model.pth")
    MaskDINOCheckpointer(MaskDINO(cfg), require_all=True).load(cfg.MODEL.WEIGHTS)
    (output / "config.yaml").write_text(yaml.safe_dump(differences(cfg), sort_keys=True))
    return remarks


def _default_cfg() -> CfgNode:
    cfg = get_cfg()
    add_maskdino_config(cfg)
    return cfg


def _follow_weights(cfg: CfgNode, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Sets what the checkpoint's shapes say, and tells where the configuration said otherwise."""
    shapes = shapes_of(state)
    structure = ReleasedStructure.from_shapes(shapes)
    remarks = []
    for key, value in structure.config_values(shapes).items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        if node != value:
            remarks.append(
                f"the configuration disagrees with the checkpoint: {key} is {node!r}, set to "
                f"{value!r}"
            )
            set_value(cfg, key, value)
    return remarks


def differences(cfg: CfgNode, default: CfgNode | None = None) -> dict:
    """The keys of `cfg` whose value is not the default, as plain nested values."""
    default = _default_cfg() if default is None else default
    changed = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            inner = differences(value, default.get(key, CfgNode()))
            if inner:
                changed[key] = inner
        elif key != "DEVICE" and (key not in default or default[key] != value):
            changed[key] = list(value) if isinstance(value, tuple) else value
    return changed


def main(words: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="released YAML file")
    parser.add_argument("--weights", type=Path, required=True, help="released .pth file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args(words)
    try:
        remarks = convert(arguments.config, arguments.weights, arguments.output)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(remarks))
    print(
        f"wrote {arguments.output}/config.yaml and {arguments.output}/model.pth; every weight "
        "has found its place"
    )
    return 0
