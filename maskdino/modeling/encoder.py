"""Multi-scale deformable encoder, and the pixel embedding map (section 3.4).

Shape key: B images, S tokens of all levels, C channels, L levels; H, W of a level.
"""

from functools import partial
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from maskdino.modeling.attention import FeedForward, LayerSizes, MultiScaleDeformableAttention
from maskdino.modeling.layers import Normed, add_norm, map_sine_embedding, rounded
from maskdino.modeling.norms import group_norm, pointwise, projected
from maskdino.ops.constants import is_traced
from maskdino.ops.ms_deform_attn import keeps_samples
from maskdino.ops.recompute import Recomputing, recomputed, remade, remaking
from maskdino.structures import Memory, SpatialShapes

NORM_GROUPS = 32  # of the group norms after projections


class EncoderLayer(Recomputing):
    """Deformable self-attention and feed-forward network, each with residual sum and LayerNorm."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(sizes)
        self.norm1 = nn.LayerNorm(sizes.hidden_dim)
        self.ffn = FeedForward(sizes)
        self.norm2 = nn.LayerNorm(sizes.hidden_dim)

    def forward(
        self,
        tokens: Tensor,
        values: Tensor,
        queries: Tensor,
        spatial_shapes: SpatialShapes,
        position: Tensor | None,
    ) -> Normed:
        """Attends and transforms.

        Args:
            tokens: (B, S, C).
            values: the same, in the type of products.
            queries: in that type, with the position added.
            spatial_shapes: (height, width) of each level.
            position: (S, C), for the queries of the next layer; None: there is none.

        Returns:
            The same of the tokens after the layer.
        """
        again = self.recomputes("all") or (
            # Compilers know no other way to keep less, nor does the operator's slow form.
            self.recomputes("cheap") and (is_traced() or keeps_samples(tokens.device))
        )
        args = tokens, values, queries, spatial_shapes
        tokens, update = recomputed(self._update, *args, when=again)
        return add_norm(self.norm2, tokens, update, position, read=position is not None)

    def _update(
        self, tokens: Tensor, values: Tensor, queries: Tensor, spatial_shapes: SpatialShapes
    ) -> tuple[Tensor, Tensor]:
        """Tokens after attention, and what the feed-forward network adds to them."""
        seen = self.self_attn(queries, values, spatial_shapes, None)
        tokens, rows, *_ = add_norm(self.norm1, tokens, seen, read=True)
        return tokens, self.ffn(rows)


class MultiScaleDeformableEncoder(Recomputing):
    """Brings features to one width, adds coarser levels, and lets all tokens see all levels."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: list[str],
        num_layers: int,
        sizes: LayerSizes,
    ) -> None:
        """Makes projections and layers.

        Args:
            input_shape: channels and stride of the backbone's features, by name.
            in_features: those that enter, finest first.
            num_layers: number of layers.
            sizes: of each layer; levels beyond `in_features` are made by convolutions of stride 2.

        Raises:
            KeyError: if the backbone lacks one of `in_features`.
            ValueError: if they are more than the levels, or do not go from fine to coarse.
        """
        super().__init__()
        hidden_dim, num_levels = sizes.hidden_dim, sizes.num_levels
        _check_levels(in_features, num_levels, input_shape)
        self.in_features = list(in_features)
        channels = [input_shape[name].channels for name in in_features]
        projections = [nn.Conv2d(width, hidden_dim, 1) for width in channels]
        width = channels[-1]
        for _ in range(num_levels - len(in_features)):
            projections.append(nn.Conv2d(width, hidden_dim, 3, stride=2, padding=1))
            width = hidden_dim
        for convolution in projections:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.get_parameter("bias"))
        self.input_proj = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(NORM_GROUPS, hidden_dim))
            for convolution in projections
        )
        self.num_heads = sizes.num_heads
        self.level_embed = nn.Parameter(torch.randn(num_levels, hidden_dim))
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(num_layers))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.ENCODER."""
        node = cfg.MODEL.MASK_DINO.ENCODER
        return {
            "input_shape": input_shape,
            "in_features": node.IN_FEATURES,
            "num_layers": node.NUM_LAYERS,
            "sizes": LayerSizes(
                hidden_dim=cfg.MODEL.MASK_DINO.HIDDEN_DIM,
                num_heads=node.NUM_HEADS,
                num_levels=node.NUM_LEVELS,
                num_points=node.NUM_POINTS,
                feedforward_dim=node.FEEDFORWARD_DIM,
            ),
        }

    def forward(self, features: dict[str, Tensor]) -> Memory:
        """Backbone features (B, channels, H, W) to the memory of all levels."""
        levels = self._levels(features)
        spatial_shapes = tuple((level.shape[2], level.shape[3]) for level in levels)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        of_level = [
            embedding.expand(height * width, -1)
            for (height, width), embedding in zip(spatial_shapes, self.level_embed, strict=True)
        ]
        cells = map_sine_embedding(spatial_shapes, tokens.shape[2], tokens.device)
        position = cells + torch.cat(of_level)
        dtype = tokens.dtype
        if self.layers:
            dtype = cast(EncoderLayer, self.layers[0]).self_attn.dtype
        # Compiled layers plan by themselves what they keep.
        compiled = any(layer._compiled_call_impl for layer in self.layers)
        with remaking(when=self.recomputes("cheap", "all") and not compiled):
            values, queries = remade(partial(_read, dtype), tokens, position)
            for layer in self.layers:
                following = None if layer is self.layers[-1] else position
                read = values, queries, spatial_shapes, following
                tokens, values, queries, _ = layer(tokens, *read)
        return Memory(tokens, spatial_shapes)

    def _levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Projected maps, finest first; extra levels begin with the coarsest backbone feature."""
        of_features = len(self.in_features)
        levels = [
            projected(projection, features[name])
            for name, projection in zip(
                self.in_features, self.input_proj[:of_features], strict=True
            )
        ]
        source = features[self.in_features[-1]]
        for projection in self.input_proj[of_features:]:
            source = projected(projection, source)
            levels.append(source)
        return levels


def _read(dtype: torch.dtype, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """What the first layer reads: values, and queries with the position added."""
    return tokens.to(dtype), rounded(torch.add, tokens, position, to=dtype)


class PixelEmbedding(Recomputing):
    """The pixel embedding map of the segmentation branch (section 3.4, equation 1).

    The backbone's finest feature, projected (T), plus the resized finest map of the encoder (F),
    goes through the segmentation head (M).
    """

    @configurable
    def __init__(
        self, *, input_shape: dict[str, ShapeSpec], in_feature: str, hidden_dim: int
    ) -> None:
        """Makes convolutions and norms.

        Args:
            input_shape: channels and stride of the backbone's features, by name.
            in_feature: the finest feature, T of section 3.4.
            hidden_dim: C.

        Raises:
            KeyError: if the backbone lacks `in_feature`.
        """
        super().__init__()
        if in_feature not in input_shape:
            raise KeyError(
                f"PIXEL_EMBEDDING.IN_FEATURE {in_feature!r} is none of the backbone's "
                f"{list(input_shape)}"
            )
        self.in_feature = in_feature
        self.lateral = nn.Conv2d(input_shape[in_feature].channels, hidden_dim, 1, bias=False)
        self.lateral_norm = nn.GroupNorm(NORM_GROUPS, hidden_dim)
        self.output = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False)
        self.output_norm = nn.GroupNorm(NORM_GROUPS, hidden_dim)
        self.mask_features = nn.Conv2d(hidden_dim, hidden_dim, 1)
        for convolution in (self.lateral, self.output, self.mask_features):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(self.mask_features.get_parameter("bias"))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.PIXEL_EMBEDDING."""
        node = cfg.MODEL.MASK_DINO
        return {
            "input_shape": input_shape,
            "in_feature": node.PIXEL_EMBEDDING.IN_FEATURE,
            "hidden_dim": node.HIDDEN_DIM,
        }

    def forward(self, features: dict[str, Tensor], memory: Memory) -> Tensor:
        """Backbone features and memory to (B, C, H, W), at 1/4 of the canvas as `in_feature` is."""
        again = self.recomputes("cheap", "all")
        fused = recomputed(self._fuse, features[self.in_feature], memory, when=again)
        return recomputed(self._embed, fused, when=again)

    def _fuse(self, feature: Tensor, memory: Memory) -> Tensor:
        lateral = self.lateral(feature)
        height, width = memory.spatial_shapes[0]
        finest = memory.tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        read = self.output.weight.dtype
        return self.output(group_norm(self.lateral_norm, lateral, to=read, coarse=finest))

    def _embed(self, fused: Tensor) -> Tensor:
        read = self.mask_features.weight.dtype
        normed = group_norm(self.output_norm, fused, to=read, relu=True)
        return pointwise(self.mask_features, normed)


def _check_levels(
    in_features: list[str], num_levels: int, input_shape: dict[str, ShapeSpec]
) -> None:
    missing = [name for name in in_features if name not in input_shape]
    if missing:
        raise KeyError(
            f"ENCODER.IN_FEATURES {missing} are none of the backbone's features {list(input_shape)}"
        )
    if num_levels < len(in_features):
        raise ValueError(
            f"ENCODER.NUM_LEVELS {num_levels} is less than the {len(in_features)} IN_FEATURES"
        )
    strides = [input_shape[name].stride for name in in_features]
    if strides != sorted(strides):
        raise ValueError(
            f"ENCODER.IN_FEATURES must go from fine to coarse, but have strides {strides}"
        )
