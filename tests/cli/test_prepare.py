"""Preparations on drawn datasets, and what the mappers read from their results."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from PIL import Image

from maskdino.cli.prepare import common
from maskdino.data import (
    DataError,
    build_train_mapper,
    check_datasets,
    datasets,
    register_coco_folder,
    register_panoptic_folder,
)
from maskdino.integration.registration import register_postponed
from tests.data import synthetic
from tests.data.synthetic import Scene, make_scenes


@pytest.fixture
def scenes() -> dict[str, list[Scene]]:
    all_scenes = make_scenes(3)
    return {"train": all_scenes[:2], "val": all_scenes[2:]}


def prepare(name: str, *arguments: object, workers: int = 1) -> None:
    """Runs a command in this process; an error is not turned into one line."""
    module = importlib.import_module(f"maskdino.cli.prepare.{name}")
    module.main.__wrapped__([*map(str, arguments), "--workers", str(workers)])


@pytest.fixture
def registered() -> list[str]:
    """Names that the test registers; they are forgotten afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def expected_labels(scene: Scene, ids: dict[str, int]) -> np.ndarray:
    labels = np.full(scene.size, 255)
    for shape, mask in scene.visible():
        labels[mask] = ids[shape.name]
    return labels


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", [".", "annotations"])
def test_coco_semantic_maps(tmp_path: Path, scenes: dict, place: str) -> None:
    folder = synthetic.write_coco(tmp_path, scenes)
    for split in ("train", "val"):
        png = folder / f"panoptic_{split}2017"
        png.rename(folder / place / png.name)
    prepare("coco_semantic", "--root", tmp_path, workers=2)
    ids = {"person": 0, "car": 1, "road": 2, "sky": 3}
    for number, scene in enumerate(scenes["train"], start=1):
        made = read(folder / f"panoptic_semseg_train2017/{number:012d}.png")
        assert made.dtype == np.uint8 and (made == expected_labels(scene, ids)).all()

    # Only what is missing is made again, unless one asks for more.
    before = times(folder)
    lost = folder / "panoptic_semseg_train2017/000000000002.png"
    lost.unlink()
    prepare("coco_semantic", "--root", tmp_path)
    after = times(folder)
    assert {path for path in after if after[path] != before[path]} == {lost}
    prepare("coco_semantic", "--root", tmp_path, "--overwrite", "--splits", "val")
    assert times(folder)[folder / "panoptic_semseg_val2017/000000000001.png"] > max(after.values())


def test_missing_segments_and_folders_are_errors(tmp_path: Path, scenes: dict) -> None:
    with pytest.raises(common.PreparationError, match="panoptic_train2017.json does not exist"):
        prepare("coco_semantic", "--root", tmp_path)
    folder = synthetic.write_coco(tmp_path, scenes)
    annotations = folder / "annotations/panoptic_train2017.json"
    whole = annotations.read_text()
    annotations.write_text(whole[:-5])
    with pytest.raises(DataError, match="panoptic_train2017.json cannot be read as JSON"):
        prepare("coco_semantic", "--root", tmp_path)
    annotations.write_text(whole)
    png = folder / "panoptic_train2017/000000000001.png"
    Image.fromarray(np.zeros_like(read(png))).save(png)
    with pytest.raises(
        common.PreparationError, match="000000000001.png has no pixel of its segment"
    ):
        prepare("coco_semantic", "--root", tmp_path)
    png.write_bytes(b"broken")
    with pytest.raises(common.PreparationError, match="cannot read .*000000000001.png"):
        prepare("coco_semantic", "--root", tmp_path)


def test_a_broken_file_ends_the_work_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        common.run(divide_slowly, list(range(400)), 2, "test")
    assert time.monotonic() - start < 5  # all of it would take 10 seconds


def divide_slowly(number: int) -> float:
    time.sleep(0.05)
    return 1 / number


def test_ade20k(tmp_path: Path, scenes: dict, make_cfg: Callable, registered: list[str]) -> None:
    folder = synthetic.write_ade20k(tmp_path, scenes)
    prepare("ade20k", "--root", tmp_path)
    images = folder / "images/training"
    records = load_sem_seg(str(folder / "annotations_detectron2/training"), str(images))
    for record, scene in zip(records, scenes["train"], strict=True):
        labels = expected_labels(scene, synthetic.ADE20K_IDS)
        assert (read(Path(record["sem_seg_file_name"])) == labels).all()

    registered += ["prepare_test_instance", "prepare_test_panoptic"]
    instance, panoptic = registered
    categories = json.loads((folder / "ade20k_panoptic_train.json").read_text())["categories"]
    register_coco_folder(instance, folder / "ade20k_instance_train.json", images)
    pngs = folder / "ade20k_panoptic_train"
    register_panoptic_folder(panoptic, pngs.with_suffix(".json"), images, pngs, categories)
    register_postponed()
    shown = MetadataCatalog.get("ade20k_panoptic_train")
    assert [c["id"] for c in categories if c["isthing"]] == list(datasets.ADE20K_THING_IDS)
    assert [c["name"] for c in categories] == shown.stuff_classes

    plain = ("INPUT.LSJ.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.RANDOM_FLIP", "none")
    for name, classes, mapper in ((instance, 100, "instance"), (panoptic, 150, "panoptic")):
        options = ("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", classes)
        cfg = make_cfg(*plain, *options, "INPUT.DATASET_MAPPER_NAME", mapper)
        check_datasets(cfg)
        mapper = build_train_mapper(cfg)
        for record, scene in zip(DatasetCatalog.get(name), scenes["train"], strict=True):
            instances = mapper(record)["instances"]
            visible = [
                (shape, mask)
                for shape, mask in scene.visible()
                if name == panoptic or shape.is_thing
            ]
            numbers = synthetic.ADE20K_IDS if name == panoptic else {"person": 3, "car": 8}
            made = zip(
                instances.gt_classes.tolist(), instances.gt_masks.to_bool().numpy(), strict=True
            )
            made = sorted((c, m.tobytes()) for c, m in made)
            assert made == sorted((numbers[s.name], m.tobytes()) for s, m in visible)


def test_ade20k_goes_on_after_an_interruption(tmp_path: Path, scenes: dict) -> None:
    folder = synthetic.write_ade20k(tmp_path, scenes)
    prepare("ade20k", "--root", tmp_path)
    output = folder / "ade20k_panoptic_train.json"
    whole, before = output.read_text(), times(folder)
    lost = next((folder / "ade20k_panoptic_train").iterdir())
    lost.unlink()
    output.unlink()
    prepare("ade20k", "--root", tmp_path)
    after = times(folder)
    assert output.read_text() == whole
    assert {path for path in after if after[path] != before.get(path)} == {output, lost}


def test_cityscapes(tmp_path: Path, scenes: dict, make_cfg: Callable) -> None:
    folder = synthetic.write_cityscapes(tmp_path, scenes)
    prepare("cityscapes", "--root", tmp_path)
    truth = folder / "gtFine"
    for number, scene in enumerate(scenes["train"]):
        path = truth / f"train/aachen/aachen_{number:06d}_000000_gtFine_labelTrainIds.png"
        labels = expected_labels(scene, {"road": 0, "sky": 10, "person": 11, "car": 13})
        assert (read(path) == labels).all()

    # detectron2's own loader reads the panoptic maps, and wants both kinds of files.
    metadata = MetadataCatalog.get("cityscapes_fine_panoptic_train")
    output = truth / "cityscapes_panoptic_train"
    images = folder / "leftImg8bit/train"
    records = load_cityscapes_panoptic(
        str(images), str(output), str(output.with_suffix(".json")), metadata.as_dict()
    )
    options = ("DATASETS.TRAIN", ("cityscapes_fine_panoptic_train",))
    plain = ("INPUT.LSJ.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.RANDOM_FLIP", "none")
    mapper_name = ("INPUT.DATASET_MAPPER_NAME", "panoptic", "MODEL.MASK_DINO.NUM_CLASSES", 19)
    mapper = build_train_mapper(make_cfg(*plain, *options, *mapper_name))
    for record, scene in zip(records, scenes["train"], strict=True):
        instances = mapper(record)["instances"]
        visible = scene.visible()
        assert len(instances) == len(visible)
        assert instances.gt_is_thing.sum() == sum(shape.is_thing for shape, _ in visible)
        covered = instances.gt_masks.to_bool().any(0).numpy()
        assert (covered == (scene.owner >= 0)).all()


def test_cityscapes_groups_are_crowds(tmp_path: Path, scenes: dict) -> None:
    folder = synthetic.write_cityscapes(tmp_path, scenes)
    path = folder / "gtFine/val/aachen/aachen_000000_000000_gtFine_instanceIds.png"
    ids = read(path).astype(np.uint16)
    ids[:5] = 26  # cars that were not told apart
    ids[5:8] = 1  # the car of the camera: in no class
    Image.fromarray(ids).save(path)
    prepare("cityscapes", "--root", tmp_path, "--splits", "val")
    content = json.loads((folder / "gtFine/cityscapes_panoptic_val.json").read_text())
    (segments,) = (annotation["segments_info"] for annotation in content["annotations"])
    crowds = [segment for segment in segments if segment["iscrowd"]]
    assert [(s["id"], s["category_id"], s["bbox"]) for s in crowds] == [(26, 26, [0, 0, 128, 5])]
    assert 1 not in {segment["id"] for segment in segments}


def test_objects365_keeps_what_can_be_read(
    tmp_path: Path, scenes: dict, make_cfg: Callable, registered: list[str]
) -> None:
    coco = synthetic.write_coco(tmp_path, scenes)
    folder = tmp_path / "objects365"
    part = folder / "train" / "patch3"
    part.parent.mkdir(parents=True)
    (coco / "train2017").rename(part)
    (part / "000000000002.jpg").write_bytes((part / "000000000001.jpg").read_bytes()[:500])
    content = json.loads((coco / "annotations/instances_train2017.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"images/v1/patch3/{image['file_name']}"
    content["images"].append({**content["images"][0], "id": 9, "file_name": "images/lost.jpg"})
    content["annotations"].append({**content["annotations"][0], "id": 999, "image_id": 9})
    (folder / "annotations").mkdir()
    (folder / "annotations/zhiyuan_objv2_train.json").write_text(json.dumps(content))

    prepare("objects365", "--root", tmp_path, "--splits", "train")
    registered.append("prepare_test_objects365")
    output = folder / "annotations/objects365_train.json"
    register_coco_folder(registered[0], output, folder / "train")
    cfg = make_cfg("DATASETS.TRAIN", tuple(registered), "MODEL.MASK_DINO.NUM_CLASSES", 2)
    check_datasets(cfg)
    (record,) = DatasetCatalog.get(registered[0])
    assert record["image_id"] == 1 and len(record["annotations"]) == 5


def test_semantic_maps_of_instances(tmp_path: Path, repository: Path) -> None:
    nuclei = repository / "datasets/nuclei/annotations/instances_val.json"
    prepare("semantic_from_instances", "--json", nuclei, "--output", tmp_path / "maps")
    content = json.loads(nuclei.read_text())
    for image in content["images"][:5]:
        labels = read((tmp_path / "maps" / image["file_name"]).with_suffix(".png"))
        areas = [a["area"] for a in content["annotations"] if a["image_id"] == image["id"]]
        assert set(np.unique(labels)) <= {0, 1} and labels.sum() == sum(areas)
