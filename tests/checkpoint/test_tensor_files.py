"""Weights in safetensors files: read wherever a .pth is, and written whole or not at all."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.loading import load_trained
from maskdino.checkpoint.reading import CheckpointError, read_checkpoint
from maskdino.checkpoint.tensor_files import read_tensors, read_texts, write_tensors
from maskdino.cli.convert_released import convert
from maskdino.model import MaskDINO
from maskdino.model_zoo import read_config
from maskdino.system.errors import WriteError
from tests.checkpoint.test_released_weights import released_case_cfg, released_case_weights
from tests.cli.test_convert_released import released as released_files
from tests.helpers import tiny_cfg, tiny_model

released = released_files  # configuration and weights of the released code

BROKEN = {
    "empty": b"",
    "text": b"hello, this is no checkpoint\n",
    "zeros": bytes(1000),
    "no_tensors": struct.pack("<Q", 2) + b"{}",
    "html": b"<!DOCTYPE html><html></html>",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_contents_are_refused_in_one_line(name: str, device: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors") as error:
        read_checkpoint(str(path), device)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [-1, 4000, 9])
def test_files_that_were_cut_off(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    write_tensors(path, tiny_model().state_dict(), {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is no checkpoint, or was cut off"):
        MaskDINOCheckpointer(tiny_model()).load(str(path))


def test_they_are_the_weights_that_were_written(tmp_path: Path) -> None:
    """Of every kind, not contiguous ones too; others can read them, and shapes cost nothing."""
    tensors = {
        "half": torch.randn(3, 4).half(),
        "bf16": torch.randn(2).bfloat16(),
        "turned": torch.randn(3, 4).t(),
        "number": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
    }
    path = tmp_path / "w.safetensors"
    write_tensors(path, tensors, {"about": "ö"})
    assert read_texts(path) == {"format": "pt", "about": "ö"}
    assert_equal(read_tensors(path), tensors)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
    shapes = read_checkpoint(str(path), "meta")["model"]
    assert all(tensor.is_meta for tensor in shapes.values())
    assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == {
        n: (x.shape, x.dtype) for n, x in tensors.items()
    }


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(found[name].dtype == value.dtype for name, value in wanted.items())


def test_our_weights_load_as_from_pth(tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model()
    write_tensors(tmp_path / "w.safetensors", model.state_dict(), {})
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS, cfg.SOLVER.EMA.ENABLED = str(tmp_path / "w.safetensors"), True
    load_trained(other, cfg)
    assert_equal(other.state_dict(), model.state_dict())
    wrong = dict(model.state_dict()) | {"heads.class_head.weight": torch.ones(7, 64)}
    write_tensors(tmp_path / "w.safetensors", wrong, {})
    with pytest.raises(CheckpointError, match=r"heads\.class_head\.weight: \(7, 64\) in the file"):
        load_trained(other, cfg)


@pytest.mark.parametrize("case", ["instance", "semantic_ce"])
def test_released_weights_load_as_from_pth(case: str, parity: Path, tmp_path: Path) -> None:
    """They are renamed, and decide what no tensor of them says."""
    weights = {name: x.clone() for name, x in released_case_weights(parity, case).items()}
    cfg = released_case_cfg(parity, case)
    cfg.merge_from_list(["DATASETS.TRAIN", (), "DATASETS.TEST", (), "MODEL.DEVICE", "cpu"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": weights}, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    read = [
        read_config(tmp_path / "config.yaml", tmp_path / name, whole=True)
        for name in ("w.pth", "w.safetensors")
    ]
    models = [MaskDINO(cfg) for cfg in read]
    for model, own in zip(models, read, strict=True):
        load_trained(model, own)
        own.MODEL.WEIGHTS = ""
    assert read[0] == read[1]
    assert_equal(models[1].state_dict(), models[0].state_dict())


def test_released_weights_are_converted(released: tuple[Path, Path], tmp_path: Path) -> None:
    config, weights = released
    state = torch.load(weights, weights_only=True)
    state = state.get("model", state)
    save_file({name: x.clone() for name, x in state.items()}, tmp_path / "w.safetensors")
    convert(config, weights, tmp_path / "a")
    convert(config, tmp_path / "w.safetensors", tmp_path / "b")
    read = [torch.load(tmp_path / x / "model.pth", weights_only=True)["model"] for x in "ab"]
    assert_equal(*read)


def test_a_file_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="cannot write .*gone/w.safetensors: .*No such file"):
        write_tensors(tmp_path / "gone" / "w.safetensors", {"a": torch.ones(2)}, {})
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared[:2]}, {})
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]
