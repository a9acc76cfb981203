"""Pictures of data, predictions and attention: the command, and where the marks lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from maskdino.categories import Categories
from maskdino.cli import visualize
from maskdino.data import build_train_mapper
from maskdino.model import MaskDINO
from maskdino.visualization.ground_truth import ground_truth_of, ground_truth_of_example
from tests.catalogs import own_datasets
from tests.conftest import REPOSITORY
from tests.data.synthetic import box_xywh
from tests.helpers import tiny_cfg


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A narrow model for the nuclei, with random weights."""
    cfg = tiny_cfg(NUM_CLASSES=1)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("nuclei_train",), ("nuclei_val",)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    cfg.INPUT.LSJ.SIZE = [96, 128]
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": MaskDINO(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


def test_views_of_the_nuclei(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    common = ["--config-file", str(config), "--output", str(output), "--num-images", "2"]
    visualize.main(["data", *common])
    assert len(list(output.iterdir())) == 2
    visualize.main(["predictions", *common, "--confidence-threshold", "0", "--device", "cpu"])
    assert len(list(output.iterdir())) == 4
    files = [tmp_path / folder / "one.png" for folder in "ab"]  # one name
    for file, source in zip(
        files, (REPOSITORY / "datasets/nuclei/val").glob("*.png"), strict=False
    ):
        file.parent.mkdir()
        shutil.copy(source, file)
    visualize.main(["attention", *common, "--input", *map(str, files), "--num-queries", "1"])
    followed = sorted(output.glob("*_query*.png"))
    assert [path.name.rpartition("_")[0] for path in followed] == ["one_2", "one"]
    assert np.array(Image.open(followed[0])).std() > 10
    assert "2 figures in" in capsys.readouterr().out


def test_errors_are_sentences(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--config-file", str(config), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="dataset 'nowhere' is not registered; register it"):
        visualize.main(["predictions", *common, "--dataset", "nowhere"])
    with pytest.raises(SystemExit):
        visualize.main(["attention", *common, "--num-queries", "0"])
    assert "error: --num-queries 0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no configuration"):
        visualize.main(["data", "--config-file", "none.yaml", "--output", str(tmp_path)])


def test_images_of_the_dataset_are_not_drawn_over(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / f"{number}.png")
    with own_datasets():
        records = [{"file_name": str(folder / f"{n}.png")} for n in range(2)]
        DatasetCatalog.register("mine", lambda: records)
        words = ["predictions", "--config-file", str(config), "--dataset", "mine"]
        with pytest.raises(SystemExit, match=r"0.png is an input: choose another folder for --out"):
            visualize.main([*words, "--output", str(folder)])
    assert not np.array(Image.open(folder / "0.png")).any()


def colored(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that drawing changed."""
    return (before != after).any(2)


def test_ground_truth_marks_exactly_the_masks(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ring = np.zeros((20, 30), bool)
    ring[4:12, 6:18] = True
    ring[6:10, 9:15] = False
    flat = np.concatenate([[0], ring.ravel(order="F").astype(int), [0]])
    counts = np.diff([0, *np.flatnonzero(np.diff(flat)).tolist(), ring.size]).tolist()
    x, y, width, height = box_xywh(ring)
    annotation = {"bbox": [x, y, width, height], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    crowd = annotation | {"iscrowd": 1, "bbox": [0, 0, 30, 20]}
    record = {"file_name": str(tmp_path / "image.png"), "height": 20, "width": 30}
    forms = {"size": [20, 30], "counts": counts}
    record["annotations"] = [annotation | {"segmentation": forms}, crowd]
    truth = ground_truth_of(record, Categories(("ring",), (True,), (1,)))
    np.testing.assert_array_equal(truth.masks[0], ring)
    np.testing.assert_array_equal(colored(pixels, truth.draw("instance")), ring)
    assert truth.to_coco()[0]["segmentation"]["size"] == [20, 30]


@pytest.fixture
def pair(shared: Callable[..., Path]) -> tuple[dict, Categories]:
    """A photo with panoptic ground truth, as a dataset dict."""
    folder = shared("data", "coco_panoptic_pair")
    from maskdino.data.datasets import load_panoptic

    metadata = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    paths = {
        "panoptic_json": str(folder / "annotations" / "panoptic_val2017.json"),
        "image_root": str(folder / "val2017"),
        "panoptic_root": str(folder / "annotations" / "panoptic_val2017"),
    }
    known = {k: v for k, v in metadata.as_dict().items() if k != "sem_seg_root"}
    record = load_panoptic(known | paths)[0]
    return record, Categories.from_metadata(metadata, 133)


def mapper_cfg(name: str, dataset: str, num_classes: int) -> CfgNode:
    cfg = tiny_cfg(NUM_CLASSES=num_classes)
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.FORMAT, cfg.INPUT.LSJ.SIZE = name, "RGB", [160, 200]
    return cfg


def test_panoptic_ground_truth_before_and_after_augmentation(
    pair: tuple[dict, Categories],
) -> None:
    record, categories = pair
    truth = ground_truth_of(record, categories)
    assert truth.tasks == ("panoptic",)
    kept = [s for s in record["segments_info"] if not s["iscrowd"]]
    assert len(truth.segments) == len(kept) < len(record["segments_info"])
    names = {categories.names[s["category_id"]] for s in kept}
    assert names == {entry["category_name"] for entry in truth.to_coco()}
    marked = colored(truth.image, truth.draw("panoptic", max_labels=0))
    assert marked[truth.panoptic_ids > 0].mean() > 0.95
    assert not marked[truth.panoptic_ids == 0].any()

    cfg = mapper_cfg("panoptic", "coco_2017_val_panoptic_with_sem_seg", 133)
    seen = ground_truth_of_example(build_train_mapper(cfg)(record), categories, "RGB")
    assert seen.size == (160, 200)
    assert 0 < len(seen) <= len(truth.segments)
    stuff = [r for r in seen.regions("instance") if r.box is None]
    things = [label for label in seen.class_ids if categories.is_thing[label]]
    assert len(stuff) == len(seen) - len(things)  # stuff has no box


def test_semantic_ground_truth_after_augmentation(tmp_path: Path) -> None:
    labels = np.zeros((60, 80), np.uint8)
    labels[:, 40:] = 1
    labels[:10] = 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "image.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": 60,
        "width": 80,
    }
    categories = Categories.from_metadata(MetadataCatalog.get("nuclei_sem_seg_train"), 2)
    truth = ground_truth_of(record, categories)
    marked = colored(truth.image, truth.draw("semantic", max_labels=0))
    np.testing.assert_array_equal(marked, labels != 255)
    cfg = mapper_cfg("semantic", "nuclei_sem_seg_train", 2)
    seen = ground_truth_of_example(build_train_mapper(cfg)(record), categories, "RGB")
    assert set(seen.class_ids) <= {0, 1}
    assert all(region.box is not None for region in seen.regions("instance"))  # it is trained
