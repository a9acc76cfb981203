"""The loss of each image: that of training, the same each time; wrong labels come first."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from maskdino.cli import report
from maskdino.data import register_coco_folder
from maskdino.data.mappers import InstanceMapper
from maskdino.evaluation.image_losses import SEED, ImageLoss, image_losses
from maskdino.evaluation.report import write_report
from maskdino.model import MaskDINO
from maskdino.modeling.query_selection import UnifiedQuerySelection
from maskdino.structures import Predictions
from maskdino.targets import prepare_targets
from tests.custom.drawn import write_drawn
from tests.engine.stand_in import CONFIG
from tests.evaluation import test_report_images
from tests.helpers import CHANNELS, NUM_CLASSES, tiny_cfg

NAME = "drawn_losses"
QUERIES = 12


@pytest.fixture
def labels(tmp_path: Path) -> Callable[[Callable[[dict], None]], None]:
    """Registers six images under NAME anew, after a change of their annotations (by image id)."""

    def register(change: Callable[[dict], None]) -> None:
        forget()
        drawn = write_drawn(tmp_path / str(len(list(tmp_path.iterdir()))))
        of_image = {image["id"]: [] for image in drawn.content["images"]}
        for annotation in drawn.content["annotations"]:
            of_image[annotation["image_id"]].append(annotation)
        change(of_image)
        drawn.content["annotations"] = [a for found in of_image.values() for a in found]
        drawn.write()
        register_coco_folder(NAME, drawn.json_file, drawn.images)

    return register


def forget() -> None:
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def cfg_of(mapper: str = "instance", **overrides: object) -> CfgNode:
    cfg = tiny_cfg(**overrides)
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.MIN_SIZE_TEST = mapper, 64
    return cfg


class Fitted:
    """Mask DINO's losses of predictions that are the labels of `NAME` as they are at first."""

    device = torch.device("cpu")

    def __init__(self, cfg: CfgNode) -> None:
        self.model, mapper = MaskDINO(cfg).eval(), InstanceMapper(cfg, is_train=False)
        self.truth = {
            Path(record["file_name"]).name: mapper(record)["instances"]
            for record in DatasetCatalog.get(NAME)
        }

    def matched_losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        truth = self.truth[Path(batched_inputs[0]["file_name"]).name]

        def predict(images: Tensor) -> tuple[Predictions, Tensor]:
            canvas, count = images.shape[-2:], len(truth)
            targets = prepare_targets([truth], canvas, self.model.is_thing, self.device)
            logits = torch.full((1, QUERIES, NUM_CLASSES), -4.0)
            logits[0, torch.arange(count), targets.labels] = 4.0
            boxes = torch.full((1, QUERIES, 4), 0.5)
            boxes[0, :count] = targets.boxes
            pixels = torch.zeros(1, CHANNELS, *canvas)
            pixels[0, :count] = 16 * targets.masks.to_bool().float() - 8
            return Predictions(logits, boxes, torch.eye(QUERIES, CHANNELS)[None]), pixels

        self.model.predict = predict
        return self.model.matched_losses(batched_inputs)


def spoil(of_image: dict) -> None:
    """A wrong class in image 1, a mask that lies elsewhere in image 3, one less in image 4."""
    of_image[1][0]["category_id"] = {70: 3, 3: 70}[of_image[1][0]["category_id"]]
    polygon = np.array(of_image[3][0]["segmentation"][0]).reshape(-1, 2)
    moved = np.where(polygon.mean(0) < [32, 24], polygon + [20, 12], polygon - [20, 12])
    of_image[3][0]["segmentation"] = [moved.clip(0, [64, 48]).ravel().tolist()]
    of_image[4].pop(0)


def test_wrong_labels_come_first(labels: Callable) -> None:
    labels(lambda _: None)
    cfg = cfg_of()
    model = Fitted(cfg)
    right = image_losses(cfg, model, NAME)
    assert max(loss.total for loss in right) < 1.5
    labels(spoil)
    found = image_losses(cfg, model, NAME)
    assert {loss.name for loss in found[:3]} == {f"scene_{i}.png" for i in (1, 3, 4)}
    assert found[2].total > 4 * found[3].total
    by_name = {loss.name: loss for loss in found}
    shares = [by_name[f"scene_{i}.png"].shares for i in (1, 3, 4)]
    assert [sum(share.values()) for share in shares] == pytest.approx([100] * 3)
    assert shares[0]["class"] > 80
    assert shares[1]["class"] < 10
    assert shares[2]["class"] > 80


def test_losses_are_those_of_training(labels: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    labels(lambda _: None)
    cfg = cfg_of(DENOISING__MODE="off", LOSS__DEEP_SUPERVISION=False)
    model = MaskDINO(cfg).eval()
    found = image_losses(cfg, model, NAME)
    assert found == image_losses(cfg, model, NAME)
    select = UnifiedQuerySelection.forward
    monkeypatch.setattr(
        UnifiedQuerySelection, "forward", lambda *words: (select(*words)[0], None)
    )  # nothing is drawn for the encoder's own predictions
    example = InstanceMapper(cfg, is_train=False)(found[0].record)
    torch.manual_seed(SEED)
    expected = model.train()([example])
    assert found[0].terms == {k.removeprefix("loss_"): v.item() for k, v in expected.items()}
    assert found[0].objects == len(example["instances"])
    assert [loss.total for loss in found] == sorted((loss.total for loss in found), reverse=True)


def test_an_image_has_its_loss_whatever_images_there_are(labels: Callable) -> None:
    labels(lambda _: None)
    model = MaskDINO(cfg := cfg_of()).eval()
    state = torch.get_rng_state()
    all_losses = {loss.name: loss.terms for loss in image_losses(cfg, model, NAME)}
    assert torch.equal(torch.get_rng_state(), state)
    records = DatasetCatalog.get(NAME)[3:4]
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records)
    (alone,) = image_losses(cfg, model, NAME)
    assert alone.terms == all_losses["scene_3.png"]


def test_what_is_not_a_number_comes_first(labels: Callable) -> None:
    class Broken:
        device = torch.device("cpu")

        def matched_losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
            bad = "scene_2" in batched_inputs[0]["file_name"]
            return {"loss_class": torch.tensor(torch.nan if bad else 1.0)}

    labels(lambda _: None)
    found = image_losses(cfg_of(), Broken(), NAME)
    assert [loss.name for loss in found][:2] == ["scene_2.png", "scene_0.png"]


@pytest.mark.parametrize("mapper", ["panoptic", "semantic"])
def test_labels_of_other_tasks(mapper: str, tmp_path: Path) -> None:
    test_report_images.register(tmp_path)
    cfg = cfg_of(mapper, NUM_CLASSES=4)
    found = image_losses(cfg, MaskDINO(cfg).eval(), test_report_images.NAME)
    assert [Path(loss.record["file_name"]).stem for loss in found] != []
    kinds = [[shape.name for shape, _ in scene.visible()] for scene in test_report_images.SCENES]
    expected = [len(kind if mapper == "panoptic" else set(kind)) for kind in kinds]
    assert sorted(loss.objects for loss in found) == sorted(expected)
    assert all(0 < loss.total < 1e3 for loss in found)


def test_page_and_file(tmp_path: Path) -> None:
    (tmp_path / "inference" / "some").mkdir(parents=True)
    (tmp_path / "inference" / "results.json").write_text('{"bbox": {"AP": 1.0}}')
    losses = [
        ImageLoss({"file_name": f"/in/<{i}>.png"}, i, {"class": 1.5 / (1 + i), "mask_bce": 0.5})
        for i in range(30)
    ]
    page = write_report(tmp_path / "r.html", "some", tmp_path, losses_of=lambda _: losses)
    part = page.read_text().partition("Images: loss")[2]
    rows = re.findall(r"<tr><td>&lt;(\d+)&gt;\.png</td><td>(\d+)</td><td>([\d.]+)</td>", part)
    assert rows[:2] == [("0", "0", "2"), ("1", "1", "1.25")]
    assert len(rows) == 20
    assert "<td>75.0</td><td>25.0</td>" in part and "<th>mask bce (%)</th>" in part
    assert "median of 30 images is 0.597" in part
    with (tmp_path / "inference" / "some" / "losses.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 30
    first = {"file_name": "/in/<0>.png", "objects": "0", "loss": "2"}
    assert lines[0] == {**first, "class": "1.5", "mask_bce": "0.5"}
    page = write_report(tmp_path / "r.html", "some", tmp_path)
    assert "Images: loss" not in page.read_text()


def command(folder: Path, **overrides: object) -> list[str]:
    values = {"OUTPUT_DIR": folder, "DATASETS.TEST": f"('{NAME}',)", **overrides}
    words = [str(word) for item in values.items() for word in item]
    return ["--weights", str(folder / "w.pth"), "--opts", *words]


def test_command_runs_the_model(
    labels: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labels(lambda _: None)
    folder = tmp_path / "out"
    (folder / "inference" / NAME).mkdir(parents=True)
    found = [
        {"image_id": i, "category_id": 3, "bbox": [1, 1, 9, 9], "score": 0.9} for i in range(6)
    ]
    (folder / "inference" / NAME / "coco_instances_results.json").write_text(json.dumps(found))
    model = MaskDINO(cfg := cfg_of())
    torch.save({"model": model.state_dict()}, folder / "w.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    config = ["--config-file", str(folder / "config.yaml"), "--num-images", "2"]
    with pytest.raises(SystemExit, match="evaluate first"):
        report.main([*config, *command(folder)])
    assert "losses of" not in capsys.readouterr().err  # which might take hours
    (folder / "inference" / "results.json").write_text('{"bbox": {"AP": 1.0}}')
    report.main([*config, *command(folder)])
    part = (folder / "report.html").read_text().partition("Images: loss")[2]
    expected = image_losses(cfg, model.eval(), NAME)
    captions = re.findall(r"<figcaption>(\S+): loss ([\d.]+)</figcaption>", part)
    assert captions == [(loss.name, f"{loss.total:.3g}") for loss in expected[:2]]
    assert part.count("data:image/jpeg") == 2
    assert (folder / "inference" / NAME / "losses.csv").is_file()


def test_command_refuses_other_models(tmp_path: Path) -> None:
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "w.pth")
    overrides = {"MODEL.META_ARCHITECTURE": "StandIn", "MODEL.DEVICE": "cpu"}
    words = ["--config-file", str(CONFIG), *command(tmp_path, **overrides)]
    with pytest.raises(SystemExit, match="losses of images are Mask DINO's, not StandIn's"):
        report.main(words)
