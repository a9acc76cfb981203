"""Checks of a configuration's datasets, made before anything expensive starts."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils.file_io import PathManager

from maskdino.data.annotation_checks import (
    LISTS,
    TOLERABLE,
    Finding,
    check_annotations,
    check_categories,
    check_images,
    describe,
    format_problem,
)
from maskdino.data.datasets import OWN_ROOT_VARIABLE, ROOT_VARIABLE, own_datasets_root
from maskdino.data.folders import check_names
from maskdino.data.numbering import renumber_things
from maskdino.data.panoptic_checks import check_panoptic
from maskdino.data.reading import DataError, read_json
from maskdino.data.record_checks import check_records
from maskdino.data.records import KEY as RECORD_KEY
from maskdino.data.records import RECORD, TRAIN_NAME, VALIDATION_NAME
from maskdino.integration.registration import register_postponed
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

# Part of a missing path -> the preparation that makes it.
_PREPARATIONS = {
    "annotations_detectron2": "ade20k",
    "ade20k_": "ade20k",
    "panoptic_semseg_": "coco-semantic",
    "cityscapes_panoptic_": "cityscapes",
    "objects365_": "objects365",
    "nuclei/semantic_": "semantic-from-instances",
}
_PATHS = (
    "json_file",
    "image_root",
    "panoptic_json",
    "panoptic_root",
    "sem_seg_root",
    "image_dir",
    "gt_dir",
)


def check_datasets(cfg: CfgNode, *, is_evaluation: bool = False) -> None:
    """Checks that every dataset of cfg.DATASETS is there, complete, and fits the model.

    An evaluation needs those of cfg.DATASETS.TEST alone.

    Raises:
        DataError: an unknown name, a missing folder, file or package, a number of classes that is
            not the model's, an error in COCO annotations, or an image of theirs that is not in its
            folder.
    """
    register_postponed()
    train = () if is_evaluation else tuple(cfg.DATASETS.TRAIN)
    test = tuple(cfg.DATASETS.TEST)
    with_masks = {}
    for name in dict.fromkeys(train + test):
        _check_name(name)
        metadata = MetadataCatalog.get(name)
        _check_packages(cfg, name, metadata)
        unused = _unused_paths(cfg, name, metadata)
        _check_paths(name, metadata, unused)
        with_masks[name] = _check_classes(
            name, metadata, cfg.MODEL.MASK_DINO.NUM_CLASSES, is_trained=name in train
        )
        _check_maps(name, metadata)
        if (
            name in test
            and metadata.get("evaluator_type") == "coco"
            and not metadata.get("json_file")
        ):
            check_records(name)
        if metadata.get("evaluator_type") in ("coco_panoptic_seg", "ade20k_panoptic_seg"):
            measured = name in test and cfg.MODEL.MASK_DINO.TEST.PANOPTIC_ON
            check_panoptic(read_json(metadata.panoptic_json), metadata, measured=measured)
        instances = metadata.get("json_file")
        if "panoptic_json" in metadata.as_dict() and instances and "json_file" not in unused:
            renumber_things(read_json(instances), metadata)  # raises unless they are of its things
    loss = cfg.MODEL.MASK_DINO.LOSS
    learned = cfg.MODEL.MASK_DINO.MASK_ON and (loss.MASK_BCE_WEIGHT or loss.MASK_DICE_WEIGHT)
    if learned and train and not any(with_masks[name] for name in train):
        raise DataError(
            f'no annotation of {", ".join(train)} has a mask (a "segmentation"), so that there is '
            "nothing to learn masks from: set MODEL.MASK_DINO.MASK_ON False"
        )


def check_known(name: str, *, images: bool = True) -> None:
    """Checks a dataset that a command was given, and which `check_datasets` has not seen.

    Args:
        name: registered with detectron2.
        images: whether its images will be read, too.

    Raises:
        DataError: there is no such dataset; a file or folder of it is missing; or, of a dataset
            that a record gave, the file name of an image leads out of the folder.
    """
    register_postponed()
    _check_name(name)
    metadata = MetadataCatalog.get(name)
    if images:
        unused = {"json_file", "sem_seg_root"} if metadata.get("panoptic_json") else set()
        _check_paths(name, metadata, unused)
    if metadata.get("evaluator_type") == "coco" and metadata.get(RECORD_KEY) is not None:
        _judge_names(_read_coco(metadata, ("images",)), metadata)


def _check_name(name: str) -> None:
    known = DatasetCatalog.list()
    if name not in known:
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(close)}? Otherwise " if close else ""
        if name in (TRAIN_NAME, VALIDATION_NAME):
            raise DataError(
                f"dataset {name!r} is that of a run of train-custom, and the file that records "
                f"where its data are, {RECORD}, is not beside this configuration or cannot be "
                "read: give the config.yaml in the folder of the run"
            )
        raise DataError(
            f"dataset {name!r} is not registered; {hint}register it first, in a "
            "module that --import names"
        )


def _check_packages(cfg: CfgNode, name: str, metadata: Metadata) -> None:
    """Raises where a package is missing that would be imported long after the start."""
    kind, is_test = metadata.get("evaluator_type", ""), name in cfg.DATASETS.TEST
    needed = []
    if kind == "cityscapes_instance" or (kind.startswith("cityscapes") and is_test):
        needed.append("cityscapesscripts")
    if kind == "cityscapes_instance":
        needed.append("shapely")
    if kind.endswith("panoptic_seg") and is_test and cfg.MODEL.MASK_DINO.TEST.PANOPTIC_ON:
        needed.append("panopticapi")
    if kind == "lvis":
        needed.append("lvis")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        install = [
            "panopticapi-lite" if package == "panopticapi" else package for package in missing
        ]
        raise DataError(
            f"dataset {name!r} needs the package {' and '.join(missing)}, which is not installed: "
            f"pip install {' '.join(install)}"
        )


def _unused_paths(cfg: CfgNode, name: str, metadata: Metadata) -> set[str]:
    """Panoptic datasets come with instances and semantic maps, which not every run reads."""
    if "panoptic_json" not in metadata.as_dict():
        return set()
    is_test = name in cfg.DATASETS.TEST
    unused = set()
    if not (is_test and cfg.MODEL.MASK_DINO.TEST.INSTANCE_ON):
        unused.add("json_file")
    if not is_test and cfg.INPUT.DATASET_MAPPER_NAME != "semantic":
        unused.add("sem_seg_root")
    return unused


def _check_paths(name: str, metadata: Metadata, unused: set[str]) -> None:
    variable = metadata.get("root_variable", ROOT_VARIABLE)
    root = own_datasets_root() if variable == OWN_ROOT_VARIABLE else os.environ.get(variable)
    for key in _PATHS:
        path = metadata.get(key)
        if key in unused or path is None or PathManager.exists(path):
            continue
        record = metadata.get(RECORD_KEY)
        if record is not None:
            raise DataError(
                f"dataset {name!r}: {path} does not exist. {record} says where the data of this "
                "run are: mend the path there, or put them back"
            )
        command = next((c for part, c in _PREPARATIONS.items() if part in path), None)
        made = f"; `maskdino prepare {command}` makes it from the downloaded files"
        raise DataError(
            f"dataset {name!r}: {path} does not exist. The environment variable {variable} (now "
            f"{root or 'not set: ./datasets'}) names the folder of the datasets, and "
            f"datasets/README.md shows what it must hold{made if command else ''}"
        )


def _check_maps(name: str, metadata: Metadata) -> None:
    """Raises where a folder holds no semantic maps; those of a list are where it says."""
    folder = metadata.get("sem_seg_root", "")
    is_listed = metadata.get("json_file") is not None
    if metadata.get("evaluator_type") != "sem_seg" or is_listed or not PathManager.isdir(folder):
        return
    entries = PathManager.ls(folder)
    if not any(x.endswith(".png") or PathManager.isdir(os.path.join(folder, x)) for x in entries):
        raise DataError(f"dataset {name!r}: {folder} holds no PNG file")


def _check_classes(name: str, metadata: Metadata, num_classes: int, *, is_trained: bool) -> bool:
    """Returns whether there are masks, as far as can be told without loading the dataset."""
    content = None
    number = _num_classes(metadata)
    # One that a function of the user gives may have no file, or a file without images' folder.
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file") is not None:
        content = _read_coco(metadata, LISTS if is_trained else ("images", "categories"))
        number = len(content["categories"])
    if number is not None and number != num_classes:
        file = "" if content is None else f" ({metadata.json_file})"
        raise DataError(
            f"dataset {name!r}{file} has {counted(number, 'class')}, but "
            f"MODEL.MASK_DINO.NUM_CLASSES is {num_classes}"
        )
    if content is None:
        return True
    _judge_names(content, metadata)
    _check_coco(content, metadata.json_file, metadata.get("image_root"))
    annotations = content.get("annotations", ())
    if is_trained and all(annotation.get("iscrowd") for annotation in annotations):
        raise DataError(f"{metadata.json_file} has no objects to train on")
    return any(annotation.get("segmentation") for annotation in annotations)


def _read_coco(metadata: Metadata, needed: Sequence[str]) -> dict:
    content = read_json(metadata.json_file)
    problem = format_problem(content, needed)
    if problem:
        raise DataError(f"{metadata.json_file} is not in COCO's format: {problem}")
    return content


def _judge_names(content: dict, metadata: Metadata) -> None:
    """Raises where the file name of an image leads out of the folder, unless that is allowed."""
    if not metadata.get("any_path", False) and metadata.get("image_root") is not None:
        _judge([*check_names(content["images"], metadata.image_root)], metadata.json_file)


def _judge(findings: list[Finding], json_file: str) -> None:
    """Raises where something is wrong that training, or evaluation, cannot get along with."""
    wrong = [finding for finding in findings if finding.kind not in TOLERABLE]
    if wrong:
        first, more = wrong[0], len(wrong) - 1
        raise DataError(
            f"{json_file}: {first.kind}: {first.detail}" + (f"; and {more} more" if more else "")
        )


def _num_classes(metadata: Metadata) -> int | None:
    """Classes that a model of this dataset tells apart; None if the metadata does not say."""
    known = metadata.as_dict()
    if "panoptic_json" in known:
        maps = (
            metadata.get(f"{kind}_dataset_id_to_contiguous_id", {}) for kind in ("thing", "stuff")
        )
        return len({number for numbers in maps for number in numbers.values()})
    if known.get("evaluator_type", "").endswith("sem_seg"):
        return len(known["stuff_classes"])
    return len(known["thing_classes"]) if "thing_classes" in known else None


def _check_loadable(content: dict, json_file: str) -> None:
    """Raises where detectron2 could not load the file of a registered dataset."""
    for name in ("images", "categories"):
        ids = [entry["id"] for entry in content[name]]
        if len({isinstance(x, str) for x in ids}) > 1:
            raise DataError(f"{json_file}: ids of {name} are numbers and texts: {ids[:4]}")
    for category in content["categories"]:
        if not isinstance(category["name"], str):
            raise DataError(f"{json_file}: a category has the name {category['name']!r}: no text")
    for annotation in content.get("annotations", ()):
        box, points = annotation.get("bbox", True), annotation.get("keypoints") or []
        problem = None
        if not box:
            problem = f"bbox is {box!r}: leave the key out of annotations that have a mask alone"
        elif not isinstance(points, list) or not all(isinstance(x, int | float) for x in points):
            problem = f"keypoints are {points!r}: no list of numbers"
        elif annotation.get("ignore", 0) != 0:
            problem = f"ignore is {annotation['ignore']!r}, which nothing here reads"
        if problem:
            raise DataError(f"{json_file}: annotation {annotation.get('id')!r}: {problem}")


def _check_coco(content: dict, json_file: str, image_root: str | None) -> None:
    """Checks COCO annotations and, where their folder is known, the image files by their names."""
    images, categories = content["images"], content["categories"]
    findings = [*check_categories(categories), *check_images(images)]
    _judge(findings, json_file)
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in images}
    annotations = content.get("annotations", [])
    findings += check_annotations(annotations, images, categories, sizes, draw=False)
    _judge(findings, json_file)
    _check_loadable(content, json_file)
    for line in describe(findings, most=1):
        logger.warning("%s: %s", json_file, line.strip())
    if image_root is None:
        return
    by_folder = defaultdict(set)
    for image in content["images"]:
        path = PurePath(image["file_name"])
        by_folder[os.path.join(image_root, path.parent)].add(path.name)
    for folder, names in by_folder.items():
        # One listing of a folder is far cheaper than a question for each of its files.
        missing = names - set(PathManager.ls(folder) if PathManager.isdir(folder) else ())
        if missing:
            raise DataError(
                f"{json_file} lists {counted(len(missing), 'image')} not in {folder}, for "
                f"example {', '.join(sorted(missing)[:3])}"
            )
