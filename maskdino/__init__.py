"""Mask DINO: object detection and instance, panoptic and semantic segmentation with one
transformer.

Importing this package registers the meta-architecture, the backbones and the datasets with
detectron2.
"""

from maskdino import data
from maskdino.backbones import build_backbone
from maskdino.checkpoint import MaskDINOCheckpointer
from maskdino.config import add_maskdino_config
from maskdino.data import build_train_mapper
from maskdino.model import MaskDINO

__version__ = "0.1.0"

__all__ = [
    "MaskDINO",
    "MaskDINOCheckpointer",
    "add_maskdino_config",
    "build_backbone",
    "build_train_mapper",
    "data",
]
