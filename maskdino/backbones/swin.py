"""Makes timm's Swin Transformers compute, on images of any size, what Swin detectors compute.

timm's blocks roll the feature map first and pad it to whole windows afterwards. On a map that no
window divides, the padding then stands between the two halves of the rolled image, and the
attention mask, which is laid out for the padded map, no longer separates them. Detectors (and all
weights trained in one) pad first.
"""

import timm
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from maskdino.integration.compat import change_class

SWIN_MODULES = ("swin_transformer", "swin_transformer_v2")


def swin_arguments(name: str) -> dict[str, bool]:
    """Arguments of `timm.create_model` with which a Swin takes images of every size.

    Other models need none. timm shrinks windows, and stops shifting them, where the training
    resolution is one window or less; `always_partition` keeps both as they are, because detectors
    run at other resolutions.
    """
    if timm.models.is_model_in_modules(name, SWIN_MODULES):
        return {"strict_img_size": False, "always_partition": True}
    return {}


class SwinBlock(SwinTransformerBlock):
    """timm's Swin block with padding before the shift."""

    def _attn(self, x: Tensor) -> Tensor:
        """Window attention of a map (B, H, W, C), float, of any size; returns the same shape."""
        height, width = x.shape[1:3]
        return super()._attn(_whole_windows(x, self.window_size))[:, :height, :width]


class SwinV2Block(SwinTransformerV2Block):
    """timm's Swin V2 block with padding before the shift."""

    def _attn(self, x: Tensor) -> Tensor:
        """Window attention of a map (B, H, W, C), float, of any size; returns the same shape."""
        height, width = x.shape[1:3]
        return super()._attn(_whole_windows(x, self.window_size))[:, :height, :width]


def _whole_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Pads a map (B, H, W, C) at the right and at the bottom."""
    (height, width), (window_height, window_width) = x.shape[1:3], window_size
    return F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))


def pad_before_shift(model: nn.Module) -> None:
    """Turns every timm Swin block inside `model` into its counterpart that pads first (in place).

    The counterparts add no state, so parameters and their names stay.
    """
    change_class(model, {SwinTransformerBlock: SwinBlock, SwinTransformerV2Block: SwinV2Block})
