"""Converts ImageNet weights of a backbone to a file that `MODEL.WEIGHTS` takes.

    python tools/convert_backbone.py swin_large_patch4_window12_384_22k.pth swinl.pth \
        --config-file configs/coco/instance/maskdino_swinl.yaml

Reads Swin files as their authors publish them and state dicts of timm (.pth, .bin, .safetensors).
ResNet needs no conversion: detectron2 reads `detectron2://ImageNetPretrained/torchvision/R-50.pkl`
itself.
"""

import argparse

import torch
from timm.models import load_state_dict

from maskdino.backbones import TimmBackbone, build_backbone, convert_backbone
from maskdino.config import load_config


def main(words: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", help="weights of a classifier: .pth, .bin or .safetensors")
    parser.add_argument("target", help="the .pth file to write")
    parser.add_argument(
        "--config-file", required=True, help="configuration that names the backbone"
    )
    arguments = parser.parse_args(words)

    cfg = load_config(arguments.config_file, ["MODEL.TIMM.PRETRAINED", "False"])
    backbone = build_backbone(cfg)
    if not isinstance(backbone, TimmBackbone):
        parser.error(
            f"{cfg.MODEL.BACKBONE.NAME} is no timm model: detectron2 loads its weights itself"
        )

    weights = convert_backbone(load_state_dict(arguments.source, device="cpu"), backbone)
    # The norms of the outputs, which no classifier has, are written as they are initialised.
    weights = backbone.state_dict() | weights
    prefixed = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    torch.save(
        {"model": prefixed, "__author__": "timm", "matching_heuristics": False}, arguments.target
    )
    print(f"{len(prefixed)} weights written to {arguments.target}")
