"""Configurations and small datasets for the tests of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image

from maskdino.config import load_config
from tests.catalogs import own_datasets


@pytest.fixture(autouse=True)
def _own_datasets() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with own_datasets():
        yield


@pytest.fixture
def make_cfg() -> Callable[..., CfgNode]:
    """Makes a configuration of one class and small images; keys and values follow one another."""

    def make(*options: object) -> CfgNode:
        cfg = load_config()
        cfg.INPUT.FORMAT = "RGB"
        cfg.INPUT.LSJ.SIZE = [64, 96]
        cfg.MODEL.MASK_DINO.NUM_CLASSES = 1
        cfg.merge_from_list(list(options))
        return cfg

    return make


@pytest.fixture
def save_image(tmp_path: Path) -> Callable[[np.ndarray, str], str]:
    """Saves pixels under a name in the test's folder, and returns the path."""

    def save(pixels: np.ndarray, name: str = "image.png") -> str:
        path = tmp_path / name
        Image.fromarray(pixels).save(path)
        return str(path)

    return save
