"""Images, objects and weights that are drawn.

Nothing of this package is imported before it is asked for: beside the released code, whose package
has the same name, `drawn_input` serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

if TYPE_CHECKING:
    from maskdino.model import MaskDINO


def drawn_input(
    height: int,
    width: int,
    objects: int = 8,
    classes: int = 2,
    pack: Callable[[Tensor], object] | None = None,
) -> dict:
    """An image of noise with rectangles as objects, of `classes` classes in turn.

    Args:
        height: of the image, in pixels.
        width: likewise.
        objects: N.
        classes: K.
        pack: makes of masks (N, height, width) what training data hold; None: `PackedMasks`.
    """
    if pack is None:
        from maskdino.structures import PackedMasks

        pack = PackedMasks.from_bool
    instances = Instances((height, width))
    masks = torch.zeros(objects, height, width, dtype=torch.bool)
    boxes = torch.zeros(objects, 4)
    for i in range(objects):
        top, left = (i // 4) * height // 2 % (height * 2 // 3), (i % 4) * width // 4
        bottom, right = top + height // 3, left + width // 5
        masks[i, top:bottom, left:right] = True
        boxes[i] = torch.tensor([left, top, right, bottom])
    instances.gt_classes = torch.arange(objects) % classes
    instances.gt_boxes = Boxes(boxes)
    instances.gt_masks = pack(masks)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "instances": instances}


def drawn_model(file: str, device: str, *overrides: str) -> tuple[CfgNode, MaskDINO]:
    """A configuration and its model, whose weights are the same in every process."""
    from maskdino.config import load_config
    from maskdino.model import MaskDINO

    cfg = load_config(file, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, *overrides])
    torch.manual_seed(0)
    return cfg, MaskDINO(cfg).to(device)
