"""Backbones: any timm model with a feature pyramid, or one that detectron2 has registered."""

from maskdino.backbones.build import D2SwinTransformer, build_backbone, build_timm_backbone
from maskdino.backbones.convert import convert_backbone, convert_swin, swin_rules
from maskdino.backbones.timm_backbone import TimmBackbone
from maskdino.backbones.vit import PlainViTBackbone

__all__ = [
    "D2SwinTransformer",
    "PlainViTBackbone",
    "TimmBackbone",
    "build_backbone",
    "build_timm_backbone",
    "convert_backbone",
    "convert_swin",
    "swin_rules",
]
