"""Mask DINO: detection and instance, panoptic and semantic segmentation with one transformer.

Importing this package registers the meta-architecture, the backbones and the datasets with
detectron2, under names that are free; names that other packages are known to register too wait for
`add_maskdino_config`.
"""

from maskdino import data, model_zoo
from maskdino.backbones import TimmBackbone, build_backbone
from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.compat import alias_cityscapes_scripts
from maskdino.config import add_maskdino_config
from maskdino.data import (
    InstanceMapper,
    PanopticMapper,
    SemanticMapper,
    build_train_mapper,
    register_coco_folder,
)
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.registration import register_all
from maskdino.visualization.results import ImageResult

alias_cityscapes_scripts()

__version__ = "0.1.0"

__all__ = [
    "ImageResult",
    "InstanceMapper",
    "MaskDINO",
    "MaskDINOCheckpointer",
    "MaskDINOPredictor",
    "PanopticMapper",
    "SemanticMapper",
    "TimmBackbone",
    "add_maskdino_config",
    "build_backbone",
    "build_train_mapper",
    "data",
    "model_zoo",
    "register_all",
    "register_coco_folder",
]
