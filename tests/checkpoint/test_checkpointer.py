"""Checkpoints: written whole, read without running code, refused where they do not fit."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.reading import read_checkpoint
from maskdino.checkpoint.released_weights import DECODER, ENCODER
from maskdino.model import MaskDINO
from maskdino.system import files
from tests.checkpoint.test_released_weights import released_case_cfg, released_case_weights
from tests.helpers import CHANNELS, NUM_CLASSES, tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MaskDINO, Path]:
    """A model and the file that holds it."""
    model = tiny_model()
    MaskDINOCheckpointer(model, str(tmp_path)).save("model", iteration=7)
    return model, tmp_path / "model.pth"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_saved_weights_come_back(saved: tuple[MaskDINO, Path]) -> None:
    model, path = saved
    other = tiny_model()
    assert not same(other.state_dict(), model.state_dict())
    rest = MaskDINOCheckpointer(other, require_all=True).load(str(path))
    assert same(other.state_dict(), model.state_dict()) and rest["iteration"] == 7
    assert same(read_checkpoint(str(path))["model"], model.state_dict())
    assert (path.parent / "last_checkpoint").read_text() == "model.pth"
    assert sorted(p.name for p in path.parent.iterdir()) == ["last_checkpoint", "model.pth"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_save_leaves_the_old_file(
    step: str, saved: tuple[MaskDINO, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = saved
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, step, fail)
    nn.init.zeros_(model.heads.class_head.weight)
    with pytest.raises(OSError, match="no space"):
        MaskDINOCheckpointer(model, str(path.parent)).save("model")
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["last_checkpoint", "model.pth"]


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_files_are_named(
    suffix: str, share: float, saved: tuple[MaskDINO, Path], tmp_path: Path
) -> None:
    path = saved[1]
    if suffix == ".pkl":
        path = tmp_path / "whole.pkl"
        arrays = {name: x.numpy() for name, x in saved[0].state_dict().items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}))
    content = path.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"cut{suffix}"):
        MaskDINOCheckpointer(tiny_model()).load(str(cut))


def test_pickles_of_arrays_are_read(saved: tuple[MaskDINO, Path], tmp_path: Path) -> None:
    """As detectron2's model zoo ships backbones."""
    model, _ = saved
    arrays = {
        name.removeprefix("backbone."): x.numpy()
        for name, x in model.state_dict().items()
        if name.startswith("backbone.")
    }
    path = tmp_path / "backbone.pkl"
    content = {"model": arrays, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=2))
    other = tiny_model()
    head = other.heads.class_head.weight.clone()
    MaskDINOCheckpointer(other).load(str(path))
    assert same(other.backbone.state_dict(), model.backbone.state_dict())
    assert torch.equal(other.heads.class_head.weight, head)


@pytest.mark.parametrize("key", ["blobs", None])
def test_pickles_of_caffe2_are_read_without_their_momenta(key: str | None, tmp_path: Path) -> None:
    arrays = {"conv1_w": np.ones((2, 3), np.float32), "conv1_b": np.zeros(2, np.float32)}
    whole = arrays | {f"{name}_momentum": array for name, array in arrays.items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(whole if key is None else {key: whole}, protocol=2))
    found = read_checkpoint(str(path))
    assert found.keys() == {"model", "__author__", "matching_heuristics"}
    assert found["matching_heuristics"] is True
    assert found["model"].keys() == {"conv1_w", "conv1_b"}
    assert (found["model"]["conv1_w"] == 1).all()


def test_another_number_of_classes_starts_these_weights_anew(
    saved: tuple[MaskDINO, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, path = saved
    other = tiny_model(NUM_CLASSES=3)
    with caplog.at_level(logging.WARNING):
        MaskDINOCheckpointer(other).load(str(path))
    for name in ("heads.class_head.weight", "heads.class_head.bias"):
        assert f"{name} is new" in caplog.text
    assert "denoising.label_embedding.weight is new" in caplog.text
    assert f"({NUM_CLASSES}, 64)" in caplog.text and "(3, 64)" in caplog.text
    assert torch.equal(other.heads.norm.weight, model.heads.norm.weight)
    assert other.heads.class_head.bias.shape == (3,)
    with pytest.raises(ValueError, match="heads.class_head.weight"):
        MaskDINOCheckpointer(tiny_model(NUM_CLASSES=3), require_all=True).load(str(path))


@pytest.mark.parametrize(
    ("overrides", "listed"),
    [
        ({"DECODER__FEEDFORWARD_DIM": 32}, r"layers.0.ffn.linear1.weight: \(64, 64\).*\(32, 64\)"),
        ({"DECODER__NUM_LAYERS": 3}, r"decoder.layers.2.*: not in the file"),
        ({"DECODER__NUM_LAYERS": 1}, r"decoder.layers.1.*: not in the model"),
        ({"ENCODER__NUM_LEVELS": 3}, r"encoder.level_embed: \(4, 64\).*\(3, 64\)"),
        ({"QUERY_SELECTION__ENABLED": False}, r"query_selection.content: not in the file"),
    ],
)
@pytest.mark.parametrize("require_all", [True, False])
def test_wrong_checkpoints_list_what_does_not_fit(
    overrides: dict[str, object], listed: str, require_all: bool, saved: tuple[MaskDINO, Path]
) -> None:
    model = tiny_model(**overrides)
    with pytest.raises(ValueError, match=listed):
        MaskDINOCheckpointer(model, require_all=require_all).load(str(saved[1]))


def test_backbones_alone_may_hold_more(saved: tuple[MaskDINO, Path], tmp_path: Path) -> None:
    state = {k: x for k, x in saved[0].state_dict().items() if k.startswith("backbone.")}
    path = tmp_path / "backbone.pth"
    torch.save({"model": state | {"backbone.linear.weight": torch.zeros(2)}}, path)
    model = tiny_model()
    MaskDINOCheckpointer(model).load(str(path))
    assert same(model.backbone.state_dict(), saved[0].backbone.state_dict())
    with pytest.raises(ValueError, match="not in the file"):
        MaskDINOCheckpointer(model, require_all=True).load(str(path))


def test_parts_may_be_added_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A detector becomes the start of a model with masks, and the other way round."""
    plain = tiny_model(MASK_ON=False, DENOISING__MODE="off")
    MaskDINOCheckpointer(plain, str(tmp_path)).save("plain")
    whole = tiny_model()
    with caplog.at_level(logging.WARNING):
        MaskDINOCheckpointer(whole).load(str(tmp_path / "plain.pth"))
    assert "left as initialized: denoising, heads.mask_head, pixel_embedding" in caplog.text
    assert torch.equal(whole.heads.norm.weight, plain.heads.norm.weight)
    with pytest.raises(ValueError, match="pixel_embedding.* not in the file"):
        MaskDINOCheckpointer(tiny_model(), require_all=True).load(str(tmp_path / "plain.pth"))
    MaskDINOCheckpointer(whole, str(tmp_path)).save("whole")
    MaskDINOCheckpointer(plain, require_all=True).load(str(tmp_path / "whole.pth"))
    assert torch.equal(plain.encoder.level_embed, whole.encoder.level_embed)


def test_nothing_is_written_without_a_folder(tmp_path: Path) -> None:
    MaskDINOCheckpointer(tiny_model(), "").save("model")
    MaskDINOCheckpointer(tiny_model(), str(tmp_path), save_to_disk=False).save("model")
    assert not list(tmp_path.iterdir())


def test_released_files_are_read_as_they_are(
    parity: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The released weights of a worked case, given as MODEL.WEIGHTS; then with fewer classes."""

    weights = released_case_weights(parity, "semantic_ce")
    path = tmp_path / "released.pth"
    torch.save({"model": weights}, path)
    cfg = released_case_cfg(parity, "semantic_ce")
    model = MaskDINO(cfg)
    MaskDINOCheckpointer(model, require_all=True).load(str(path))
    name = "sem_seg_head.predictor.class_embed.weight"
    assert torch.equal(model.heads.class_head.weight, weights[name])
    cfg.MODEL.MASK_DINO.NUM_CLASSES = 3
    with caplog.at_level(logging.WARNING):
        MaskDINOCheckpointer(MaskDINO(cfg)).load(str(path))
    assert "heads.class_head.weight is new" in caplog.text


@pytest.mark.parametrize("heads", [4, 8])
def test_the_model_tells_the_heads_of_a_released_encoder(heads: int, tmp_path: Path) -> None:
    """No shape does: levels turned by another number of heads fit as well, and are wrong."""
    levels, points = 4, 4
    transformer = f"{ENCODER}transformer."
    offsets = torch.arange(heads * levels * points * 2.0).view(heads, levels, points, 2)
    state = {
        f"{DECODER}class_embed.bias": torch.zeros(NUM_CLASSES),
        f"{transformer}level_embed": torch.zeros(levels, CHANNELS),
        f"{transformer}encoder.layers.0.self_attn.sampling_offsets.bias": offsets.flatten(),
    }
    for level, (width, kernel) in enumerate([(2048, 1), (1024, 1), (512, 1), (2048, 3)]):
        name = f"{ENCODER}input_proj.{level}.0.weight"
        state[name] = torch.zeros(CHANNELS, width, kernel, kernel)
    path = tmp_path / "released.pth"
    torch.save({"model": state}, path)
    model = tiny_model(ENCODER__NUM_HEADS=heads)
    read = MaskDINOCheckpointer(model)._load_file(str(path))["model"]
    (name,) = (name for name in read if name.endswith("sampling_offsets.bias"))
    assert read[name].shape == model.state_dict()[name].shape
    assert torch.equal(read[name].view(offsets.shape), offsets.flip(1))  # coarsest first before


@pytest.mark.parametrize("evaluated", [True, False])
def test_no_loader_changes_a_model(
    evaluated: bool, parity: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two facts have no tensor, but wrong ones ruin a released model: then the loader says so."""
    path = tmp_path / "released.pth"
    torch.save({"model": released_case_weights(parity, "instance")}, path)
    cfg = released_case_cfg(parity, "instance")
    MaskDINOCheckpointer(MaskDINO(cfg), require_all=evaluated).load(str(path))
    assert "was trained with" not in caplog.text
    selection = cfg.MODEL.MASK_DINO.QUERY_SELECTION
    assert (selection.LARGEST_PROPOSALS, selection.EMPTY_MASKS) == ("finest", "corner")
    selection.LARGEST_PROPOSALS, selection.EMPTY_MASKS = "coarsest", "box"
    model = MaskDINO(cfg)
    with caplog.at_level(logging.WARNING):
        MaskDINOCheckpointer(model, require_all=evaluated).load(str(path))
    assert 'LARGEST_PROPOSALS "finest", and this model has "coarsest"' in caplog.text
    assert 'EMPTY_MASKS "corner", and this model has "box"' in caplog.text
    assert model.query_selection.coarsest_largest and model.query_selection.empty_masks == "box"


def test_arrays_of_half_precision_and_scalars_are_read(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps({"x": np.float32(2.5), "y": np.zeros((2, 3), np.float16)}))
    data = read_checkpoint(str(path))["model"]
    assert data["x"] == 2.5 and data["y"].shape == (2, 3)
