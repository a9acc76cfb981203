"""Configurations and released weights by name; no test here uses the network."""

import ast
import dataclasses
import hashlib
import logging
import tracemalloc
import urllib.error
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from maskdino import model_zoo
from maskdino.checkpoint.released_weights import ReleasedStructure, our_names
from maskdino.config import load_config
from maskdino.model_zoo import zoo

R50 = "coco/instance/maskdino_R50.yaml"
# Lists of the tensors of released files.
PARAMETERS = {
    "coco/instance/maskdino_R50_ffn1024.yaml": "r50_300q_hid1024_instance_maskenhanced.tsv",
    R50: "r50_300q_hid2048_3sd1_instance_maskenhanced.tsv",
    "coco/instance/maskdino_swinl.yaml": "swinl_300q_hid2048_instance.tsv",
    "coco/instance/maskdino_swinl_plain_anchors.yaml": "swinl_300q_hid2048_instance.tsv",
    "coco/panoptic/maskdino_R50.yaml": "r50_300q_hid2048_3sd1_panoptic.tsv",
    "ade20k/semantic/maskdino_R50.yaml": "r50_100q_celoss_hid1024_3s_semantic_ade20k.tsv",
    "cityscapes/semantic/maskdino_R50.yaml": "r50_100q_celoss_hid1024_3s_semantic_cityscapes.tsv",
}


def trained_config(name: str) -> CfgNode:
    return model_zoo.get_config(name, trained=True)


def test_list_names_every_configuration_and_no_base() -> None:
    names = model_zoo.list()
    assert R50 in names
    assert not any("Base" in name for name in names)
    assert all(Path(model_zoo.get_config_file(name)).is_file() for name in names)
    trained = model_zoo.list(trained=True)
    assert R50 in trained
    assert set(trained) < set(names)


def test_unknown_configuration_suggests_a_close_one() -> None:
    with pytest.raises(FileNotFoundError, match="maskdino_R5O.*did you mean.*maskdino_R50.yaml"):
        model_zoo.get_config_file("coco/instance/maskdino_R5O.yaml")


def test_untrained_config_is_the_file() -> None:
    assert model_zoo.get_config(R50) == load_config(model_zoo.get_config_file(R50))
    assert model_zoo.get_config(R50.removesuffix(".yaml")) == model_zoo.get_config(R50)


def test_lazy_configurations_by_name() -> None:
    names = model_zoo.list(lazy=True)
    assert {"lazy/coco_instance_R50.py", "lazy/coco_instance_swinl.py"} <= set(names)
    assert not set(names) & set(model_zoo.list())
    for name in names:
        lazy = model_zoo.get_config(name)
        assert lazy.model.heads.num_classes in (80, 133)
        assert model_zoo.get_config(name.removesuffix(".py")).keys() == lazy.keys()
    with pytest.raises(FileNotFoundError, match=r"did you mean lazy/coco_instance_R50\.py"):
        model_zoo.get_config("lazy/coco_instance_R5O")
    with pytest.raises(ValueError, match=r"coco_instance_R50\.py is a LazyConfig: .*lazyconfig"):
        model_zoo.read_config("lazy/coco_instance_R50")


@pytest.mark.parametrize("model", model_zoo.RELEASED, ids=lambda model: model.config)
def test_released_weights_are_found_by_config_and_by_file(model: model_zoo.ReleasedModel) -> None:
    for name in (model.config, model.config.removesuffix(".yaml"), model.file):
        assert model_zoo.find_released(name) is model
        assert model_zoo.get_checkpoint_url(name).endswith(f"maskdino-v0.1.0/{model.file}")
    assert model.results
    assert model.url == trained_config(model.config).MODEL.WEIGHTS


def test_published_results_agree_with_the_names_of_the_files() -> None:
    for model in model_zoo.RELEASED:
        for metric, value in model.results.items():
            if f"{value}" in model.file:
                continue
            assert metric in ("million_parameters", "gflops") or "panoptic" in model.file


def test_no_released_weights() -> None:
    with pytest.raises(KeyError, match="maskdino_R50_12ep.*maskdino_R50.yaml"):
        model_zoo.get_config("coco/instance/maskdino_R50_12ep.yaml", trained=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_trained_config_has_the_structure_of_the_released_file(parity: Path, name: str) -> None:
    lines = (parity / "released" / PARAMETERS[name]).read_text().splitlines()
    shapes = {row[0]: ast.literal_eval(row[1]) for row in (line.split("\t") for line in lines)}
    structure = ReleasedStructure.from_shapes(shapes)
    cfg = trained_config(name)
    for key, value in structure.config_values(shapes).items():
        found = cfg
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.WEIGHTS = "not read"
    with torch.device("meta"):
        wanted = set(build_model(cfg).state_dict())
    ours = set(our_names(shapes, structure).values())
    counters = {name for name in wanted | ours if name.endswith("num_batches_tracked")}
    assert ours - counters == wanted - counters


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str) -> str:
        raise urllib.error.URLError(f"no route to {url}")

    monkeypatch.setattr(PathManager, "get_local_path", unreachable)
    with pytest.raises(ConnectionError, match=r"maskdino_r50.*\.pth .*no route.*MODEL.WEIGHTS"):
        model_zoo.download(R50)
    with pytest.raises(ConnectionError):
        model_zoo.get(R50, trained=True)


def test_download_checks_the_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    model = model_zoo.find_released(R50)
    monkeypatch.setattr(PathManager, "get_local_path", lambda _: str(path))
    with caplog.at_level(logging.WARNING):
        assert model_zoo.download(R50) == str(path)
    assert "no checksum" in caplog.text

    known = dataclasses.replace(model, sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(zoo, "find_released", lambda _: known)
    assert model_zoo.download(R50) == str(path)
    path.write_bytes(b"other bytes")
    with pytest.raises(ValueError, match=f"instead of {known.sha256}"):
        model_zoo.download(R50)

    content = 500_000 * b"seven b"  # more than is read at a time, and no multiple of it
    path.write_bytes(content)
    known = dataclasses.replace(model, sha256=hashlib.sha256(content).hexdigest())
    tracemalloc.start()
    assert model_zoo.download(R50) == str(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(content)


def test_get_builds_and_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = load_config(
        model_zoo.get_config_file("nuclei/instance/maskdino_tiny.yaml"),
        ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"],
    )
    weights = build_model(cfg).state_dict()
    path = tmp_path / "tiny.pth"
    torch.save({"model": weights}, path)
    cfg.MODEL.WEIGHTS = str(path)
    monkeypatch.setattr(zoo, "read_config", lambda *_: cfg)
    model = model_zoo.get("nuclei/instance/maskdino_tiny.yaml", device="cpu")
    assert model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
