"""Cityscapes with its own scripts: the ground truth, given as the prediction, scores 100.

Runs where cityscapesscripts and shapely are installed, under each release of detectron2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_util

from maskdino.cli.prepare import cityscapes as preparation
from maskdino.config import load_config
from maskdino.data import build_train_mapper, check_datasets
from maskdino.data.reading import ids_of_colors
from maskdino.evaluation.build import build_evaluator
from tests.data.synthetic import make_scenes, write_cityscapes

pytest.importorskip("cityscapesscripts", reason="needs cityscapesscripts")
pytest.importorskip("shapely", reason="needs shapely")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Drawn frames of two cities, prepared, under detectron2's own names."""
    root = tmp_path_factory.mktemp("datasets")
    scenes = make_scenes(5, (96, 192), 6)
    folder = write_cityscapes(root, {"train": scenes[:2], "val": scenes[2:]})
    for city in list(folder.glob("*/val/aachen")):
        (city.parent / "bremen").mkdir()
        for path in list(city.glob("*_000002_*")):
            path.rename(city.parent / "bremen" / path.name.replace("aachen", "bremen"))
    preparation.main.__wrapped__(["--root", str(root), "--workers", "1"])
    names = [name for name in DatasetCatalog.list() if name.startswith("cityscapes_")]
    loaders = {name: DatasetCatalog.pop(name) for name in names}
    metadata = {name: MetadataCatalog.pop(name) for name in names}
    builtin.register_all_cityscapes(str(root))
    builtin.register_all_cityscapes_panoptic(str(root))
    yield folder
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
        DatasetCatalog.register(name, loaders[name])
        MetadataCatalog.get(name).set(**metadata[name].as_dict())


def configuration(repository: Path, name: str, output: Path) -> CfgNode:
    cfg = load_config(str(repository / "configs" / "cityscapes" / f"{name}.yaml"))
    cfg.merge_from_list(["OUTPUT_DIR", str(output), "DATALOADER.NUM_WORKERS", 0])
    return cfg


def true_results(record: dict, cfg: CfgNode, folder: Path) -> dict:
    """What a model that knows the ground truth of `record` predicts for its tasks."""
    image = Path(record["file_name"])
    stem = image.name.replace("_leftImg8bit.png", "_gtFine_")
    truth = folder / "gtFine" / "val" / image.parent.name
    labels = torch.from_numpy(np.array(Image.open(truth / f"{stem}labelTrainIds.png"))).long()
    results: dict = {"sem_seg": torch.stack([labels == i for i in range(19)]).float()}
    (instances,) = (
        entry
        for entry in load_cityscapes_instances(
            str(folder / "leftImg8bit" / "val"), str(truth.parent), False, to_polygons=False
        )
        if entry["file_name"] == record["file_name"]
    )
    annotations = instances["annotations"]
    masks = [mask_util.decode(a["segmentation"]) for a in annotations]
    # The instance dataset knows 8 classes, the panoptic one all 19, of which these are the last.
    offset = len(MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes) - 8
    predicted = Instances(tuple(labels.shape))
    predicted.pred_masks = torch.from_numpy(np.stack(masks)).bool()
    predicted.pred_classes = torch.tensor([a["category_id"] + offset for a in annotations])
    predicted.scores = torch.ones(len(annotations))
    results["instances"] = predicted
    if "segments_info" in record:
        ids = torch.from_numpy(ids_of_colors(np.array(Image.open(record["pan_seg_file_name"]))))
        segments = copy.deepcopy(record["segments_info"])
        things = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_dataset_id_to_contiguous_id
        for segment in segments:
            segment["isthing"] = segment["category_id"] in things.values()
        results["panoptic_seg"] = (ids, segments)
    return results


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("instance/maskdino_R50", {"segm"}),
        ("semantic/maskdino_R50", {"sem_seg"}),
        ("semantic/maskdino_R50_query_selection", {"sem_seg"}),
        ("panoptic/maskdino_R50", {"panoptic_seg", "segm", "sem_seg"}),
    ],
)
def test_ground_truth_scores_100(
    folder: Path,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    expected: set[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = configuration(repository, name, tmp_path)
    check_datasets(cfg)
    evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    assert len(records) == 3
    for record in records:
        evaluator.process([record], [true_results(record, cfg, folder)])
    results = evaluator.evaluate()
    assert results.keys() == expected
    values = {
        f"{task}/{metric}": value
        for task, of_task in results.items()
        for metric, value in of_task.items()
        if not math.isnan(value)
    }
    assert len(values) >= 2
    assert values == {metric: pytest.approx(100) for metric in values}
    assert [path.name for path in tmp_path.iterdir() if path.name != "inference"] == []


@pytest.mark.parametrize("name", ["instance", "semantic", "panoptic"])
@pytest.mark.usefixtures("folder")
def test_frames_are_read_for_training(repository: Path, tmp_path: Path, name: str) -> None:
    cfg = configuration(repository, f"{name}/maskdino_R50", tmp_path)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP.SIZE = [256], [256, 512]  # whole frames
    mapper = build_train_mapper(cfg)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert len(records) == 2
    for record in records:
        instances = mapper(record)["instances"]
        assert len(instances)
        assert instances.gt_classes.max() < cfg.MODEL.MASK_DINO.NUM_CLASSES
