"""Checkpoints of any content: one error that names the file, and never random weights."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maskdino.checkpoint import reading
from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.loading import load_trained, settle_weights
from maskdino.checkpoint.reading import CheckpointError, fetch, find_resumption, read_checkpoint
from maskdino.model import MaskDINO
from tests.helpers import tiny_cfg, tiny_model

WEIGHT = "heads.class_head.weight"
CONTENTS = {
    "empty": ({}, "no weights at all"),
    "no_model": ({"model": None}, "its weights are None"),
    "model_is_list": ({"model": [torch.ones(1)]}, "its weights are a list of 1"),
    "empty_model": ({"model": {}}, "no weights at all"),
    "list": ([torch.ones(1)], "it holds a list of 1"),
    "number": (3, "it holds a int"),
    "none": (None, "it holds None"),
    "tensor": (torch.ones(2), "it holds a Tensor"),
    "optimizer": ({"optimizer": {"state": {}}, "iteration": 3}, "'optimizer': a dict of 1"),
    "texts": ({"model": {WEIGHT: "no"}}, f"'{WEIGHT}': a str"),
    "numbered": ({"model": {1: torch.ones(1)}}, "'1': a Tensor"),
    "meta": ({"model": {WEIGHT: torch.ones(1, device="meta")}}, "but no values"),
}
BYTES = {
    "empty.pth": b"",
    "text.pth": b"hello, this is no checkpoint\n",
    "zeros.pth": bytes(1000),
    "html.pth": b"<!DOCTYPE html><html></html>",
    "zip.pth": b"PK\x03\x04" + bytes(100),
    "text.pkl": b"hello",
    "zeros.pkl": bytes(100),
    "list.pkl": pickle.dumps([np.ones(2)]),
    "number.pkl": pickle.dumps(3),
    "nothing.pkl": pickle.dumps({}),
    "texts.pkl": pickle.dumps({"model": {"a": "b"}, "__author__": "me"}),
    "blobs.pkl": pickle.dumps({"blobs": None}),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_checkpoint_says_what_it_holds(name: str, tmp_path: Path) -> None:
    content, message = CONTENTS[name]
    path = tmp_path / f"{name}.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"{name}\.pth .*{message}") as error:
        MaskDINOCheckpointer(tiny_model()).load(str(path))
    assert "\n" not in str(error.value)
    if name != "meta":
        with pytest.raises(CheckpointError, match=message):
            settle_weights(tiny_cfg_of(path))


def tiny_cfg_of(path: Path):
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(path)
    return cfg


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files_of_other_programs(name: str, device: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BYTES[name])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as error:
        read_checkpoint(str(path), device)
    assert len(str(error.value)) > len(str(path)) + 15


@pytest.fixture
def model() -> MaskDINO:
    return tiny_model()


Change = Callable[[torch.Tensor], torch.Tensor]
BROKEN_WEIGHTS: dict[str, tuple[Change, str]] = {
    "nan": (lambda x: x.index_fill(0, torch.tensor([0]), float("nan")), "64 of 320 are not finite"),
    "inf": (lambda x: x / 0, "320 of 320 are not finite"),
    "complex": (lambda x: x.to(torch.complex64), "torch.complex64 in the file"),
    "integers": (
        lambda x: x.to(torch.int64),
        "torch.int64 in the file, torch.float32 in the model",
    ),
    "bool": (lambda x: x > 0, "torch.bool in the file"),
}


@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
@pytest.mark.parametrize("require_all", [False, True])
def test_weights_that_are_no_weights(
    name: str, require_all: bool, model: MaskDINO, tmp_path: Path
) -> None:
    change, message = BROKEN_WEIGHTS[name]
    state = model.state_dict()
    path = tmp_path / f"{name}.pth"
    torch.save({"model": {**state, WEIGHT: change(state[WEIGHT])}}, path)
    other = tiny_model()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"(?s){name}\.pth: .*{WEIGHT}: {message}"):
        MaskDINOCheckpointer(other, require_all=require_all).load(str(path))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_half_precision_is_welcome(model: MaskDINO, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    state = model.state_dict()
    torch.save({"model": {**state, WEIGHT: state[WEIGHT].half()}}, path)
    other = tiny_model()
    MaskDINOCheckpointer(other, require_all=True).load(str(path))
    assert torch.equal(other.state_dict()[WEIGHT], state[WEIGHT].half().float())


def test_arrays_that_fit_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"surprise": np.ones((3, 3), np.float32)}))
    with pytest.raises(CheckpointError, match=r"other\.pkl: none of its tensors"):
        MaskDINOCheckpointer(tiny_model()).load(str(path))


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        (None, '"ema" holds no averaged weights, but NoneType'),
        ({}, '"ema", the average of weights, lacks'),
        ({WEIGHT: torch.ones(1)}, '"ema", the average of weights,'),
        ("shapes", f".* has a {WEIGHT} of shape \\(1,\\)"),
        ("nan", f".* has a {WEIGHT} of shape .* finite"),
    ],
)
def test_averages_that_do_not_fit(
    ema: object, message: str, model: MaskDINO, tmp_path: Path
) -> None:
    state = model.state_dict()
    if isinstance(ema, str):
        wrong = torch.ones(1) if ema == "shapes" else state[WEIGHT] * float("nan")
        ema = {**state, WEIGHT: wrong}
    path = tmp_path / "average.pth"
    torch.save({"model": state, "ema": ema}, path)
    cfg = tiny_cfg_of(path)
    cfg.SOLVER.EMA.ENABLED = True
    with pytest.raises(CheckpointError, match=rf"average\.pth: {message}"):
        load_trained(tiny_model(), cfg)


def write_run(folder: Path, iterations: list[int]) -> None:
    """Checkpoints as a training leaves them."""
    for iteration in iterations:
        content = {"model": {"a": torch.ones(9)}, "trainer": {}, "iteration": iteration}
        torch.save(content, folder / f"model_{iteration:07d}.pth")
    (folder / "last_checkpoint").write_text(f"model_{iterations[-1]:07d}.pth")


def test_the_last_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert find_resumption(str(tmp_path)).path == ""
    assert find_resumption(str(tmp_path / "nowhere")).path == ""
    write_run(tmp_path, [9, 19, 14])
    found = find_resumption(str(tmp_path))
    assert (Path(found.path).name, found.note) == ("model_0000014.pth", "")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00\x01", b"model_lost.pth", b"model_0000019.pth", None]
)
def test_the_newest_readable_checkpoint_takes_its_place(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path, [9, 14, 19])
    newest = tmp_path / "model_0000019.pth"
    newest.write_bytes(newest.read_bytes()[:-100])  # cut off
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "model_other.pth")  # no training's
    last = tmp_path / "last_checkpoint"
    last.unlink() if content is None else last.write_bytes(content)
    checkpointer = MaskDINOCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    assert checkpointer.has_checkpoint()
    assert Path(checkpointer.get_checkpoint_file()).name == "model_0000014.pth"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in ("last_checkpoint", "going on from the newest other", "of iteration 14"):
        assert part in record.message


def test_nothing_to_go_on_from_is_said(tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text("model_lost.pth")
    with pytest.raises(CheckpointError, match=r"model_lost\.pth.*there is no other.*--overwrite"):
        find_resumption(str(tmp_path))
    (tmp_path / "last_checkpoint").unlink()
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "model_final.pth")  # brought along
    assert find_resumption(str(tmp_path)).path == ""


def flip(path: Path, content: torch.Tensor, bit: int = 0) -> None:
    """Changes one bit of a tensor in a file, as a failing disk does."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(content.numpy().tobytes()) + 5] ^= 1 << bit
    path.write_bytes(raw)


def test_one_wrong_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    content = torch.rand(50)
    torch.save({"model": {"a": content}}, path)
    read_checkpoint(str(path))
    flip(path, content)
    torch.load(path, weights_only=True)  # does not look
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError, match=r"model\.pth is damaged: the checksum") as error:
            read_checkpoint(str(path), device)
        assert "\n" not in str(error.value)


def test_every_byte_that_matters_is_noticed(tmp_path: Path) -> None:
    """A file with one byte changed is refused, or holds the same as before."""
    path = tmp_path / "model.pth"
    content = torch.rand(9)
    torch.save({"model": {"a": content}}, path)
    raw = path.read_bytes()
    refused = 0
    for position in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[position] ^= 0x40
        path.write_bytes(changed)
        try:
            found = read_checkpoint(str(path))["model"]["a"]
        except CheckpointError:
            refused += 1
            continue
        assert torch.equal(found, content), position
    assert refused > len(raw) // 7 // 4  # the rest is padding and dates


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="writes sums")
def test_files_without_sums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"a": torch.ones(9)}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(str(path))["model"]["a"], torch.ones(9))


@pytest.mark.parametrize("damaged", [{19}, {19, 14}, {19, 14, 9}])
def test_a_damaged_checkpoint_is_passed_over(damaged: set[int], tmp_path: Path) -> None:
    write_run(tmp_path, [9, 14, 19])
    for iteration in damaged:
        flip(tmp_path / f"model_{iteration:07d}.pth", torch.ones(9), bit=iteration % 8)
    if len(damaged) == 3:
        with pytest.raises(CheckpointError, match="is damaged.*there is no other.*--overwrite"):
            find_resumption(str(tmp_path))
        return
    found = find_resumption(str(tmp_path))
    whole = max({9, 14, 19} - damaged)
    assert Path(found.path).name == f"model_{whole:07d}.pth"
    assert "\n" not in found.note
    for part in ("model_0000019.pth is damaged", "last_checkpoint", f"of iteration {whole}"):
        assert part in found.note


def test_settings_of_weights_notice_damage(tmp_path: Path) -> None:
    """Prediction and evaluation read what the file decides before they build a model."""
    path = tmp_path / "model.pth"
    state = tiny_model().state_dict()
    torch.save({"model": state}, path)
    flip(path, state[WEIGHT])
    with pytest.raises(CheckpointError, match=r"model\.pth is damaged"):
        settle_weights(tiny_cfg_of(path))


def test_addresses_are_downloaded_and_paths_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    file.touch()
    asked = []
    monkeypatch.setattr(
        reading.PathManager, "get_local_path", lambda weights: asked.append(weights) or str(file)
    )
    assert fetch(str(file)) == str(file) and asked == []
    assert fetch("https://host/weights.pth") == str(file)
    assert asked == ["https://host/weights.pth"]
