"""Tests of tools/train_custom.py: the whole command, on drawn data."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from maskdino.cli import analyze, report, train, train_custom, visualize
from maskdino.config import load_config
from maskdino.data.reading import colors_of_ids
from maskdino.engine.best_checkpoint import History
from maskdino.inference.predictor import MaskDINOPredictor
from tests.custom.drawn import Drawn, write_drawn
from tests.helpers import NARROW

STRIPES = ("sky", "grass", "ball")


def words(drawn: Drawn, output: Path, *more: object) -> list[str]:
    """A command that needs no measurement, with a narrow model."""
    config = drawn.json_file.parent / "narrow.yaml"
    if not config.exists():
        cfg = load_config(None, [word for item in NARROW.items() for word in item])
        config.write_text(cfg.dump())
    command = ["--train-json", drawn.json_file, "--train-images", drawn.images]
    command += ["--config-file", config, "--output", output, "--epochs", 2, "--batch-size", 2]
    command += ["--image-size", 64, "--num-pictures", 2, *more]
    return [str(word) for word in command]


def test_from_files_to_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, out = write_drawn(tmp_path / "drawn"), tmp_path / "out"
    train_custom.main(words(drawn, out))
    printed = capsys.readouterr().out
    assert printed.startswith("Reading the data ...\n")
    assert "5 to train on, 1 to validate on (set aside by a hash of the file names)" in printed
    assert "masks AP75" in printed
    for name in ("all", "person", "car"):
        assert any(line.startswith(name) for line in printed.splitlines())
    cfg = load_config(str(out / "config.yaml"))
    assert (cfg.MODEL.MASK_DINO.NUM_CLASSES, cfg.MODEL.MASK_DINO.MASK_ON) == (2, True)
    assert cfg.MODEL.MASK_DINO.CLASS_NAMES == ["car", "person"]  # in the order of their ids, 3, 70
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD) == (6, 3)
    assert len(list((out / "predictions").glob("*.png"))) == 1
    assert (out / "best" / "model_best.pth").is_file()
    history = History.read(out / "best" / "history.json", "segm/AP")
    assert [entry.iteration for entry in history.evaluations] == [2, 5]
    assert "AP-person" in history.best.results["segm"]
    # Annotations are numbered from 1, categories keep their ids.
    content = json.loads((out / "data" / "custom_train.json").read_text())
    assert {category["id"] for category in content["categories"]} == {3, 70}
    assert min(annotation["id"] for annotation in content["annotations"]) == 1

    check_other_commands(out, capsys)
    # Whoever loads the model elsewhere, where the data are unknown, still sees the names.
    forget()
    elsewhere = shutil.copy(out / "config.yaml", tmp_path)
    predictor = MaskDINOPredictor.from_config(elsewhere, out / "best" / "model_best.pth")
    assert predictor.categories.names == ("car", "person")

    with pytest.raises(SystemExit, match="holds a run: go on with --resume"):
        train_custom.main(words(drawn, out))
    later = ["--output", out, "--resume", "--num-pictures", 0, "--epochs", 9, "SOLVER.MAX_ITER", 9]
    train_custom.main([str(word) for word in later])
    again = capsys.readouterr().out
    assert "to use it: maskdino predict --config-file" in printed.splitlines()[-1]
    assert printed.splitlines()[-2] in again
    assert "Not used, since the plan is made: --epochs SOLVER.MAX_ITER 9\n" in again


def test_after_a_short_training_as_many_objects_are_shown_as_there_are(tmp_path: Path) -> None:
    drawn, out = write_drawn(tmp_path / "drawn"), tmp_path / "out"
    run = train_custom.prepare(train_custom.parse_arguments(words(drawn, out)))
    assert min(0.5, run.lowest_shown()) == 0.5  # nothing is known
    validation = json.loads((out / "data" / "custom_val.json").read_text())
    number = len(validation["annotations"])
    assert number > 1
    found = out / "inference" / "custom_val" / "coco_instances_results.json"
    found.parent.mkdir(parents=True)
    for scores, threshold in (
        ([0.1, 0.9] + (number - 1) * [0.377], 0.37),
        (3 * number * [0.9], 0.5),
        ([0.2], 0.2),
        ([], 0.5),
    ):
        found.write_text(json.dumps([{"score": score} for score in scores]))
        assert min(0.5, run.lowest_shown()) == threshold


def forget() -> None:
    """As in a process that has just begun."""
    for name in ("custom_train", "custom_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def check_other_commands(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever reads the configuration of a run knows its data."""
    config, weights = str(out / "config.yaml"), str(out / "best" / "model_best.pth")
    planned = Path(config).read_text()
    again, drawn = out / "again", str(out / "drawn")
    overrides = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR"]
    folder = ["--output", drawn, "--num-images", "1"]
    for command, of, more in (
        (train, config, ["--eval-only", *overrides, str(again)]),
        (report, str(again / "config.yaml"), []),  # the folder of an evaluation, which knows them
        (train, config, ["--eval-only", *overrides, str(out), "TEST.DETECTIONS_PER_IMAGE", "3"]),
        (train, config, ["--eval-only", *overrides, drawn, "DATASETS.TRAIN", "('elsewhere',)"]),
        (analyze, config, ["--dataset", "custom_val"]),
        (visualize, config, [*folder]),
        (visualize, config, ["--weights", weights, *folder]),
    ):
        forget()
        view = [] if command is not visualize else ["predictions" if weights in more else "data"]
        command.main([*view, "--config-file", of, *more])
    printed = capsys.readouterr().out
    assert "Mean over 1 image of custom_val" in printed
    assert printed.count(f"1 figure in {drawn}") == 2
    assert (again / "report.html").is_file()
    # An evaluation in the folder of the run leaves the training's configuration alone.
    assert Path(config).read_text() == planned
    assert load_config(str(out / "evaluation.yaml")).TEST.DETECTIONS_PER_IMAGE == 3


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (analyze, ["--dataset", "custom_val"]),
        (report, ["--dataset", "custom_val"]),
        (visualize, ["data"]),
        (visualize, ["predictions", "--dataset", "custom_val"]),
        (visualize, ["attention"]),
    ],
)
def test_commands_that_do_not_know_the_data_say_what_to_give(
    tmp_path: Path, command: ModuleType, more: list[str]
) -> None:
    """As with the configuration of a run in another folder."""
    forget()
    names = {f"DATASETS.{x}": f"('custom_{x.lower()}',)" for x in ("TRAIN", "VAL")}
    names["DATASETS.TEST"] = names.pop("DATASETS.VAL")
    cfg = load_config(None, [word for item in names.items() for word in item])
    cfg.OUTPUT_DIR = str(tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    left = tmp_path / "inference" / "custom_val"
    left.mkdir(parents=True)
    (left.parent / "results.json").write_text('{"bbox": {"AP": 3.0}}')
    (left / "coco_instances_results.json").write_text("[]")
    output = ["--output", str(tmp_path / "drawn")] if command is visualize else []
    with pytest.raises(SystemExit, match=r"^error: dataset 'custom_.*give the config\.yaml in"):
        command.main([*more, "--config-file", str(tmp_path / "config.yaml"), *output])


def test_boxes_only_and_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_drawn(tmp_path / "train", 4, masks=False)
    val = write_drawn(tmp_path / "val", 2, masks=False, seed=1)
    val.content["categories"].reverse()  # their order in the file must not matter
    val.write()
    more = ["--val-json", val.json_file, "--val-images", val.images, "--num-pictures", 0]
    overrides = ["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()"]
    train_custom.main(words(train, tmp_path / "out", *more, *overrides))
    printed = capsys.readouterr().out
    assert "4 to train on, 2 to validate on\n" in printed
    assert "boxes AP" in printed
    assert "masks AP" not in printed
    cfg = load_config(str(tmp_path / "out" / "config.yaml"))
    assert not cfg.MODEL.MASK_DINO.MASK_ON
    assert cfg.SOLVER.MAX_ITER == 1
    weights = torch.load(tmp_path / "out" / "best" / "model_best.pth", weights_only=True)["model"]
    assert not any("mask" in name for name in weights)


def write_stripes(root: Path, task: str) -> None:
    """Six images of grass below sky with a red ball, in the format of the task."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(6):
        labels = np.zeros((48, 64), np.uint8)
        labels[int(generator.integers(20, 30)) :] = 1
        x = int(generator.integers(4, 44))
        labels[6:18, x : x + 14] = 2
        pixels = np.array([(90, 160, 240), (60, 160, 60), (220, 40, 40)], np.uint8)[labels]
        name = f"{i}.png"
        segments = root / "labels" if task == "semantic" else root / "panoptic_all"
        for folder in (root / "images", segments):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / name)
        drawn = labels if task == "semantic" else colors_of_ids(labels + 1)
        Image.fromarray(drawn).save(segments / name)
        images.append({"id": i, "file_name": name, "height": 48, "width": 64})
        info = [{"id": n + 1, "category_id": n, "iscrowd": 0} for n in range(3)]
        annotations.append({"image_id": i, "file_name": name, "segments_info": info})
    if task == "panoptic":
        classes = [{"id": n, "name": x, "isthing": n // 2} for n, x in enumerate(STRIPES)]
        content = {"images": images, "annotations": annotations, "categories": classes}
        (root / "panoptic_all.json").write_text(json.dumps(content))
    else:
        (root / "classes.txt").write_text("\n".join(STRIPES))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric", "column"),
    [("semantic", "sem_seg/mIoU", "mIoU"), ("panoptic", "panoptic_seg/PQ", "PQ")],
)
def test_other_tasks_from_folder_to_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, metric: str, column: str
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_stripes(root, task)
    cfg = load_config(None, [word for item in NARROW.items() for word in item])
    (tmp_path / "narrow.yaml").write_text(cfg.dump())
    command = ["--data", root, "--config-file", tmp_path / "narrow.yaml", "--output", out]
    command += ["--epochs", 2, "--batch-size", 2, "--image-size", 64, "--num-pictures", 1]
    train_custom.main([str(word) for word in command])
    printed = capsys.readouterr().out
    assert "5 to train on, 1 to validate on" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert any(line[1:2] == [column] for line in lines)
    assert all(any(line[:1] == [name] for line in lines) for name in ("all", *STRIPES))
    assert len(list((out / "predictions").glob("*.png"))) == 1
    assert column in (out / "report.html").read_text()
    assert f"{out / 'report.html'}: page about the last evaluation" in printed
    cfg = load_config(str(out / "config.yaml"))
    assert metric == cfg.SOLVER.BEST.METRIC
    history = History.read(out / "best" / "history.json", metric)
    assert [entry.value(metric) is not None for entry in history.evaluations] == [True, True]
    train_custom.main(["--output", str(out), "--resume", "--num-pictures", "0"])
    forget()
    again = ["MODEL.WEIGHTS", str(out / "best" / "model_best.pth"), "OUTPUT_DIR", str(out / "a")]
    train.main(["--config-file", str(out / "config.yaml"), "--eval-only", *again])

    # Whoever loads the model elsewhere, where the data are unknown, still knows the classes.
    forget()
    elsewhere = shutil.copy(out / "config.yaml", tmp_path)
    predictor = MaskDINOPredictor.from_config(elsewhere, out / "best" / "model_best.pth")
    assert predictor.categories.names == STRIPES
    things = (False, False, True) if task == "panoptic" else (True, True, True)
    assert predictor.categories.is_thing == things == tuple(predictor.is_thing.tolist())
    assert predictor(root / "images" / "0.png").tasks == (task,)


def test_errors_stop_the_run_or_are_left_out(tmp_path: Path) -> None:
    drawn, out = write_drawn(tmp_path / "drawn"), tmp_path / "out"
    drawn.content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    drawn.content["annotations"][1]["category_id"] = 4
    drawn.write()
    (drawn.images / "scene_5.png").write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        train_custom.main(words(drawn, out))
    message = str(caught.value)
    for part in (
        f"error: {drawn.json_file} cannot be trained on",
        "box of zero or negative size\n    annotation 0 of image 0 (scene_0.png): [3, 3, 0, 5]",
        "annotation of an unknown category\n    annotation 1 of image 0 (scene_0.png): 4",
        "image cannot be read",
        "--skip-invalid",
    ):
        assert part in message
    assert not (out / "config.yaml").exists()
    args = train_custom.parse_arguments(words(drawn, out, "--skip-invalid"))
    run = train_custom.prepare(args)
    assert "left out because it is wrong" in (out / "plan.txt").read_text()
    assert "annotation 0 of image 0" in (out / "data" / "check.txt").read_text()
    assert run.is_planned()
    parts = [
        json.loads((out / "data" / f"custom_{part}.json").read_text()) for part in ("train", "val")
    ]
    assert sum(len(part["images"]) for part in parts) == 5
    kept = [a for a in drawn.content["annotations"][2:] if a["image_id"] != 5]
    assert sum(len(part["annotations"]) for part in parts) == len(kept)


def test_image_damaged_after_the_check(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that loads data meets it; its traceback, and that of the training, are no help."""
    # Loggers that earlier tests left behind may write to their closed streams, and tell of that.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    drawn, out = write_drawn(tmp_path / "drawn"), tmp_path / "out"
    train_custom.prepare(
        train_custom.parse_arguments(words(drawn, out, "DATALOADER.NUM_WORKERS", 1))
    )
    for path in drawn.images.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit) as caught:
        train_custom.main(["--output", str(out), "--resume"])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"error: cannot read image {drawn.images}/scene_")
    assert last.endswith("Replace the file or remove its annotations")
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "lost.pth"], "there is no checkpoint lost.pth"),
        (["--config-file", "coco/instance/maskdino_R5"], "did you mean coco/instance/maskdino_R50"),
        (["--config-file", "custom/maskdino_small", "--weights", "released"], "no weights were"),
        (["SOLVER.BASE_LRR", "1"], "did you mean SOLVER.BASE_LR"),
        (["--train-json", "lost.json"], "no annotation file lost.json"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu', which is no device"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path: Path, more: list[str], message: str) -> None:
    drawn = write_drawn(tmp_path / "drawn", 2)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train_custom.main(words(drawn, tmp_path / "out", *more))


def test_the_folder_of_the_data_stays_as_it_is(tmp_path: Path) -> None:
    drawn = write_drawn(tmp_path / "drawn", 2)
    before = sorted((tmp_path / "drawn").rglob("*"))
    for folder, data in (
        (drawn.images, ["--train-json", drawn.json_file, "--train-images", drawn.images]),
        (tmp_path / "drawn", ["--data", tmp_path / "drawn"]),
    ):
        with pytest.raises(SystemExit, match=f"^error: --output {folder} is the folder of the d"):
            train_custom.main([str(x) for x in (*data, "--output", folder)])
    assert sorted((tmp_path / "drawn").rglob("*")) == before


def test_runs_of_a_device_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was planned on another machine goes on; without a GPU, on the CPU."""
    cfg = load_config(None, ["MODEL.DEVICE", "cuda:7"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = ["--output", str(tmp_path), "--resume"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_custom.prepare(train_custom.parse_arguments(command)).output == tmp_path
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match=r"^error: MODEL\.DEVICE is cuda:7, but [^\n]*cuda:0$"):
        train_custom.main(command)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="a new run needs --data, or --train-json and --train-images"
    ):
        train_custom.main(["--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .* holds no run to go on with: name the data"):
        train_custom.main(["--output", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit):
        train_custom.parse_arguments(["--output", "o", "--val-json", "b.json"])
    with pytest.raises(SystemExit):
        train_custom.parse_arguments(["--output", "o", "--epochs", "0"])


def test_folder_of_images_that_is_missing(tmp_path: Path) -> None:
    drawn = write_drawn(tmp_path / "drawn", 2)
    drawn.images = tmp_path / "lost"
    with pytest.raises(SystemExit, match=r"^error: .*lost is no folder: give the one that holds"):
        train_custom.main(words(drawn, tmp_path / "out"))


def test_results_need_no_images(tmp_path: Path) -> None:
    """A run tells its results wherever it is, and its images are."""
    drawn, out = write_drawn(tmp_path / "drawn"), tmp_path / "out"
    run = train_custom.prepare(train_custom.parse_arguments(words(drawn, out)))
    evaluation = {"iteration": 7, "results": {"segm": {"AP": 12.3, "AP50": 45.6, "AP-car": 7.8}}}
    run.best_weights.parent.mkdir(exist_ok=True)
    (run.best_weights.parent / "history.json").write_text(json.dumps([evaluation]))
    shutil.rmtree(drawn.images)
    lines = [line.split() for line in run.results().splitlines()]
    assert lines[0][-2:] == ["(iteration", "8):"]
    assert lines[1] == ["objects", "masks", "AP", "masks", "AP50", "masks", "AP75"]
    assert lines[2][0] == "all" and lines[2][2:] == ["12.3", "45.6", "-"]
    assert [line[-1] for line in lines if line[0] == "car"] == ["7.8"]
