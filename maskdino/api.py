"""All that importing the package loads and registers; the names are those of `maskdino`."""

import maskdino.data as data
import maskdino.model_zoo as model_zoo
from maskdino.backbones import TimmBackbone, build_backbone
from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.pretrained import save_pretrained
from maskdino.config import add_maskdino_config
from maskdino.data import (
    InstanceMapper,
    PanopticMapper,
    SemanticMapper,
    build_train_mapper,
    register_coco_folder,
)
from maskdino.engine.plain_detectron2 import adapt_to_detectron2, build_optimizer
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.integration.compat import alias_cityscapes_scripts
from maskdino.integration.registration import register_all
from maskdino.model import MaskDINO
from maskdino.model_zoo import load_pretrained
from maskdino.visualization.results import ImageResult

alias_cityscapes_scripts()

__all__ = [
    "ImageResult",
    "InstanceMapper",
    "MaskDINO",
    "MaskDINOCheckpointer",
    "MaskDINOPredictor",
    "PanopticMapper",
    "SemanticMapper",
    "TimmBackbone",
    "adapt_to_detectron2",
    "add_maskdino_config",
    "build_backbone",
    "build_optimizer",
    "build_train_mapper",
    "data",
    "load_pretrained",
    "model_zoo",
    "register_all",
    "register_coco_folder",
    "save_pretrained",
]
