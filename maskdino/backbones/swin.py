"""Makes timm's Swin Transformers compute, on images of any size, what Swin detectors compute.

timm's blocks roll the feature map first and pad it to whole windows afterwards. On a map that no
window divides, the padding then stands between the two halves of the rolled image, and the
attention mask, which is laid out for the padded map, no longer separates them. Detectors (and all
weights trained in one) pad first.
"""

from typing import Any

import timm
import torch
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


class _PadsFirst:
    """A block that pads before the shift."""

    window_size: tuple[int, int]  # (height, width) in cells, N together
    shift_size: tuple[int, int]  # by how many cells the map is rolled up and to the left
    attn: Any  # of windows (B * rows * columns, N, C), with a mask

    def _attn(self, x: Tensor) -> Tensor:
        """Attention within windows of a map (B, H, W, C) of any size; returns the same shape.

        All sizes are products of the numbers of windows. timm's remainders of remainders, and parts
        of a mask one by one, are what a tracer for any size does not come to an end with.
        """
        window, shift = self.window_size, self.shift_size
        batch, height, width, channels = x.shape
        rows, columns = (height + window[0] - 1) // window[0], (width + window[1] - 1) // window[1]
        x = F.pad(x, (0, 0, 0, columns * window[1] - width, 0, rows * window[0] - height))
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
            mask = _between_halves(x, (rows, columns), window, shift)
        x = x.view(batch, rows, window[0], columns, window[1], channels).transpose(2, 3)
        x = self.attn(x.reshape(batch * rows * columns, window[0] * window[1], channels), mask=mask)
        x = x.view(batch, rows, columns, *window, channels).transpose(2, 3)
        x = x.reshape(batch, rows * window[0], columns * window[1], channels)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        if not torch.compiler.is_compiling():
            return x[:, :height, :width]
        # A tracer asks of a slice whether it is the whole, and the program then has no other sizes.
        x = x.index_select(1, torch.arange(height, device=x.device))
        return x.index_select(2, torch.arange(width, device=x.device))


class SwinBlock(_PadsFirst, SwinTransformerBlock):
    """timm's Swin block."""


class SwinV2Block(_PadsFirst, SwinTransformerV2Block):
    """timm's Swin V2 block."""


def _between_halves(
    like: Tensor, counts: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """(rows * columns, N, N): -100 between cells that only the roll made neighbors, else 0."""
    came_around = []
    for count, cells, rolled in zip(counts, window, shift, strict=True):
        last = torch.arange(count, device=like.device) == count - 1
        late = torch.arange(cells, device=like.device) >= cells - rolled
        came_around.append((last[:, None] & late).to(like.dtype))
    below, right = came_around  # (rows, window height), (columns, window width)
    part = 2 * below[:, None, :, None] + right[:, None]  # (rows, columns, height, width)
    part = part.view(counts[0] * counts[1], window[0] * window[1])
    return -100.0 * (part[:, None] != part[:, :, None]).to(like.dtype)


def pad_before_shift(model: nn.Module) -> None:
    """Turns every timm Swin block inside `model` into its counterpart that pads first (in place).

    The counterparts add no state, so parameters and their names stay.
    """
    change_class(model, {SwinTransformerBlock: SwinBlock, SwinTransformerV2Block: SwinV2Block})


def largest_window(model: nn.Module) -> int:
    """The longest side, in cells, of the windows of all Swin blocks; 0: there are none."""
    blocks = (module for module in model.modules() if isinstance(module, _PadsFirst))
    return max((max(block.window_size) for block in blocks), default=0)
