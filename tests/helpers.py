"""A narrow Mask DINO and drawn objects, for tests that need a whole model in a second."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor

from maskdino.config import load_config
from maskdino.model import MaskDINO
from maskdino.structures import PackedMasks

NUM_CLASSES = 5
CHANNELS = 64
NODE = "MODEL.MASK_DINO."
NARROW = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.META_ARCHITECTURE": "MaskDINO",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    f"{NODE}NUM_CLASSES": NUM_CLASSES,
    f"{NODE}HIDDEN_DIM": CHANNELS,
    f"{NODE}ENCODER.NUM_LAYERS": 1,
    f"{NODE}ENCODER.FEEDFORWARD_DIM": 64,
    f"{NODE}DECODER.NUM_LAYERS": 2,
    f"{NODE}DECODER.FEEDFORWARD_DIM": 64,
    f"{NODE}QUERY_SELECTION.NUM_QUERIES": 12,
    f"{NODE}DENOISING.NUM_QUERIES": 8,
    f"{NODE}LOSS.NUM_POINTS": 64,
}


def tiny_cfg(**overrides: object) -> CfgNode:
    """Configuration of a narrow model.

    Args:
        overrides: values by our key, "__" for ".", below MODEL.MASK_DINO: `MATCHER__L1_WEIGHT=0.0`.
    """
    values = NARROW | {NODE + key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(None, [word for item in values.items() for word in item])


def tiny_model(**overrides: object) -> MaskDINO:
    """A narrow model with random weights; `overrides` as for `tiny_cfg`."""
    return MaskDINO(tiny_cfg(**overrides))


def drawn_instances(
    size: tuple[int, int], number: int, *, masks: bool = True, num_classes: int = NUM_CLASSES
) -> Instances:
    """Random rectangles, with boxes in pixels, and packed masks if wanted."""
    height, width = size
    low = torch.rand(number, 2) * torch.tensor([width - 1, height - 1])
    low = low.floor()
    room = torch.tensor([width, height]) - low
    high = low + (torch.rand(number, 2) * room).floor().clamp(min=1)
    image = Instances(size)
    image.gt_classes = torch.randint(0, num_classes, (number,))
    image.gt_boxes = Boxes(torch.cat([low, high], dim=1))
    if masks:
        image.gt_masks = PackedMasks.from_bool(rectangles(image.gt_boxes.tensor, size))
    return image


def rectangles(boxes_xyxy: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool masks of boxes (N, 4) with whole pixels."""
    masks = torch.zeros(len(boxes_xyxy), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes_xyxy.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def drawn_batch(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], *, masks: bool = True
) -> list[dict]:
    """Detectron2's input dicts, with noise for images."""
    return [
        {
            "image": torch.randint(0, 256, (3, *size)).float(),
            "instances": drawn_instances(size, count, masks=masks),
            "file_name": f"drawn_{i}.png",
            "height": size[0],
            "width": size[1],
        }
        for i, (size, count) in enumerate(zip(sizes, counts, strict=True))
    ]


class StridedConvolutions(Backbone):
    """Four convolutions: tracing takes a second for every hundred operators."""

    STRIDES = {"res2": 4, "res3": 2, "res4": 2, "res5": 2}  # each from the one before
    CHANNELS = 16

    def __init__(self) -> None:
        super().__init__()
        widths = [3, *[self.CHANNELS] * 3]
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(width, self.CHANNELS, 3, stride=stride, padding=1)
            for width, stride in zip(widths, self.STRIDES.values(), strict=True)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = {}
        for name, layer in zip(self.STRIDES, self.layers, strict=True):
            images = torch.relu(layer(images))
            features[name] = images
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.CHANNELS, stride=4 * 2**i)
            for i, name in enumerate(self.STRIDES)
        }


@BACKBONE_REGISTRY.register()
def build_strided_convolutions(
    cfg: CfgNode,  # noqa: ARG001
    input_shape: ShapeSpec,  # noqa: ARG001
) -> StridedConvolutions:
    return StridedConvolutions()
