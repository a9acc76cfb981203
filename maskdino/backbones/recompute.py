"""Recomputing the first stages of a ResNet, whose maps are the largest and products the smallest.

Backbones of timm have a key of their own, `MODEL.TIMM.ACTIVATION_CHECKPOINT`.
"""

from functools import partial

from detectron2.modeling import Backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from maskdino.ops.recompute import recomputed


def recompute_first_stages(backbone: Backbone, level: str) -> None:
    """Lets a backbone recompute its stem and its first stage at the level "all" (in place).

    Names of weights stay. Backbones other than detectron2's ResNet stay as they are.
    """
    if isinstance(backbone, ResNet) and level == "all":
        for part in (backbone.stem, backbone.stages[0]):
            part.forward = partial(_forward, part)


def _forward(part: nn.Module, images: Tensor) -> Tensor:
    return recomputed(partial(type(part).forward, part), images, when=part.training)
