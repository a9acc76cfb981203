"""Datasets that detectron2 does not know; importing this module registers them.
`datasets/README.md` shows the folders.

Most lie under $DETECTRON2_DATASETS (default: ./datasets), like detectron2's own. Those that come
with the project lie under $MASKDINO_DATASETS (default: the `datasets` folder of the repository).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

ROOT_VARIABLE = "DETECTRON2_DATASETS"
OWN_ROOT_VARIABLE = "MASKDINO_DATASETS"


def datasets_root() -> Path:
    """The folder of downloaded datasets."""
    return Path(os.environ.get(ROOT_VARIABLE, "datasets"))


def own_datasets_root() -> Path:
    """The folder of the datasets that come with the project."""
    return Path(os.environ.get(OWN_ROOT_VARIABLE, Path(__file__).resolve().parents[2] / "datasets"))


def register_coco_folder(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    root_variable: str = ROOT_VARIABLE,
    **metadata: object,
) -> None:
    """Registers a dataset in COCO's format: boxes with or without masks, categories with ids of
    their own.

    Nothing is read before the dataset is used. Registering the same files under the same name again
    does nothing.

    Args:
        name: under which cfg.DATASETS finds it.
        json_file: annotations.
        image_root: folder of the images.
        root_variable: the environment variable that moves the dataset, for messages.
        metadata: more for detectron2's MetadataCatalog, as `thing_classes`.

    Raises:
        ValueError: the name is taken by other files.
    """
    json_file, image_root = str(json_file), str(image_root)

    def load() -> list[dict]:
        return load_coco_json(json_file, image_root, name)

    _register(
        name,
        load,
        {
            "json_file": json_file,
            "image_root": image_root,
            "evaluator_type": "coco",
            "root_variable": root_variable,
            **metadata,
        },
    )


def _register(name: str, load: Callable[[], list[dict]], metadata: dict) -> None:
    """Registers once; a second time is allowed for the same files only."""
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name).as_dict()
        differing = {key for key, value in metadata.items() if known.get(key) != value}
        if differing:
            raise ValueError(
                f"dataset name {name!r} is taken by another one, which differs in "
                f"{', '.join(sorted(differing))}"
            )
        return
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def _register_nuclei() -> None:
    folder = own_datasets_root() / "nuclei"
    for split in ("train", "val"):
        register_coco_folder(
            f"nuclei_{split}",
            folder / "annotations" / f"instances_{split}.json",
            folder / split,
            root_variable=OWN_ROOT_VARIABLE,
        )


def register_all() -> None:
    """Registers everything in this module; calling it again does nothing."""
    _register_nuclei()


register_all()
