"""One adapter from timm's feature extractors to detectron2's `Backbone`.

Shape key: B images, H x W pixels, C channels.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from detectron2.modeling import Backbone
from timm.layers import DropPath, convert_sync_batchnorm
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F

from maskdino.backbones.freeze import freeze_stages
from maskdino.backbones.swin import pad_before_shift, swin_arguments
from maskdino.system.errors import reason_of

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """A timm model with a feature pyramid as a detectron2 backbone.

    Parameters are called `body.*` as in timm's extractor, and `norms.<output>.*` for the layer
    norms of outputs.

    Args:
        name: a timm model, with or without the tag of its weights, such as
            `swin_tiny_patch4_window7_224.ms_in1k`.
        in_channels: channels of the images.
        out_features: outputs, of "res2" (stride 4), "res3" (8), "res4" (16), "res5" (32).
        pretrained: load timm's weights (from its cache or the network).
        output_norm: a layer norm on each output, outside the trunk, as Swin detectors have.
        batch_norm: "BN", "SyncBN", or "FrozenBN" (constant statistics and scales).
        drop_path_rate: largest probability, in [0, 1), that a block is skipped in training.
        activation_checkpoint: recompute activations in the backward pass: less memory, more time.
        freeze_at: number of first stages that are not trained, see `freeze_stages`.
        arguments: more arguments of `timm.create_model`, such as `embed_dim`.

    Raises:
        ValueError: for a name that timm does not know, a model without one of the outputs, or a bad
            option.
        ConnectionError: when the pretrained weights cannot be had.
    """

    body: Any  # timm's extractor, which tells its features as attributes

    def __init__(
        self,
        *,
        name: str,
        in_channels: int,
        out_features: Sequence[str],
        pretrained: bool,
        output_norm: bool,
        batch_norm: str,
        drop_path_rate: float,
        activation_checkpoint: bool,
        freeze_at: int,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        options = {"in_chans": in_channels, **swin_arguments(name), **arguments}
        if drop_path_rate > 0:  # not every model of timm knows this argument
            options["drop_path_rate"] = drop_path_rate
        self._out_features = checked_out_features(out_features)
        strides = [STRIDES[feature] for feature in self._out_features]
        self.body = _create_extractor(name, strides, pretrained, options)
        self._channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        channels = self.body.feature_info.channels()
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))
        self.norms = nn.ModuleDict()
        if output_norm:
            self.norms.update({f: nn.LayerNorm(c) for f, c in self._out_feature_channels.items()})

        if drop_path_rate == 0:
            disable_drop_path(self.body)
        pad_before_shift(self.body)
        freeze_stages(self.body, freeze_at)
        self.body = _with_batch_norm(self.body, batch_norm)
        if activation_checkpoint:
            enable_checkpointing(self.body)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the feature pyramid.

        Args:
            images: (B, in_channels, H, W), float, normalized; any H and W, though multiples of
                `size_divisibility` are what keeps the strides exact.

        Returns:
            one (B, C, H / stride, W / stride) tensor for each output, finest first.
        """
        height, width = images.shape[-2:]
        finest = STRIDES["res2"]  # patches at the border: filled with zeros, as Swin detectors do
        images = F.pad(images, (0, -width % finest, 0, -height % finest))
        outputs = dict(zip(self._out_features, self.body(images), strict=True))
        return {feature: self._finish(feature, output) for feature, output in outputs.items()}

    def _finish(self, feature: str, output: Tensor) -> Tensor:
        """Normalizes one output of the body and brings it to (B, C, H, W)."""
        if feature not in self.norms:
            return output.permute(0, 3, 1, 2).contiguous() if self._channels_last else output
        if not self._channels_last:
            output = output.permute(0, 2, 3, 1)
        return self.norms[feature](output).permute(0, 3, 1, 2).contiguous()

    @property
    def size_divisibility(self) -> int:
        """Height and width of the images are best multiples of this: the coarsest stride."""
        return max(self._out_feature_strides.values())


def checked_out_features(out_features: Sequence[str]) -> list[str]:
    """Names of outputs, finest first; ValueError if one is unknown, or none is asked for."""
    unknown = sorted(set(out_features) - set(STRIDES))
    if unknown or not out_features:
        raise ValueError(
            f"backbone outputs must be some of {list(STRIDES)}, got {list(out_features)}"
        )
    return sorted(set(out_features), key=STRIDES.__getitem__)


def _create_extractor(
    name: str,
    strides: Sequence[int],
    pretrained: bool,
    options: Mapping[str, Any],
) -> nn.Module:
    """Makes timm's feature extractor with one output for each stride, in the order of `strides`."""
    _check_name(name)
    # The first model tells which features there are; it is kept if its outputs happen to be the
    # wanted ones.
    body = extractor(name, options)
    reductions = [info["reduction"] for info in body.feature_info.info]
    missing = [stride for stride in strides if stride not in reductions]
    if missing:
        lacking = ", ".join(f"res{stride.bit_length() - 1} (stride {stride})" for stride in missing)
        raise ValueError(
            f"backbone {name!r} has features of strides {sorted(set(reductions))} and lacks "
            f"{lacking}; choose a model with a feature pyramid, or other features"
        )
    last = {stride: index for index, stride in enumerate(reductions)}  # the deepest of a stride
    indices = tuple(last[stride] for stride in strides)
    if pretrained:
        return extractor(name, {**options, "out_indices": indices}, pretrained)
    if indices != tuple(body.feature_info.out_indices):
        body = extractor(name, {**options, "out_indices": indices})
    return body


def _check_name(name: str) -> None:
    if ":" in name or timm.is_model(name):  # "hf-hub:..." and "local-dir:..." are timm's to resolve
        return
    known = timm.list_models()
    close = timm.list_models(f"{name}*")[:5] or difflib.get_close_matches(
        name, known, n=5, cutoff=0.5
    )
    hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
    raise ValueError(
        f"MODEL.BACKBONE.NAME: {name!r} is registered neither in detectron2 nor in timm; {hint}"
    )


def extractor(name: str, options: Mapping[str, Any], pretrained: bool = False) -> Any:
    """Makes timm's feature extractor of a model; `options` are of `timm.create_model`.

    Raises:
        ValueError: if timm does not know the name or an option.
        ConnectionError: when the weights cannot be had.
    """
    if pretrained:
        return _pretrained(name, options)
    try:
        return timm.create_model(name, features_only=True, **options)
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"timm cannot make a feature extractor of {name!r} with {dict(options)}: {error}"
        ) from error


def _pretrained(name: str, options: Mapping[str, Any]) -> nn.Module:
    logger.info("loading timm's weights of %s", name)
    try:
        return timm.create_model(name, features_only=True, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"timm's weights of {name!r} cannot be loaded ({reason_of(error)}); without network, "
            "name a file in MODEL.TIMM.WEIGHTS, or set MODEL.TIMM.PRETRAINED False to start from "
            "random weights"
        ) from error


def _with_batch_norm(body: nn.Module, batch_norm: str) -> nn.Module:
    if batch_norm == "FrozenBN":
        return freeze_batch_norm_2d(body)
    if batch_norm == "SyncBN":
        return convert_sync_batchnorm(body)
    if batch_norm != "BN":
        raise ValueError(
            f"MODEL.TIMM.BATCH_NORM must be BN, SyncBN or FrozenBN, got {batch_norm!r}"
        )
    return body


def disable_drop_path(body: nn.Module) -> None:
    """Switches off stochastic depth, which some models (Swin) have unless told otherwise."""
    for module in body.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0


def enable_checkpointing(body: nn.Module) -> None:
    """Switches on activation checkpointing: inside stages where timm can, else of whole stages."""
    inner: list[Any] = [
        m for m in body.modules() if m is not body and hasattr(m, "grad_checkpointing")
    ]
    for module in inner or [body]:
        module.grad_checkpointing = True
