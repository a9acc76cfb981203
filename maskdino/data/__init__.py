"""Data: augmentations, training mappers, and the datasets that detectron2 lacks.

Importing registers the datasets, but for names that other packages register too, which wait for a
configuration.
"""

from maskdino.data.checks import check_datasets
from maskdino.data.datasets import (
    register_coco_folder,
    register_panoptic_folder,
    register_semantic_folder,
)
from maskdino.data.mappers import (
    InferenceMapper,
    InstanceMapper,
    PanopticMapper,
    SemanticMapper,
    build_test_mapper,
    build_train_mapper,
)
from maskdino.data.reading import DataError

__all__ = [
    "DataError",
    "InstanceMapper",
    "PanopticMapper",
    "SemanticMapper",
    "InferenceMapper",
    "build_test_mapper",
    "build_train_mapper",
    "check_datasets",
    "register_coco_folder",
    "register_panoptic_folder",
    "register_semantic_folder",
]
