"""A small dataset of drawn shapes, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.data.datasets import register_coco_folder
from tests.data.synthetic import make_scenes, write_coco

NAME = "drawn_for_gpu_tests"


@pytest.fixture(scope="module")
def drawn_dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a registered dataset of six pictures with persons and cars."""
    folder = write_coco(tmp_path_factory.mktemp("drawn"), {"train": make_scenes(6, (64, 96), 3)})
    annotations = folder / "annotations" / "instances_train2017.json"
    register_coco_folder(NAME, annotations, folder / "train2017")
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
