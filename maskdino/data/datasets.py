"""Datasets that detectron2 does not know; importing this module offers them to its catalogs.

`datasets/README.md` shows their folders. Most lie under $DETECTRON2_DATASETS (default:
./datasets), like detectron2's own. Those that come with the project lie under $MASKDINO_DATASETS
(default: the `datasets` folder of the repository).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.utils.file_io import PathManager

from maskdino.data.dataset_dicts import load_panoptic, load_semantic_list
from maskdino.integration.registration import Offer, offer

ROOT_VARIABLE = "DETECTRON2_DATASETS"
OWN_ROOT_VARIABLE = "MASKDINO_DATASETS"

# ADE20K numbers its 150 classes from 1. These 50 are stuff; the others are the 100 classes of its
# instance challenge, in the same order.
_ADE20K_STUFF_NUMBERS = frozenset(
    (1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60)
    + (61, 62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123)
    + (129, 132, 141, 142, 146)
)
ADE20K_THING_IDS = tuple(i for i in range(150) if i + 1 not in _ADE20K_STUFF_NUMBERS)


def datasets_root() -> Path:
    """The folder of downloaded datasets."""
    return Path(os.environ.get(ROOT_VARIABLE, "datasets"))


def own_datasets_root() -> Path:
    """The folder of the datasets that come with the project."""
    repository = Path(__file__).resolve().parents[2]
    return Path(os.environ.get(OWN_ROOT_VARIABLE, repository / "datasets"))


def ade20k_classes() -> list[str]:
    """Names of ADE20K's 150 classes."""
    return list(MetadataCatalog.get("ade20k_sem_seg_train").stuff_classes)


def register_coco_folder(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    *,
    root_variable: str = ROOT_VARIABLE,
    **metadata: object,
) -> None:
    """Registers a dataset in COCO's format: boxes, with or without masks; any category ids.

    Nothing is read before the dataset is used. Registering the same files under the same name
    again does nothing.

    Args:
        name: under which cfg.DATASETS finds it.
        json_file: annotations.
        image_root: folder of the images.
        root_variable: the environment variable that moves the dataset, for messages.
        metadata: more for detectron2's MetadataCatalog, as `thing_classes`; `any_path=True`: file
            names in the annotations may lead out of `image_root`.

    Raises:
        ValueError: the name is taken by other files.
    """
    paths = {"json_file": str(json_file), "image_root": str(image_root)}
    _register(
        name,
        lambda: load_coco_json(paths["json_file"], paths["image_root"], name),
        {**paths, "evaluator_type": "coco", "root_variable": root_variable, **metadata},
    )


def register_panoptic_folder(
    name: str,
    panoptic_json: str | Path,
    image_root: str | Path,
    panoptic_root: str | Path,
    categories: list[dict],
    *,
    instances_json: str | Path | None = None,
    sem_seg_root: str | Path | None = None,
    evaluator_type: str = "coco_panoptic_seg",
    root_variable: str = ROOT_VARIABLE,
    any_path: bool = False,
) -> None:
    """Registers a dataset in COCO's panoptic format; classes are numbered as in `categories`.

    All that is not said here is as of `register_coco_folder`.

    Args:
        name: under which cfg.DATASETS finds it.
        panoptic_json: annotations.
        image_root: folder of the images.
        panoptic_root: folder of the PNG files of segment ids.
        categories: {"id", "name", "isthing"[, "color"]} of each class.
        instances_json: COCO instances of the things, with the same category ids, for AP.
        sem_seg_root: folder of PNG files of classes (255 is ignored), for mIoU.
        evaluator_type: what evaluates it.
        root_variable: see there.
        any_path: file names in the annotations may lead out of the folders.
    """
    metadata = {
        "panoptic_json": str(panoptic_json),
        "image_root": str(image_root),
        "panoptic_root": str(panoptic_root),
        "evaluator_type": evaluator_type,
        "root_variable": root_variable,
        "any_path": any_path,
        "ignore_label": 255,
        "label_divisor": 1000,
        **panoptic_metadata(categories),
    }
    if instances_json is not None:
        metadata["json_file"] = str(instances_json)
    if sem_seg_root is not None:
        metadata["sem_seg_root"] = str(sem_seg_root)
    _register(name, lambda: load_panoptic(metadata), metadata)


def panoptic_metadata(categories: list[dict]) -> dict:
    """Class names, and maps from category ids to class numbers, as detectron2 wants them.

    Both lists of names hold all classes, as in detectron2's `coco_2017_val_panoptic`.
    """
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    names = [category["name"] for category in categories]
    things = {category["id"] for category in categories if category["isthing"]}
    metadata = {
        "thing_classes": names,
        "stuff_classes": names,
        "thing_dataset_id_to_contiguous_id": {i: n for i, n in numbers.items() if i in things},
        "stuff_dataset_id_to_contiguous_id": {i: n for i, n in numbers.items() if i not in things},
    }
    if all("color" in category for category in categories):
        colors = [list(category["color"]) for category in categories]
        metadata.update(thing_colors=colors, stuff_colors=colors)
    return metadata


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


def register_semantic_folder(
    name: str,
    sem_seg_root: str | Path,
    image_root: str | Path,
    classes: list[str],
    *,
    image_ext: str = "jpg",
    json_file: str | Path | None = None,
    root_variable: str = ROOT_VARIABLE,
) -> None:
    """Registers images with semantic maps: PNG files of the same names; 255 is ignored.

    All that is not said here is as of `register_coco_folder`.

    Args:
        name: under which cfg.DATASETS finds it.
        sem_seg_root: folder of the maps; a pixel is the position of its class in `classes`.
        image_root: folder of the images.
        classes: names.
        image_ext: how the names of the images end.
        json_file: its "images" are those of the dataset, each with "file_name" and
            "sem_seg_file_name" in these folders; None: all images of the folder.
        root_variable: see there.
    """
    paths = {"sem_seg_root": str(sem_seg_root), "image_root": str(image_root)}
    if json_file is None:
        load = partial(load_sem_seg, *paths.values(), image_ext=image_ext)
    else:
        paths["json_file"] = str(json_file)
        load = partial(load_semantic_list, *paths.values())
    _register(
        name,
        load,
        {
            **paths,
            "stuff_classes": classes,
            "ignore_label": 255,
            "evaluator_type": "sem_seg",
            "root_variable": root_variable,
        },
    )


def _offer(
    register: Callable[..., None],
    name: str,
    *arguments: object,
    postponed: bool = False,
    **options: object,
) -> None:
    """Offers a dataset, which `register` registers, to detectron2's catalogs."""

    def drop() -> None:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)

    entry = Offer(
        name,
        find=lambda: DatasetCatalog.data.get(name),
        put=lambda: register(name, *arguments, **options),
        drop=drop,
    )
    offer(entry, postponed=postponed)


def _offer_nuclei() -> None:
    folder = own_datasets_root() / "nuclei"
    for split in ("train", "val"):
        _offer(
            register_semantic_folder,
            f"nuclei_sem_seg_{split}",
            folder / f"semantic_{split}",
            folder / split,
            ["background", "nucleus"],
            image_ext="png",
            root_variable=OWN_ROOT_VARIABLE,
        )
        _offer(
            register_coco_folder,
            f"nuclei_{split}",
            folder / "annotations" / f"instances_{split}.json",
            folder / split,
            root_variable=OWN_ROOT_VARIABLE,
            thing_classes=["nucleus"],
            thing_dataset_id_to_contiguous_id={1: 0},
        )


def _offer_coco_panoptic() -> None:
    """`coco_2017_val_panoptic_with_sem_seg`: detectron2's has no semantic maps of all classes."""
    folder = datasets_root() / "coco"
    for split in ("train", "val"):
        name = f"coco_2017_{split}_panoptic"
        base = MetadataCatalog.get(name)
        ids = {
            **base.thing_dataset_id_to_contiguous_id,
            **base.stuff_dataset_id_to_contiguous_id,
        }
        categories = [
            {
                "id": category,
                "name": base.stuff_classes[number],
                "color": base.stuff_colors[number],
                "isthing": category in base.thing_dataset_id_to_contiguous_id,
            }
            for category, number in sorted(ids.items(), key=lambda item: item[1])
        ]
        files, pngs = (base.panoptic_json, base.image_root), base.panoptic_root
        beside = os.path.join(os.path.dirname(base.panoptic_json), os.path.basename(pngs))
        if not PathManager.isdir(pngs) and PathManager.isdir(beside):
            # Unpacked where COCO's archive has them: detectron2's own dataset looks there too.
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name)
            pngs = beside
            register_panoptic_folder(name, *files, pngs, categories, instances_json=base.json_file)
        _offer(
            register_panoptic_folder,
            f"{name}_with_sem_seg",
            *files,
            pngs,
            categories,
            instances_json=base.json_file,
            sem_seg_root=folder / f"panoptic_semseg_{split}2017",
            postponed=True,
        )


def _offer_ade20k() -> None:
    """The semantic datasets, `ade20k_sem_seg_train` and `_val`, are detectron2's."""
    folder = datasets_root() / "ADEChallengeData2016"
    names = ade20k_classes()
    categories = [
        {"id": i, "name": name, "isthing": i in ADE20K_THING_IDS} for i, name in enumerate(names)
    ]
    for split, long_split in (("train", "training"), ("val", "validation")):
        images = folder / "images" / long_split
        instances = folder / f"ade20k_instance_{split}.json"
        _offer(
            register_coco_folder,
            f"ade20k_instance_{split}",
            instances,
            images,
            thing_classes=[names[i] for i in ADE20K_THING_IDS],
            postponed=True,
        )
        _offer(
            register_panoptic_folder,
            f"ade20k_panoptic_{split}",
            folder / f"ade20k_panoptic_{split}.json",
            images,
            folder / f"ade20k_panoptic_{split}",
            categories,
            instances_json=instances,
            sem_seg_root=folder / "annotations_detectron2" / long_split,
            evaluator_type="ade20k_panoptic_seg",
            postponed=True,
        )


def _offer_boxes() -> None:
    """Of Objects365 and BCCD, which have no masks."""
    for place, file, name, splits in (
        ("objects365", "objects365", "objects365", ("train", "val")),
        ("bccd_boxes", "instances", "bccd", ("train", "val", "test")),
    ):
        folder = datasets_root() / place
        for split in splits:
            annotations = folder / "annotations" / f"{file}_{split}.json"
            _offer(register_coco_folder, f"{name}_{split}", annotations, folder / split)


_offer_nuclei()
_offer_coco_panoptic()
_offer_ade20k()
_offer_boxes()
