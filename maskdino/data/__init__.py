"""Data: augmentations, training mappers, and the datasets that detectron2 lacks (importing
registers them)."""

from maskdino.data.datasets import register_coco_folder
from maskdino.data.mappers import InstanceMapper, PanopticMapper, SemanticMapper, build_train_mapper
from maskdino.data.reading import DataError

__all__ = [
    "DataError",
    "InstanceMapper",
    "PanopticMapper",
    "SemanticMapper",
    "build_train_mapper",
    "register_coco_folder",
]
