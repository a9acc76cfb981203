"""Builds the backbone that `MODEL.BACKBONE.NAME` names."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from maskdino.backbones.convert import load_backbone
from maskdino.backbones.frozen_norm import keep_frozen_norms
from maskdino.backbones.resnet import fuse_blocks
from maskdino.backbones.timm_backbone import TimmBackbone
from maskdino.backbones.vit import PlainViTBackbone, is_plain_vit
from maskdino.integration.registration import offer_to, register_postponed

# Released Swin configurations give every dimension themselves; any Swin of timm can carry them.
_SWIN_FOR_DIMENSIONS = "swin_tiny_patch4_window7_224"


def build_backbone(cfg: CfgNode) -> Backbone:
    """Builds the backbone of a configuration.

    `MODEL.BACKBONE.NAME` is the name of a builder registered in detectron2
    (`build_resnet_backbone`, ...), or else of a timm model (`swin_large_patch4_window12_384`,
    `convnext_tiny`, ...) with the options of `MODEL.TIMM`.

    Args:
        cfg: a detectron2 configuration with Mask DINO's keys.

    Returns:
        a backbone whose outputs are called res2 to res5 (strides 4, 8, 16, 32).

    Raises:
        ValueError: for a name that neither detectron2 nor timm knows, or a model without the
            features.
    """
    register_postponed()
    name = cfg.MODEL.BACKBONE.NAME
    input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    if name in BACKBONE_REGISTRY:
        return fuse_blocks(keep_frozen_norms(BACKBONE_REGISTRY.get(name)(cfg, input_shape)))
    return _timm_backbone(cfg, name, input_shape)


@offer_to(BACKBONE_REGISTRY)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Builder for plain detectron2 models, which want a registered name; takes MODEL.TIMM.NAME."""
    return _timm_backbone(cfg, cfg.MODEL.TIMM.NAME, input_shape)


@offer_to(BACKBONE_REGISTRY, postponed=True)
def D2SwinTransformer(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Swin by the name and with the keys (MODEL.SWIN) of released configurations.

    Raises:
        ValueError: if MODEL.SWIN asks for something that timm's Swin does not have.
    """
    return TimmBackbone(
        name=_SWIN_FOR_DIMENSIONS,
        in_channels=input_shape.channels,
        pretrained=False,
        output_norm=True,
        batch_norm="BN",
        freeze_at=0,  # released configurations never freeze a Swin, whatever FREEZE_AT says
        **swin_options(cfg.MODEL.SWIN),
    )


def swin_options(swin: CfgNode) -> dict[str, Any]:
    """Reads the MODEL.SWIN node of a released configuration as options of `TimmBackbone`."""
    unsupported = {"APE": False, "QK_SCALE": None, "PATCH_NORM": True}
    for key, expected in unsupported.items():
        if swin.get(key, expected) != expected:
            raise ValueError(f"MODEL.SWIN.{key} must be {expected}, got {swin[key]!r}")
    names = {
        "PATCH_SIZE": "patch_size",
        "EMBED_DIM": "embed_dim",
        "DEPTHS": "depths",
        "NUM_HEADS": "num_heads",
        "WINDOW_SIZE": "window_size",
        "MLP_RATIO": "mlp_ratio",
        "QKV_BIAS": "qkv_bias",
        "DROP_RATE": "proj_drop_rate",
        "ATTN_DROP_RATE": "attn_drop_rate",
    }
    return {
        "out_features": swin.get("OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
        "drop_path_rate": swin.get("DROP_PATH_RATE", 0.3),
        "activation_checkpoint": swin.get("USE_CHECKPOINT", False),
        "arguments": {ours: swin[key] for key, ours in names.items() if key in swin},
    }


def _timm_backbone(cfg: CfgNode, name: str, input_shape: ShapeSpec) -> Backbone:
    options = cfg.MODEL.TIMM
    # Weights of the whole model would overwrite the backbone's at once, and must load without a
    # network and without the backbone's own file.
    trained = bool(cfg.MODEL.WEIGHTS)
    common: dict[str, Any] = {
        "name": name,
        "in_channels": input_shape.channels,
        "out_features": options.OUT_FEATURES,
        "pretrained": options.PRETRAINED and not trained and not options.WEIGHTS,
        "drop_path_rate": options.DROP_PATH_RATE,
        "activation_checkpoint": options.ACTIVATION_CHECKPOINT,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "arguments": {key: value for key, value in options.ARGS.items() if value is not None},
    }
    if is_plain_vit(name):
        vit = cfg.MODEL.VIT
        backbone: Backbone = PlainViTBackbone(
            pyramid_channels=vit.PYRAMID_CHANNELS,
            window_size=vit.WINDOW_SIZE,
            global_blocks=vit.GLOBAL_BLOCKS,
            **common,
        )
    else:
        backbone = TimmBackbone(
            output_norm=options.OUTPUT_NORM, batch_norm=options.BATCH_NORM, **common
        )
    if options.WEIGHTS and not trained:
        load_backbone(options.WEIGHTS, backbone)
    return backbone
