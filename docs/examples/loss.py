"""A loss of one's own, of matched boxes: MODEL.META_ARCHITECTURE MaskDINOWithCenters.

It shows in the log as loss_center, loss_center_layer0, loss_center_denoising, ...
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from maskdino import MaskDINO
from maskdino.losses.criterion import BOX_LOSSES


def center_loss(boxes: Tensor, wanted: Tensor) -> Tensor:
    """Distance of the centers: (M, 4) cx, cy, w, h in units of the canvas, and those, to (M,)."""
    return (boxes[:, :2] - wanted[:, :2]).norm(dim=1)


BOX_LOSSES["loss_center"] = center_loss  # MASK_LOSSES: of mask logits and labels at points


@META_ARCH_REGISTRY.register()
class MaskDINOWithCenters(MaskDINO):
    """Mask DINO with one more loss."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Gives the loss its weight."""
        parts = super().from_config(cfg)
        parts["criterion"].weights["loss_center"] = cfg.MODEL.MASK_DINO.LOSS.CENTER_WEIGHT
        return parts


def add_config(cfg: CfgNode) -> None:
    """Adds the weight."""
    cfg.MODEL.MASK_DINO.LOSS.CENTER_WEIGHT = 1.0
