r"""Converts ImageNet weights of a backbone to a file that `MODEL.WEIGHTS` takes.

    maskdino convert backbone swin_large_patch4_window12_384_22k.pth swinl.pth \
        --config-file coco/instance/maskdino_swinl

Reads Swin files as their authors publish them and state dicts of timm (.pth, .bin, .safetensors).
ResNet needs no conversion: detectron2 reads `detectron2://ImageNetPretrained/torchvision/R-50.pkl`
itself.
"""

from pathlib import Path

import torch

from maskdino.backbones import TimmBackbone, build_backbone, convert_backbone
from maskdino.backbones.convert import read_tensors
from maskdino.checkpoint.reading import fetch
from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.config import load_config
from maskdino.model_zoo import find_config
from maskdino.system.files import written_whole
from maskdino.system.words import counted


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("source", help="weights of a classifier: .pth, .bin or .safetensors")
    parser.add_argument("target", help="the .pth file to write")
    parser.add_argument(
        "--config-file", required=True, help="configuration that names the backbone: path or name"
    )
    arguments = parser.parse_args(words)

    if Path(arguments.target).resolve() == Path(arguments.source).resolve():
        raise CommandError(f"{arguments.target} is the file that is read: give another target")
    state = read_tensors(fetch(arguments.source))
    cfg = load_config(find_config(arguments.config_file), ["MODEL.TIMM.PRETRAINED", "False"])
    backbone = build_backbone(cfg)
    if not isinstance(backbone, TimmBackbone):
        raise CommandError(
            f"{cfg.MODEL.BACKBONE.NAME} is no timm model: detectron2 loads its weights itself"
        )

    try:
        weights = convert_backbone(state, backbone)
    except ValueError as error:
        raise CommandError(f"{arguments.source}: {error}") from error
    # The norms of the outputs, which no classifier has, are written as they are initialized.
    weights = backbone.state_dict() | weights
    prefixed = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    data = {"model": prefixed, "__author__": "timm", "matching_heuristics": False}
    with written_whole(arguments.target) as path:
        torch.save(data, path)
    print(f"{counted(len(prefixed), 'weight')} written to {arguments.target}")
