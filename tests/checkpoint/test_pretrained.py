"""Models as folders: they give the same results elsewhere, and a card says what they are."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from PIL import Image

import maskdino
from maskdino.categories import Categories
from maskdino.checkpoint import tensor_files
from maskdino.checkpoint.contents import contents_of
from maskdino.checkpoint.pretrained import FILES, Facts
from maskdino.checkpoint.reading import CheckpointError
from maskdino.checkpoint.tensor_files import read_tensors
from maskdino.cli import predict
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.model_zoo import read_config
from maskdino.system.errors import WriteError
from tests.helpers import tiny_cfg

CATEGORIES = Categories(
    ("cat: 'small'", "日本 | dog", "sky", "*grass*", "x\ny"),
    (True, True, False, False, True),
    (7, 3, 90, 1, 2),
)


def make_cfg(**overrides: object) -> CfgNode:
    cfg = tiny_cfg(TEST__PANOPTIC_ON=True, TEST__SEMANTIC_ON=True, **overrides)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR = ("kept_by_nobody",), "/home/somebody/run"
    cfg.MODEL.MASK_DINO.TEST.PANOPTIC_SCORE_THRESHOLD = 0.0
    return cfg


@pytest.fixture(scope="module")
def predictor() -> MaskDINOPredictor:
    """Of a narrow model with things and stuff, whose dataset no other process knows."""
    torch.manual_seed(0)
    cfg = make_cfg()
    model = MaskDINO(cfg)
    model.is_thing.copy_(torch.tensor(CATEGORIES.is_thing))
    return MaskDINOPredictor.from_model(model, cfg, categories=CATEGORIES, confidence_threshold=0)


@pytest.fixture(scope="module")
def folder(predictor: MaskDINOPredictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metrics = {
        "segm": {"AP": 41.25, "AP-sky": 3.0, "APs": float("nan")},
        "panoptic_seg": {"PQ": 50},
    }
    return predictor.save_pretrained(
        tmp_path_factory.mktemp("a") / "model",
        name="Cats: and 'dogs'",
        metrics=metrics,
        dataset="kept_val",
        license="apache-2.0",
        averaged=True,
        iterations=1000,
    )


def results(predictor: MaskDINOPredictor) -> list[tuple]:
    """All that is predicted of two images."""
    images = np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), np.uint8)
    found = []
    for result in predictor(images):
        arrays = (result.boxes, result.scores, result.panoptic_ids, result.label_map, result.masks)
        coco = [result.to_coco("x", task) for task in result.tasks]
        found.append((*(array.tobytes() for array in arrays), coco, result.segments))
    return found


@pytest.mark.parametrize("source", ["folder", "file", "moved", "pth", "pth_above"])
def test_results_are_equal_to_the_last_bit(
    source: str, predictor: MaskDINOPredictor, folder: Path, tmp_path: Path
) -> None:
    path = folder if source == "folder" else folder / "model.safetensors"
    if source == "moved":  # the file alone
        path = Path(shutil.copy(path, tmp_path / "other.safetensors"))
    elif source.startswith("pth"):
        path = tmp_path / ("best/w.pth" if source == "pth_above" else "w.pth")
        path.parent.mkdir(exist_ok=True)
        torch.save({"model": predictor.network.model.state_dict()}, path)
        for name in ("config.yaml", "categories.json"):
            shutil.copy(folder / name, tmp_path)
        (tmp_path / "model.safetensors").touch()
    loaded = MaskDINOPredictor.from_pretrained(path, device="cpu", confidence_threshold=0)
    assert loaded.categories == CATEGORIES
    assert results(loaded) == results(predictor)


def test_the_model_and_what_is_in_the_folder(folder: Path, predictor: MaskDINOPredictor) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    model, cfg = maskdino.load_pretrained(folder, device="cpu", opts=["INPUT.MIN_SIZE_TEST", "32"])
    assert model.is_thing.tolist() == list(CATEGORIES.is_thing) and not model.training
    assert cfg.INPUT.MIN_SIZE_TEST == 32
    assert str(folder / "model.safetensors") == cfg.MODEL.WEIGHTS
    state = predictor.network.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert "somebody" not in (folder / "config.yaml").read_text()
    assert json.loads((folder / "metrics.json").read_text()) == {
        "segm/AP": 41.25,
        "segm/AP-sky": 3.0,
        "panoptic_seg/PQ": 50,
    }
    assert json.loads((folder / "categories.json").read_text())[2] == {
        "id": 90,
        "name": "sky",
        "isthing": 0,
    }


def test_contents_name_the_metrics_of_all_classes(
    predictor: MaskDINOPredictor, tmp_path: Path
) -> None:
    """Hyphens and slashes in the names of datasets and classes change nothing."""
    metrics = {"my-data": {"segm": {"AP": 41.25, "AP-car/van": 3.0}, "sem_seg": {"IoU-sky": 2.0}}}
    predictor.save_pretrained(tmp_path / "model", metrics=metrics, dataset="my-data")
    lines = contents_of(str(tmp_path / "model" / "model.safetensors")).lines()
    assert "metrics    my-data/segm/AP 41.25" in lines
    card = (tmp_path / "model" / "README.md").read_text()
    assert "value: 41.25" in card and "value: 3.0" not in card and "AP-car/van" in card


def test_commands_take_the_folder_for_a_configuration(
    folder: Path, predictor: MaskDINOPredictor, tmp_path: Path
) -> None:
    """The classes are those of the folder; other weights, and values, can be given."""
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(path)
    words = [
        "--config-file",
        str(folder),
        "--input",
        str(path),
        "--output",
        str(tmp_path),
        "--json",
    ]
    out = ["--output", str(tmp_path / "out"), "--confidence-threshold", "0", "--task", "instance"]
    assert predict.main([*words, *out]) == 0
    found = json.loads((tmp_path / "out" / "in.png.json").read_text())["instance"]
    (wanted,) = predictor.with_options(tasks=("instance",))([str(path)])
    assert found == json.loads(json.dumps(wanted.to_dict()))["instance"] and len(found) > 3
    cfg = read_config(folder)
    assert str(folder / "model.safetensors") == cfg.MODEL.WEIGHTS
    assert list(CATEGORIES.names) == cfg.MODEL.MASK_DINO.CLASS_NAMES
    assert cfg.MODEL.MASK_DINO.STUFF_CLASSES == ["sky", "*grass*"]
    assert read_config(folder, "").MODEL.WEIGHTS == ""
    other = str(tmp_path / "w.pth")
    torch.save({"model": predictor.network.model.state_dict()}, other)
    assert other == read_config(folder, overrides=["MODEL.WEIGHTS", other]).MODEL.WEIGHTS


def test_saved_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    loaded = MaskDINOPredictor.from_pretrained(folder, device="cpu").with_options(features=True)
    again = loaded.save_pretrained(tmp_path / "again")
    for name in ("config.yaml", "categories.json"):
        assert (again / name).read_text() == (folder / name).read_text()
    assert loaded.save_pretrained(again) == again  # a model takes the place of a model
    other = MaskDINOPredictor.from_pretrained(again, device="cpu")
    assert results(other) == results(loaded)


def test_card_is_what_hubs_read(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "apache-2.0" and values["library_name"] == "maskdino"
    assert values["pipeline_tag"] == "image-segmentation"
    assert {"mask-dino", "panoptic-segmentation", "semantic-segmentation"} <= set(values["tags"])
    assert values["datasets"] == ["kept_by_nobody"]
    assert values["metrics"] == ["mean_average_precision", "panoptic_quality"]
    (entry,) = values["model-index"]
    assert entry["name"] == "Cats: and 'dogs'"
    assert [x["value"] for x in entry["results"][0]["metrics"]] == [41.25, 50.0]
    sections = [line for line in body.splitlines() if line.startswith("#")]
    assert sections == ["# Cats: and 'dogs'", "## Data", "## Results", "## How to use", "## Limits"]
    assert "trained for 1000 steps. Its weights are averaged over the training (EMA)." in body
    assert "| segm/AP | 41.25 |" in body and "| segm/AP-sky | 3 |" in body
    assert "Its license is not stated" not in body and "日本 | dog" in body
    assert not any(line.rstrip() != line for line in body.splitlines())


def test_card_by_the_hubs_own_reader(folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.license, data.model_name) == (
        "maskdino",
        "apache-2.0",
        "Cats: and 'dogs'",
    )
    assert [result.metric_value for result in data.eval_results] == [41.25, 50.0]


def test_card_of_a_detector_of_which_nothing_is_known(tmp_path: Path) -> None:
    cfg = make_cfg(
        MASK_ON=False, DENOISING__MODE="boxes", QUERY_SELECTION__MASK_ENHANCED_ANCHORS="none"
    )
    cfg.DATASETS.TRAIN = ()
    maskdino.save_pretrained(MaskDINO(cfg), cfg, tmp_path)
    text = (tmp_path / "README.md").read_text()
    values = yaml.safe_load(text.split("---\n")[1])
    assert values == {
        "license": "other",
        "library_name": "maskdino",
        "pipeline_tag": "object-detection",
        "tags": ["mask-dino", "detectron2", "object-detection"],
    }
    assert "No evaluation is recorded." in text and "names no data" in text
    assert "Its license is not stated" in text


def test_rounded_weights_say_so(predictor: MaskDINOPredictor, tmp_path: Path) -> None:
    predictor.save_pretrained(tmp_path / "half", half=True)
    saved = read_tensors(tmp_path / "half" / "model.safetensors")
    state = predictor.network.model.state_dict()
    assert all(
        torch.equal(saved[name], x.half()) for name, x in state.items() if x.is_floating_point()
    )
    assert "rounded to float16" in (tmp_path / "half" / "README.md").read_text()
    model, _ = maskdino.load_pretrained(tmp_path / "half", device="cpu")
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    other = MaskDINO(make_cfg())
    with torch.no_grad():
        other.heads.class_head.bias[0] = 1e5
    with pytest.raises(
        ValueError, match=r"heads.class_head.bias holds 1e\+05, too large for float"
    ):
        maskdino.save_pretrained(other, make_cfg(), tmp_path / "large", half=True)
    assert not (tmp_path / "large").exists()


def test_without_room_for_the_weights_nothing_is_left(
    predictor: MaskDINOPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(_: object, path: Path, *__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as context:
        context.setattr(tensor_files, "save_file", save)
        with pytest.raises(WriteError, match="No space left"):
            predictor.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    predictor.save_pretrained(tmp_path / "new")


def test_other_folders_are_left_alone(predictor: MaskDINOPredictor, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("of a training")
    with pytest.raises(FileExistsError, match="holds a config.yaml, but no model"):
        predictor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        predictor.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "holds no model.safetensors: give a folder"),
        ("config.yaml", None, "holds no config.yaml"),
        ("config.yaml", "NO_KEY: 3", "Unknown configuration key NO_KEY"),
        ("config.yaml", "", "copy/config.yaml holds nothing"),
        ("model.safetensors", "text", "model.safetensors is no checkpoint, or was cut off"),
        ("categories.json", "{", "categories.json holds no categories"),
        ("categories.json", '[{"id": 1}]', "categories.json holds no categories"),
    ],
)
def test_folders_that_are_not_whole(
    name: str, content: str | None, message: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises((ValueError, OSError, KeyError), match=message) as error:
        MaskDINOPredictor.from_pretrained(copy, device="cpu")
    assert "\n" not in str(error.value)


def test_files_without_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "in" / "in").mkdir(parents=True)
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "in" / "in" / "w.pth")
    with pytest.raises(FileNotFoundError, match=r"w\.pth has no configuration with it"):
        maskdino.load_pretrained(tmp_path / "in" / "in" / "w.pth")
    for gone in (tmp_path / "gone", "nothing"):
        with pytest.raises(FileNotFoundError, match="there is no folder or file"):
            maskdino.load_pretrained(gone)


def test_facts_of_others() -> None:
    for text in ("", "3", "{}", '{"categories": 3}', '{"categories": [], "tasks": [], "more": 1}'):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Facts.from_json(text)
    facts = Facts(CATEGORIES, metrics={"a/AP": 1.5}, tasks=("x",), averaged=False)
    assert Facts.from_json(facts.to_json()) == facts


class TestHub:
    """Models by the name that they have on the hub; nothing is downloaded here."""

    def test_what_is_downloaded_is_read(
        self, folder: Path, predictor: MaskDINOPredictor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = pytest.importorskip("huggingface_hub")
        asked: list[tuple] = []

        def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append((name, revision, set(allow_patterns)))
            return str(folder)

        monkeypatch.setattr(hub, "snapshot_download", download)
        found = MaskDINOPredictor.from_pretrained(
            "user/name", revision="v1", device="cpu", confidence_threshold=0
        )
        assert asked == [("user/name", "v1", set(FILES))]
        assert results(found) == results(predictor)

    def test_without_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ConnectionError, match="there is no folder user/name, nor can") as error:
            maskdino.load_pretrained("user/name")
        assert "\n" not in str(error.value)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
            maskdino.load_pretrained("user/name")


def test_exported_networks_are_not_saved(predictor: MaskDINOPredictor, tmp_path: Path) -> None:
    other = MaskDINOPredictor(
        lambda _: None,
        categories=CATEGORIES,
        inference=predictor.inference,
        is_thing=predictor.is_thing,
        options=predictor.options,
    )
    with pytest.raises(ValueError, match="an exported network cannot be saved"):
        other.save_pretrained(tmp_path)
