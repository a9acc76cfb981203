"""Plain vision transformers as backbones: one map of stride 16 becomes a pyramid.

Any ViT of timm with patches (DINOv2, DINOv3, MAE, DeiT III, EVA-02, SigLIP, SAM, ...) through the
simple feature pyramid of ViTDet (Li et al., 2022, arXiv:2203.16527, section 3).

Shape key: B images, H x W pixels, C channels of the transformer, P channels of the pyramid, h x w
tokens (H / 16 x W / 16), T prefix tokens (class, registers), s window size in tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from detectron2.modeling import Backbone
from timm.layers import LayerNorm2d
from timm.models import group_parameters, is_model_in_modules
from torch import Tensor, nn
from torch.nn import functional as F

from maskdino.backbones.freeze import check_freeze_at
from maskdino.backbones.timm_backbone import (
    STRIDES,
    checked_out_features,
    disable_drop_path,
    enable_checkpointing,
    extractor,
)

STRIDE = 16  # of the tokens, whatever patches the weights were trained with
_FAMILIES = ["vision_transformer", "vision_transformer_sam", "deit", "eva"]  # modules of timm


def is_plain_vit(name: str) -> bool:
    """Whether timm knows this name as a transformer whose tokens are patches of one size."""
    return is_model_in_modules(name.partition(".")[0], _FAMILIES)


def _token_options(name: str) -> dict[str, Any]:
    """Arguments with which timm makes this model for patches of 16 pixels and any image size."""
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot make {name!r}: {error}") from error
    patch, size = model.patch_embed.patch_size, model.patch_embed.img_size
    options: dict[str, Any] = {}
    if "dynamic_img_size" in inspect.signature(type(model).__init__).parameters:
        options["dynamic_img_size"] = True
    if patch != (STRIDE, STRIDE):  # as many positions as were learned
        grid = [length // side for length, side in zip(size, patch, strict=True)]
        options |= {"patch_size": STRIDE, "img_size": tuple(STRIDE * length for length in grid)}
    return options


class PlainViTBackbone(Backbone):
    """A plain ViT of timm with a simple feature pyramid.

    Weights of other patch sizes (DINOv2 has 14) are resampled to patches of 16 pixels (Beyer et
    al., FlexiViT, arXiv:2212.08013, section 3.3), positions are interpolated or rotary as the model
    has them, so any image whose sides are multiples of 32 keeps the strides exactly.

    Parameters are called `body.model.*` as in timm, and `pyramid.*`. Arguments that are not named
    here are those of `TimmBackbone`.

    Args:
        name: a timm model, with or without the tag of its weights, such as
            `vit_small_patch16_dinov3.lvd1689m`.
        pyramid_channels: P.
        window_size: s; 0: every block attends to all tokens. Else only `global_blocks` do, and the
            others to windows of s x s tokens.
        global_blocks: indices of blocks that see all tokens; empty: the last of each quarter.
        freeze_at: 0 freezes nothing, 1 the patch embedding and positions, 2 to 5 also the first one
            to four quarters of the blocks: 5 is a frozen trunk, of which only the pyramid learns.
    """

    body: Any  # timm's extractor; the transformer is `body.model`

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        out_features: Sequence[str],
        pretrained: bool,
        pyramid_channels: int,
        window_size: int,
        global_blocks: Sequence[int],
        drop_path_rate: float,
        activation_checkpoint: bool,
        freeze_at: int,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self._out_features = checked_out_features(out_features)
        self._out_feature_channels = dict.fromkeys(self._out_features, pyramid_channels)
        self._out_feature_strides = {feature: STRIDES[feature] for feature in self._out_features}
        options = {"in_chans": in_channels, **_token_options(name), **arguments}
        if drop_path_rate > 0:
            options["drop_path_rate"] = drop_path_rate
        options["out_indices"] = (-1,)
        self.body = extractor(name, options, pretrained)
        if drop_path_rate == 0:
            disable_drop_path(self.body)
        channels = self.body.feature_info.channels()[-1]
        self.pyramid = SimpleFeaturePyramid(channels, pyramid_channels, self._out_features)
        self._attend_in_windows(name, window_size, global_blocks)
        self._freeze(freeze_at)
        if activation_checkpoint:
            enable_checkpointing(self.body)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, in_channels, H, W), float, normalized, to (B, P, H / stride, W / stride) each.

        Sides that are no multiples of 16 are filled with zeros. The finest output comes first.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        self._windows.grid = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
        return self.pyramid(self.body(images)[-1])

    @property
    def size_divisibility(self) -> int:
        """Height and width of the images are best multiples of this: the coarsest stride."""
        return max(STRIDE, *self._out_feature_strides.values())

    def depths(self) -> dict[str, int]:
        """Layers between each parameter of the trunk and the pyramid, for layer-wise decay.

        Returns:
            Names as in `named_parameters`: the last block has depth 1, the first as many as there
            are blocks, patch embedding and positions one more. The pyramid's are left out: they
            have depth 0.
        """
        model = self.body.model
        last = len(model.blocks) + 1
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        return {f"body.model.{name}": last - min(layer, last) for name, layer in layers.items()}

    def _attend_in_windows(self, name: str, window_size: int, global_blocks: Sequence[int]) -> None:
        model = self.body.model
        count = len(model.blocks)
        if window_size < 0 or any(not -count <= index < count for index in global_blocks):
            raise ValueError(
                f"MODEL.VIT.WINDOW_SIZE must be at least 0 and MODEL.VIT.GLOBAL_BLOCKS within the "
                f"{count} blocks, got {window_size} and {list(global_blocks)}"
            )
        self._windows = _Windows(window_size, getattr(model, "num_prefix_tokens", 0) or 0)
        if window_size == 0:
            return
        if is_model_in_modules(name.partition(".")[0], ["vision_transformer_sam"]):
            raise ValueError(
                "SAM's transformer has windows of its own: MODEL.VIT.WINDOW_SIZE must be 0; "
                "MODEL.TIMM.ARGS.window_size sets theirs"
            )
        quarters = {count * quarter // 4 - 1 for quarter in range(1, 5)}
        whole = {index % count for index in global_blocks} or quarters
        for index, block in enumerate(model.blocks):
            if index not in whole:
                block.register_forward_pre_hook(self._windows.split, with_kwargs=True)
                block.register_forward_hook(self._windows.join)

    def _freeze(self, freeze_at: int) -> None:
        check_freeze_at(freeze_at)
        if freeze_at == 0:
            return
        blocks = len(self.body.model.blocks)
        trained = blocks - blocks * (freeze_at - 1) // 4  # the last blocks
        for name, depth in self.depths().items():
            if depth > trained:
                self.get_parameter(name).requires_grad_(False)


class SimpleFeaturePyramid(nn.Module):
    """Maps of four strides from one of stride 16 (ViTDet, section 3).

    Args:
        in_channels: C.
        channels: P, of each output.
        out_features: names of the outputs, of "res2" to "res5".
    """

    def __init__(self, in_channels: int, channels: int, out_features: Sequence[str]) -> None:
        super().__init__()
        # The trunk's last block has no norm behind it, and single channels of pretrained ones are
        # hundreds of times larger than others.
        self.norm = LayerNorm2d(in_channels)
        half, quarter = in_channels // 2, in_channels // 4
        scales: dict[str, tuple[list[nn.Module], int]] = {
            "res2": (
                [nn.ConvTranspose2d(in_channels, half, 2, stride=2), LayerNorm2d(half), nn.GELU()]
                + [nn.ConvTranspose2d(half, quarter, 2, stride=2)],
                quarter,
            ),
            "res3": ([nn.ConvTranspose2d(in_channels, half, 2, stride=2)], half),
            "res4": ([], in_channels),
            "res5": ([nn.MaxPool2d(2)], in_channels),
        }
        self.stages = nn.ModuleDict()
        for feature in out_features:
            scale, width = scales[feature]
            self.stages[feature] = nn.Sequential(
                *scale,
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """(B, C, h, w) to (B, P, h x 16 / stride, w x 16 / stride) for each output."""
        tokens = self.norm(tokens)
        return {feature: stage(tokens) for feature, stage in self.stages.items()}


class _Windows:
    """Hooks by which a block sees windows of tokens as images of their own.

    Prefix tokens go into each window; behind the block they are the mean over the windows. Tokens
    that fill the last windows are zeros. Rotary positions are relative: those of the first window
    serve all.
    """

    def __init__(self, size: int, prefix: int) -> None:
        self.size, self.prefix = size, prefix
        self.grid = (0, 0)  # h, w of the images in work

    def _counts(self) -> tuple[int, int]:
        return -(-self.grid[0] // self.size), -(-self.grid[1] // self.size)

    def split(self, block: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:
        """Before a block: (B, T + h x w, C) -> (B x windows, T + s x s, C)."""
        del block
        tokens, *others = inputs
        rows, columns = self._counts()
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        patches = patches.unflatten(1, self.grid)
        fill = (rows * self.size - self.grid[0], columns * self.size - self.grid[1])
        patches = F.pad(patches, (0, 0, 0, fill[1], 0, fill[0]))
        patches = patches.unflatten(2, (columns, self.size)).unflatten(1, (rows, self.size))
        patches = patches.transpose(2, 3).flatten(0, 2).flatten(1, 2)
        prefix = prefix.repeat_interleave(rows * columns, dim=0)
        if options.get("rope") is not None:
            options = {**options, "rope": self._first_window(options["rope"])}
        return (torch.cat((prefix, patches), dim=1), *others), options

    def join(self, block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Behind a block: (B x windows, T + s x s, C) -> (B, T + h x w, C)."""
        del block, inputs
        rows, columns = self._counts()
        windows = output.unflatten(0, (-1, rows, columns))
        prefix = windows[..., : self.prefix, :].mean(dim=(1, 2))
        patches = windows[..., self.prefix :, :].unflatten(3, (self.size, self.size))
        patches = patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        patches = patches[:, : self.grid[0], : self.grid[1]].flatten(1, 2)
        return torch.cat((prefix, patches), dim=1)

    def _first_window(self, rope: Tensor) -> Tensor:
        """Rotary positions (..., h x w, D) -> (..., s x s, D); zeros outside of the image."""
        rope = rope.unflatten(-2, self.grid)
        missing = [max(self.size - length, 0) for length in self.grid]
        rope = F.pad(rope, (0, 0, 0, missing[1], 0, missing[0]))
        return rope[..., : self.size, : self.size, :].flatten(-3, -2)
