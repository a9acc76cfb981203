"""The examples of docs/examples: each part alone, and all of them through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Instances
from PIL import Image

from maskdino.backbones import build_backbone
from maskdino.config import load_config
from maskdino.integration import extensions
from maskdino.losses.criterion import BOX_LOSSES
from tests.helpers import CHANNELS, NARROW, drawn_instances

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
SMALL = {
    **{key: value for key, value in NARROW.items() if "BACKBONE" not in key},
    "MODEL.MASK_DINO.NUM_CLASSES": 1,
    "INPUT.LSJ.SIZE": [64, 64],
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": "(3,)",
    "SOLVER.WARMUP_ITERS": 1,
    "TEST.EVAL_PERIOD": 2,
}
SETTINGS = [str(word) for item in SMALL.items() for word in item]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images with bright rectangles."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, number in (("train", 4), ("val", 2)):
        rows = []
        for index in range(number):
            pixels = rng.integers(0, 60, (64, 80, 3), np.uint8)
            for x in (8, 44):
                pixels[20:40, x : x + 24] = 220
                rows.append(f"{part}{index}.png,{x},20,{x + 24},40")
            Image.fromarray(pixels).save(folder / f"{part}{index}.png")
        (folder / f"{part}.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, data: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports examples by name, as `--import` does, and forgets all that they registered."""
    monkeypatch.setenv("MY_DATA", str(data))
    monkeypatch.setenv(extensions.VARIABLE, "")
    monkeypatch.setattr(extensions, "_modules", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_config()  # what is registered with the first configuration stays
    registries = [getattr(extensions, n) for n in dir(extensions) if n.endswith("_REGISTRY")]
    tables = [registry._obj_map for registry in (*registries, META_ARCH_REGISTRY)]
    tables += [build_backbone.__globals__["BACKBONE_REGISTRY"]._obj_map, BOX_LOSSES]
    before, modules = [dict(table) for table in tables], set(sys.modules)
    yield lambda name: extensions.import_extension(EXAMPLES / f"{name}.py")
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    for name in {"my_train", "my_val"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_dataset_and_mapper(load: Callable[[str], ModuleType]) -> None:
    load("dataset")
    load("mapper")
    records = DatasetCatalog.get("my_train")
    assert [len(record["annotations"]) for record in records] == [2, 2, 2, 2]
    words = ["INPUT.DATASET_MAPPER_NAME", "GrayMapper", "INPUT.AUGMENTATIONS", "['tilted']"]
    cfg = load_config(None, [*SETTINGS, *words, "INPUT.TILT", "[0.0, 0.0]"])
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 1.0
    mapper = extensions.MAPPER_REGISTRY.find("GrayMapper")(cfg, is_train=True)
    example = mapper(records[0])
    image = example["image"]
    assert (image[0] == image[1]).all() and (image[0] == image[2]).all()
    assert len(example["instances"]) == 2
    # The masks lie where it is bright.
    for mask in example["instances"].gt_masks.to_bool():
        assert image[0][mask].float().mean() > 150


def test_evaluator(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    load("dataset")
    load("evaluator")
    evaluator = extensions.EVALUATOR_REGISTRY.find("counting")(
        load_config(), "my_val", str(tmp_path)
    )
    evaluator.reset()
    for record, scores in zip(DatasetCatalog.get("my_val"), ([0.9, 0.8, 0.1], [0.5]), strict=True):
        found = Instances((64, 80), scores=torch.tensor(scores))
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate() == {"counting": {"error": 0.5}}


def test_backbone(load: Callable[[str], ModuleType]) -> None:
    load("backbone")
    cfg = load_config(None, ["MODEL.BACKBONE.NAME", "PatchPyramid", *SETTINGS])
    features = build_backbone(cfg)(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(f.shape) for name, f in features.items()} == {
        f"res{i}": (1, CHANNELS, 64 // 2**i, 96 // 2**i) for i in (2, 3, 4, 5)
    }


def losses(name: str, *words: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(load_config(None, [*SETTINGS, "MODEL.META_ARCHITECTURE", name, *words]))
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    return model([{"image": image, "instances": drawn_instances((64, 64), 3, num_classes=1)}])


def test_loss(load: Callable[[str], ModuleType]) -> None:
    load("backbone")
    backbone = ("MODEL.BACKBONE.NAME", "PatchPyramid")
    plain = losses("MaskDINO", *backbone)
    module = load("loss")
    found = losses("MaskDINOWithCenters", *backbone)
    added = found.keys() - plain.keys()
    assert {"loss_center", "loss_center_layer1", "loss_center_denoising"} <= added
    assert all(name.startswith("loss_center") and found[name] > 0 for name in added)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    wanted = torch.tensor([[0.8, 0.9, 0.1, 0.1]])
    torch.testing.assert_close(module.center_loss(boxes, wanted), torch.tensor([0.5]))


def test_task(load: Callable[[str], ModuleType]) -> None:
    load("backbone")
    load("task")
    words = ["MODEL.BACKBONE.NAME", "PatchPyramid", "MODEL.META_ARCHITECTURE", "CountingMaskDINO"]
    model = build_model(load_config(None, [*SETTINGS, *words])).eval()
    with torch.no_grad():
        torch.nn.init.constant_(model.heads.class_head.bias, 3.0)  # sure of everything
        (result,) = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
    assert result["count"] == int((result["instances"].scores > 0.3).sum())


@pytest.mark.slow
def test_project_from_the_command_line(
    data: Path, tmp_path: Path, repository: Path, warm_python: str
) -> None:
    """Trains, resumes, evaluates and draws, in processes of their own."""
    environment = {**os.environ, "MY_DATA": str(data), "PYTHONPATH": str(repository)}
    environment.pop(extensions.VARIABLE, None)
    out = tmp_path / "out"

    def run(command: str, *words: object) -> subprocess.CompletedProcess[str]:
        line = [warm_python, "-m", "maskdino", *command.split(), *map(str, words)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    project = ("--import", EXAMPLES / "my_project.py")
    file = ("--config-file", EXAMPLES / "my_project.yaml")
    done = run("train --num-processes 2", *project, *file, *SETTINGS, "OUTPUT_DIR", out)
    assert done.returncode == 0, done.stderr
    history = json.loads((out / "best" / "history.json").read_text())
    assert [entry["iteration"] for entry in history] == [1, 3]
    assert history[0]["results"].keys() == {"counting"}
    assert (out / "best" / "model_best.pth").is_file()
    # What was written is read again, and tells what it needs.
    written = ("--config-file", out / "config.yaml")
    done = run("train", *written)
    assert done.returncode == 1
    assert f"made with --import {EXAMPLES / 'my_project.py'}" in done.stderr.splitlines()[-1]
    done = run("evaluate", *project, *written, "MODEL.WEIGHTS", out / "best" / "model_best.pth")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "inference" / "results.json").read_text())
    assert results == min(history, key=lambda e: e["results"]["counting"]["error"])["results"]
    drawn = tmp_path / "drawn"
    done = run("visualize data", *project, *written, "--output", drawn, "--num-images", 2)
    assert done.returncode == 0, done.stderr
    assert len(list(drawn.glob("*.png"))) == 2
