"""Datasets and their checks, on drawn folders and on real images."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from maskdino.categories import Categories
from maskdino.custom.annotations import read_annotations
from maskdino.data import (
    DataError,
    build_train_mapper,
    check_datasets,
    datasets,
    register_coco_folder,
    register_panoptic_folder,
)
from maskdino.integration.registration import register_all
from tests.data.synthetic import make_scenes, write_coco


@pytest.fixture(autouse=True)
def _all_registered() -> None:
    register_all()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A drawn `coco` folder."""
    return write_coco(tmp_path, {"train": make_scenes(3)})


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A dataset name of the test's own."""
    return f"test/{request.node.name}"


def change(path: Path, function: Callable[[dict], None]) -> None:
    """Edits a JSON file."""
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def test_what_detectron2_lacks_is_registered() -> None:
    names = set(DatasetCatalog.list())
    for dataset in (
        "nuclei_{}",
        "nuclei_sem_seg_{}",
        "coco_2017_{}_panoptic_with_sem_seg",
        "ade20k_instance_{}",
        "ade20k_panoptic_{}",
        "objects365_{}",
    ):
        assert {dataset.format("train"), dataset.format("val")} <= names


def test_registering_again_does_nothing_but_never_replaces(tmp_path: Path, name: str) -> None:
    register_all()
    known = dict(DatasetCatalog)
    register_all()
    assert dict(DatasetCatalog) == known
    register_coco_folder(name, tmp_path / "a.json", tmp_path)
    register_coco_folder(name, tmp_path / "a.json", tmp_path)
    with pytest.raises(ValueError, match=f"{name}.*json_file"):
        register_coco_folder(name, tmp_path / "b.json", tmp_path)


def test_coco_panoptic_classes_are_detectron2s() -> None:
    ours = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    theirs = MetadataCatalog.get("coco_2017_val_panoptic")
    for key in (
        "thing_classes",
        "stuff_classes",
        "thing_colors",
        "thing_dataset_id_to_contiguous_id",
        "stuff_dataset_id_to_contiguous_id",
        "panoptic_json",
        "image_root",
        "label_divisor",
    ):
        assert ours.get(key) == theirs.get(key)


SHOW = """
from detectron2.data import DatasetCatalog, MetadataCatalog
import maskdino
maskdino.register_all()
for name in ("coco_2017_train_panoptic", "coco_2017_train_panoptic_with_sem_seg"):
    record = DatasetCatalog.get(name)[0]
    print(MetadataCatalog.get(name).panoptic_root)
    print(record["pan_seg_file_name"], [s["category_id"] for s in record["segments_info"]])
"""


@pytest.mark.parametrize("place", ["panoptic_train2017", "annotations/panoptic_train2017"])
def test_panoptic_maps_of_coco_are_found_in_either_place(
    coco: Path, place: str, monkeypatch: pytest.MonkeyPatch, warm_python: str
) -> None:
    (coco / "panoptic_train2017").rename(coco / place)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco.parent))
    command = [warm_python, "-c", SHOW]
    output = subprocess.check_output(command, text=True)
    folder, record, *others = output.splitlines()
    assert Path(folder) == coco / place
    assert others == [folder, record]
    assert Path(record.split()[0]).is_file()


def test_ade20k_things_and_stuff() -> None:
    metadata = MetadataCatalog.get("ade20k_panoptic_train")
    classes = metadata.stuff_classes
    things = [classes[i] for i in metadata.thing_dataset_id_to_contiguous_id.values()]
    stuff = [classes[i] for i in metadata.stuff_dataset_id_to_contiguous_id.values()]
    assert (len(classes), len(things), len(stuff)) == (150, 100, 50)
    assert {"person", "car", "bed", "flag"} <= set(things)
    assert {"wall", "sky", "shower", "crt screen"} <= set(stuff)
    assert MetadataCatalog.get("ade20k_instance_train").thing_classes == things


def test_nuclei_are_complete(make_cfg: Callable) -> None:
    cfg = make_cfg("DATASETS.TRAIN", ("nuclei_train",), "DATASETS.TEST", ("nuclei_val",))
    cfg.MODEL.MASK_DINO.NUM_CLASSES = 1
    assert Categories.from_config(cfg).dataset_ids == (1,)  # as their file says, which is not read
    check_datasets(cfg)
    cfg.DATASETS.TRAIN = ("of_the_training",)
    check_datasets(cfg, is_evaluation=True)
    with pytest.raises(DataError, match="'of_the_training' is not registered"):
        check_datasets(cfg)
    assert len(DatasetCatalog.get("nuclei_train")) == 80
    assert sum(len(d["annotations"]) for d in DatasetCatalog.get("nuclei_val")) == 615


def test_drawn_coco_loads_and_maps(make_cfg: Callable, coco: Path, name: str) -> None:
    register_coco_folder(name, coco / "annotations/instances_train2017.json", coco / "train2017")
    cfg = make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 2)
    check_datasets(cfg)
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 1.0
    mapper = build_train_mapper(cfg)
    for record in get_detection_dataset_dicts(name):
        instances = mapper(record)["instances"]
        assert len(instances) == 4 and set(instances.gt_classes.tolist()) == {0, 1}
        assert instances.gt_masks.to_bool().any(dim=(1, 2)).all()


@pytest.mark.parametrize("filtered", [True, False])
def test_images_without_objects(coco: Path, name: str, filtered: bool) -> None:
    path = coco / "annotations/instances_train2017.json"
    # The crowds remain: they are no objects.
    change(path, lambda c: c.update(annotations=[a for a in c["annotations"] if a["iscrowd"]]))
    change(path, lambda c: c["annotations"].append({**c["annotations"][0], "iscrowd": 0, "id": 99}))
    register_coco_folder(name, path, coco / "train2017")
    dicts = get_detection_dataset_dicts(name, filter_empty=filtered)
    assert len(dicts) == (1 if filtered else 3)


def edit(kind: str, **values: object) -> Callable[[dict], None]:
    """Changes the second entry of a list of COCO's."""
    return lambda content: content[kind][1].update(values)


def drop(kind: str, key: str) -> Callable[[dict], None]:
    return lambda content: content[kind][1].pop(key)


HUGE = 10**400
BROKEN = [
    (edit("annotations", image_id=12345), "unknown image: annotation 2 of image 12345"),
    (drop("annotations", "image_id"), "unknown image: annotation 2 of image None"),
    (edit("annotations", category_id=77), "unknown category: annotation 2 .*77"),
    (edit("annotations", category_id=[1]), r"unknown category: annotation 2 .*\[1\]"),
    (drop("annotations", "category_id"), "unknown category: annotation 2"),
    (drop("annotations", "id"), "annotation without id"),
    (edit("annotations", id=1), "several annotations with one id: annotation 1"),
    (edit("annotations", iscrowd="no"), "iscrowd is neither 0 nor 1: annotation 2 .*'no'"),
    (edit("annotations", bbox=None, segmentation=None), "neither box nor mask: annotation 2"),
    (edit("annotations", bbox=[0, 0, HUGE, 5]), "box is not four numbers"),
    (edit("annotations", bbox=[0, 0, float("nan"), 5]), "box is not four numbers"),
    (edit("annotations", bbox="wide"), "box is not four numbers"),
    (edit("annotations", segmentation=[1, 2, 3, 4, 5, 6]), "in a list of its own"),
    (edit("annotations", segmentation=[[1, 2, 3, 4, 5, HUGE]]), "list of numbers"),
    (edit("annotations", segmentation=[[1, 2, 3, 4, 5, "6"]]), "list of numbers"),
    (edit("annotations", segmentation=[[1, 2, 3, 4, 5, 1e9]]), "beyond 100000 pixels"),
    (edit("annotations", segmentation=3), "mask is malformed"),
    (edit("annotations", segmentation={"counts": [1]}), "run lengths of"),
    (edit("images", height="tall"), "image without height and width: image 2"),
    (edit("images", height=0), "image without height and width: image 2"),
    (edit("images", width=float("nan")), "image without height and width: image 2"),
    (drop("images", "height"), "image without height and width: image 2"),
    (drop("images", "file_name"), "image without file name: image 2"),
    (edit("images", file_name=5), "image without file name: image 2"),
    (drop("images", "id"), "image without id"),
    (edit("images", id=1), "several images with one id: image 1"),
    (edit("images", file_name="lost.jpg"), "1 image not in .*train2017.*lost.jpg"),
    (drop("categories", "id"), "category without id"),
    (lambda c: c.pop("images"), "not in COCO's format: it lacks images"),
    (lambda c: c.update(annotations=None), "'annotations' must be a list of objects"),
    (lambda c: c.update(annotations=[1]), "'annotations' must be a list of objects"),
    (lambda c: c.update(annotations=[]), "no objects to train on"),
]


def run_lengths(counts: object) -> Callable[[dict], None]:
    """Gives the second annotation run lengths in place of a polygon."""

    def change_content(content: dict) -> None:
        annotation = content["annotations"][1]
        image = next(i for i in content["images"] if i["id"] == annotation["image_id"])
        size = [image["height"], image["width"]]
        if counts == "fractions":
            rle = {"size": size, "counts": [0.5, size[0] * size[1] - 0.5]}
        else:
            rle = {"size": size, "counts": counts}
        annotation["segmentation"] = rle

    return change_content


BROKEN += [
    (run_lengths([3, 4]), "run lengths add up to 7, not to"),
    (run_lengths("fractions"), "run lengths must be integers"),
    (run_lengths([-5, 5]), "run lengths must be integers that are not negative"),
    (run_lengths("??"), "run lengths add up to 30, not to"),
    (run_lengths("?o"), "run lengths end within a number"),
    (run_lengths("? "), "the character ' '"),
    (run_lengths("O"), "integers that are not negative"),
    (run_lengths(None), "run lengths without counts"),
]


@pytest.mark.parametrize(("function", "message"), BROKEN)
def test_broken_annotations_are_found_before_training(
    make_cfg: Callable, coco: Path, name: str, function: Callable, message: str
) -> None:
    path = coco / "annotations/instances_train2017.json"
    change(path, function)
    register_coco_folder(name, path, coco / "train2017")
    cfg = make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 2)
    with pytest.raises(DataError, match=f"{path}.*{message}") as error:
        check_datasets(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bbox": [3, 3, 0, 5]}, "box of zero or negative size"),
        ({"bbox": [3000, 3, 5, 5]}, "box outside of its image"),
        ({"segmentation": [[1, 2, 3, 4]]}, "polygon without 3 whole points"),
    ],
)
def test_what_training_leaves_out_is_said(
    make_cfg: Callable,
    coco: Path,
    name: str,
    values: dict,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As COCO's own annotations have boxes without area."""
    path = coco / "annotations/instances_train2017.json"
    change(path, edit("annotations", **values))
    register_coco_folder(name, path, coco / "train2017")
    check_datasets(make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 2))
    assert f"{path}: {message}" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 50,
        b"{",
        b'\xef\xbb\xbf{"images": []}',
        '{"images": []}'.encode("utf-16"),
        b"[" * 200_000,
        b"[]",
        b"[1, 2]",
        b"3",
        b"PK\x03\x04\xff\xff",
        b'{"images": [], "annotations": [{"id": ' + b"9" * 5000 + b'}], "categories": []}',
    ],
)
def test_files_that_are_no_annotations(
    make_cfg: Callable, coco: Path, name: str, content: bytes
) -> None:
    path = coco / "annotations/instances_train2017.json"
    path.write_bytes(content)
    register_coco_folder(name, path, coco / "train2017")
    cfg = make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 2)
    with pytest.raises(DataError, match=rf"{path} (cannot be read as JSON|is not in COCO's)"):
        check_datasets(cfg)
    if b"\xef" not in content:  # a byte order mark is welcome there
        with pytest.raises(DataError, match=str(path)):
            read_annotations(path, coco / "train2017")


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [{}]}', '{"images": 3}', "{"])
def test_files_that_are_no_panoptic_annotations(coco: Path, name: str, content: str) -> None:
    path = coco / "annotations/panoptic_train2017.json"
    categories = json.loads(path.read_text())["categories"]
    register_panoptic_folder(
        name, path, coco / "train2017", coco / "panoptic_train2017", categories
    )
    path.write_text(content)
    with pytest.raises(DataError, match=str(path)):
        DatasetCatalog.get(name)


def test_semantic_maps_may_lie_in_folders_of_folders(
    make_cfg: Callable, tmp_path: Path, name: str
) -> None:
    """Other readers than detectron2's may find them there; a folder without any is refused."""
    DatasetCatalog.register(name, list)
    known = {"sem_seg_root": str(tmp_path), "stuff_classes": ["a"], "evaluator_type": "sem_seg"}
    MetadataCatalog.get(name).set(**known)
    cfg = make_cfg("DATASETS.TEST", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 1)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(DataError, match="holds no PNG file"):
        check_datasets(cfg)
    (tmp_path / "town").mkdir()
    check_datasets(cfg)


def test_missing_folders_name_the_path_and_the_variable(
    make_cfg: Callable, tmp_path: Path, name: str
) -> None:
    register_coco_folder(name, tmp_path / "none.json", tmp_path / "images")
    expected = rf"{tmp_path}/none.json does not exist.*DETECTRON2_DATASETS.*README"
    with pytest.raises(DataError, match=expected):
        check_datasets(make_cfg("DATASETS.TRAIN", (name,)))


def test_made_files_name_their_preparation(
    make_cfg: Callable, coco: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco.parent))
    categories = json.loads((coco / "annotations/panoptic_train2017.json").read_text())[
        "categories"
    ]
    register_panoptic_folder(
        name,
        coco / "annotations/panoptic_train2017.json",
        coco / "train2017",
        coco / "panoptic_train2017",
        categories,
        sem_seg_root=coco / "panoptic_semseg_train2017",
    )
    options = ("MODEL.MASK_DINO.NUM_CLASSES", 4)
    check_datasets(make_cfg("DATASETS.TRAIN", (name,), *options))  # evaluation alone needs maps
    with pytest.raises(DataError, match=rf"{coco.parent}.*maskdino prepare coco-semantic"):
        check_datasets(make_cfg("DATASETS.TEST", (name,), *options))
    semantic = ("INPUT.DATASET_MAPPER_NAME", "semantic")
    with pytest.raises(DataError, match=r"maskdino prepare coco-semantic"):
        check_datasets(make_cfg("DATASETS.TRAIN", (name,), *options, *semantic))
    with pytest.raises(DataError, match="has 4 classes.*NUM_CLASSES is 5"):
        check_datasets(make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 5))


def test_panoptic_annotations_without_image_or_category(coco: Path, name: str) -> None:
    path = coco / "annotations/panoptic_train2017.json"
    categories = json.loads(path.read_text())["categories"]
    register_panoptic_folder(
        name, path, coco / "train2017", coco / "panoptic_train2017", categories
    )
    change(path, lambda c: c["annotations"][0]["segments_info"][0].update(category_id=5))
    with pytest.raises(DataError, match=r"000000000001.png have the categories \[5\]"):
        DatasetCatalog.get(name)
    change(path, lambda c: c["annotations"][0].update(image_id=55))
    with pytest.raises(DataError, match="no image 55"):
        DatasetCatalog.get(name)


def test_names_packages_and_classes_are_checked(
    make_cfg: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="'nuclei_trian' .*did you mean nuclei_train.*--import"):
        check_datasets(make_cfg("DATASETS.TRAIN", ("nuclei_trian",)))
    with pytest.raises(DataError, match="has 1 class,.*NUM_CLASSES is 80"):
        check_datasets(
            make_cfg("DATASETS.TEST", ("nuclei_val",), "MODEL.MASK_DINO.NUM_CLASSES", 80)
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    panoptic = ("MODEL.MASK_DINO.TEST.PANOPTIC_ON", True)
    for key, dataset, packages, options in (
        ("TRAIN", "cityscapes_fine_instance_seg_train", "cityscapesscripts shapely", ()),
        ("TEST", "cityscapes_fine_panoptic_val", "cityscapesscripts panopticapi-lite", panoptic),
        ("TEST", "cityscapes_fine_sem_seg_val", "cityscapesscripts", ()),
        ("TEST", "coco_2017_val_panoptic", "panopticapi-lite", panoptic),
        ("TEST", "lvis_v1_val", "lvis", ()),
    ):
        with pytest.raises(DataError, match=f"{dataset}.*: pip install {packages}$"):
            check_datasets(make_cfg(f"DATASETS.{key}", (dataset,), *options))


@pytest.mark.parametrize(
    ("folder", "json_file", "images", "classes", "has_masks"),
    [
        ("coco_mini", "instances_val2017.json", "val2017", 80, True),
        ("bccd_boxes", "instances_test.json", "test", 3, False),
        ("fruits_nuts", "instances_val.json", "val", 3, True),
    ],
)
def test_real_datasets(
    make_cfg: Callable,
    shared: Callable,
    name: str,
    folder: str,
    json_file: str,
    images: str,
    classes: int,
    has_masks: bool,
) -> None:
    root = shared("data", folder)
    register_coco_folder(name, root / "annotations" / json_file, root / images)
    cfg = make_cfg("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", classes)
    if not has_masks:
        with pytest.raises(DataError, match=f"^no annotation of {re.escape(name)} has a mask"):
            check_datasets(cfg)
        cfg.MODEL.MASK_DINO.MASK_ON = False
    check_datasets(cfg)
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 1.0
    cfg.INPUT.LSJ.SIZE = [480, 640]
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = build_train_mapper(cfg)
    compared = 0
    for record in get_detection_dataset_dicts(name)[:12]:
        instances = mapper(record)["instances"]
        assert instances.has("gt_masks") == has_masks
        # At this size nothing is cropped: boxes are the annotated ones, scaled, to a pixel.
        scale = min(480 / record["height"], 640 / record["width"])
        kept = [a for a in record["annotations"] if not a["iscrowd"]]
        expected = np.array([a["bbox"] for a in kept]) * scale
        expected[:, 2:] += expected[:, :2]
        if len(instances) == len(kept):
            difference = np.abs(instances.gt_boxes.tensor.numpy() - expected)
            assert np.median(difference) < 1.0 and difference.max() < 4.0
            compared += 1
    assert compared >= 3


def test_real_panoptic_pair(make_cfg: Callable, shared: Callable, name: str) -> None:
    root = shared("data", "coco_panoptic_pair")
    path = root / "annotations" / "panoptic_val2017.json"
    categories = json.loads(path.read_text())["categories"]
    assert datasets.panoptic_metadata(categories)["stuff_dataset_id_to_contiguous_id"] == (
        MetadataCatalog.get("coco_2017_val_panoptic").stuff_dataset_id_to_contiguous_id
    )
    register_panoptic_folder(name, path, root / "val2017", path.with_suffix(""), categories)
    options = ("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 133)
    cfg = make_cfg(*options, "INPUT.DATASET_MAPPER_NAME", "panoptic", "INPUT.LSJ.ENABLED", False)
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.RANDOM_FLIP", "none"])
    mapper = build_train_mapper(cfg)
    for record in DatasetCatalog.get(name):
        instances = mapper(record)["instances"]
        segments = [s for s in record["segments_info"] if not s["iscrowd"]]
        areas = instances.gt_masks.to_bool().sum((1, 2)).tolist()
        assert areas == [s["area"] for s in segments]
        boxes = np.array([s["bbox"] for s in segments])
        boxes[:, 2:] += boxes[:, :2]
        assert (instances.gt_boxes.tensor.numpy() == boxes).all()
        things = [s["category_id"] < 80 for s in segments]
        assert instances.gt_is_thing.tolist() == things
