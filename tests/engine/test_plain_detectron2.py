"""Mask DINO in trainers of others: the script of the README, and the keys that differ."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.engine.hooks import BestCheckpointer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from torch import nn

import maskdino
from maskdino.config import load_config
from maskdino.data import register_coco_folder
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.evaluation.coco import COCOInstanceEvaluator
from maskdino.postprocess.options import InferenceOptions
from tests.custom.drawn import write_drawn
from tests.engine.stand_in import read_checkpoint, tiny_config
from tests.helpers import NARROW, tiny_cfg, tiny_model

NAME = "drawn_plain"
SETTINGS = {
    "DATASETS.TRAIN": (NAME,),
    "DATASETS.TEST": (NAME,),
    "MODEL.DEVICE": "cuda",
    "MODEL.MASK_DINO.NUM_CLASSES": 2,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.RANDOM_FLIP": "dihedral",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
}


@pytest.fixture(params=["polygons", "run lengths"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict]:
    """The annotations of a registered dataset of four images."""
    drawn = write_drawn(tmp_path / "drawn", 4)
    drawn.content["info"] = {}  # which detectron2's evaluator wants
    for number, annotation in enumerate(drawn.content["annotations"], start=1):
        annotation["id"] = number  # it counts an object of id 0 as never found
    if request.param == "run lengths":
        sizes = {
            image["id"]: (image["height"], image["width"]) for image in drawn.content["images"]
        }
        for annotation in drawn.content["annotations"]:
            size = sizes[annotation["image_id"]]
            (rle,) = mask_util.frPyObjects(annotation["segmentation"], *size)
            annotation["segmentation"] = {"size": list(size), "counts": rle["counts"].decode()}
    drawn.write()
    register_coco_folder(NAME, drawn.json_file, drawn.images)
    DatasetCatalog.get(NAME)  # fills in the map of category ids
    return drawn.content["annotations"]


def test_script_trains_and_evaluates_as_it_is_printed(
    repository: Path,
    tmp_path: Path,
    dataset: list[dict],  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = {**NARROW, **SETTINGS, "OUTPUT_DIR": tmp_path / "out"}
    words = [str(word) for item in values.items() for word in item]
    config = repository / "configs" / "coco" / "instance" / "maskdino_R50.yaml"
    script = repository / "tools" / "train_plain_detectron2.py"
    monkeypatch.setattr(sys, "argv", [script.name, str(config), *words])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out" / "model_final.pth").is_file()
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    logged = {key: value for line in lines for key, value in json.loads(line).items()}
    assert {"total_loss", "bbox/AP", "segm/AP"} <= logged.keys()
    assert logged["loss_mask_dice"] > 0.1


def test_detectron2s_evaluator_as_plain_users_call_it_gives_our_numbers(
    dataset: list[dict], tmp_path: Path
) -> None:
    ours = COCOInstanceEvaluator(NAME, str(tmp_path / "ours"), with_masks=True, fast=False)
    theirs = COCOEvaluator(NAME, output_dir=str(tmp_path / "theirs"))
    classes = MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id
    for evaluator in (ours, theirs):
        evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        found = [a for a in dataset if a["image_id"] == record["image_id"]]
        size = (record["height"], record["width"])
        masks = [mask_util.decode(rle(a["segmentation"], size)) for a in found]
        result = Instances(size)
        result.pred_classes = torch.tensor([classes[a["category_id"]] for a in found])
        result.scores = torch.linspace(0.9, 0.2, len(found))
        shifted = torch.from_numpy(np.roll(np.stack(masks), 2, axis=2).astype(bool))
        result.pred_masks = shifted
        x, y, w, h = torch.tensor([a["bbox"] for a in found]).T
        result.pred_boxes = Boxes(torch.stack([x + 2, y, x + w + 2, y + h], dim=1))
        for evaluator in (ours, theirs):
            evaluator.process([{"image_id": record["image_id"]}], [{"instances": result}])
    expected, results = ours.evaluate(), theirs.evaluate()
    assert 0 < expected["segm"]["AP"] < 100
    for task in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75"):
            assert results[task][name] == pytest.approx(expected[task][name], abs=1e-9)


def rle(segmentation: list | dict, size: tuple[int, int]) -> dict:
    if isinstance(segmentation, list):
        (segmentation,) = mask_util.frPyObjects(segmentation, *size)
    return segmentation


def wide_cfg(repository: Path, *overrides: object) -> CfgNode:
    path = repository / "configs" / "coco" / "instance" / "maskdino_R50.yaml"
    return load_config(str(path), ["MODEL.DEVICE", "cpu", *overrides])


def test_values_of_our_own_trainer_end_in_a_line_that_names_the_key(repository: Path) -> None:
    cfg = wide_cfg(repository, "INPUT.RANDOM_FLIP", "dihedral")
    with pytest.raises(ValueError, match=r"^SOLVER\.CLIP_GRADIENTS\.CLIP_TYPE is 'full_model'"):
        build_optimizer(cfg, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^INPUT\.RANDOM_FLIP is 'dihedral'.*adapt_to_detectron2"):
        DatasetMapper(cfg, is_train=True)
    with pytest.raises(ValueError, match=r"^SOLVER\.AMP\.ENABLED is True.*adapt_to_detectron2"):
        maskdino.build_optimizer(cfg, nn.Linear(2, 2))
    DatasetMapper(cfg, is_train=False)
    maskdino.adapt_to_detectron2(cfg)
    assert DatasetMapper(cfg, is_train=True).instance_mask_format == "bitmask"


@pytest.mark.parametrize(("gpu", "masks"), [(True, True), (False, True), (False, False)])
def test_keys_are_adapted_and_named(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpu: bool,
    masks: bool,
) -> None:
    cfg = wide_cfg(repository, "MODEL.DEVICE", "cuda", "MODEL.MASK_DINO.MASK_ON", masks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    maskdino.adapt_to_detectron2(cfg)
    assert ("cuda" if gpu else "cpu") == cfg.MODEL.DEVICE
    assert gpu == cfg.SOLVER.AMP.ENABLED
    assert masks == cfg.MODEL.MASK_ON
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    (line,) = [text for text in caplog.messages if text.startswith("Changed for detectron2")]
    assert ("MODEL.DEVICE cpu" in line) == ("SOLVER.AMP.ENABLED False" in line) == (not gpu)
    caplog.clear()
    maskdino.adapt_to_detectron2(cfg)
    assert not any(text.startswith("Changed") for text in caplog.messages)


@pytest.mark.parametrize("amp", [False, True])
def test_optimizer_for_any_trainer_clips_the_whole_gradient(amp: bool) -> None:
    cfg = tiny_cfg()
    cfg.merge_from_list(
        ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
        + ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.AMP.ENABLED", amp]
        + ["MODEL.DEVICE", "cuda"]
    )
    model = tiny_model()
    optimizer = maskdino.build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=amp)
    trained = [p for p in model.parameters() if p.requires_grad]
    scaler.scale(sum(3 * p.sum() for p in trained)).backward()
    scaler.step(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
    assert type(optimizer) is torch.optim.AdamW


def test_short_files_after_new_keys_were_allowed_make_a_model(repository: Path) -> None:
    """As SAHI does, which knows nothing of our keys."""
    path = repository / "configs" / "coco" / "instance" / "maskdino_tiny.yaml"
    cfg = get_cfg()
    cfg.set_new_allowed(True)
    cfg.merge_from_file(str(path))
    assert "PIXEL_EMBEDDING" not in cfg.MODEL.MASK_DINO
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    before = cfg.dump()
    torch.manual_seed(0)
    results = DefaultPredictor(cfg)(np.zeros((64, 80, 3), np.uint8))
    assert len(results["instances"]) > 0
    assert cfg.dump() == before
    torch.manual_seed(0)
    expected = build_model(load_config(str(path), ["MODEL.DEVICE", "cpu"]))
    torch.manual_seed(0)
    found = build_model(cfg).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [(0.0, None, 0.0), (0.0, 0.5, 0.5), (0.3, 0.5, 0.3)],
)
def test_score_threshold_of_detectron2s_demo(
    own: float, theirs: float | None, expected: float
) -> None:
    cfg = tiny_cfg(TEST__SCORE_THRESHOLD=own)
    if theirs is not None:  # demo.py --confidence-threshold sets it
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = theirs
    assert InferenceOptions.from_config(cfg).score_threshold == expected


def test_best_checkpointer_of_detectron2_works_with_our_trainer(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "TEST.EVAL_PERIOD", 2, "DATASETS.TEST", ("nuclei_val",))
    trainer = MaskDINOTrainer(cfg)
    trainer.register_hooks([BestCheckpointer(2, trainer.checkpointer, "bbox/AP", "max", "best")])
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = read_checkpoint(tmp_path, "best.pth")
    assert saved["model"].keys() == trainer.checkpointer.model.state_dict().keys()
    assert 0 < saved["iteration"] < cfg.SOLVER.MAX_ITER
