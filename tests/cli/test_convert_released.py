"""A released configuration and checkpoint become ours, and the tool says what they contradict."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from maskdino.checkpoint.released_weights import convert_weights
from maskdino.cli import convert_released
from maskdino.config import load_config
from maskdino.model import MaskDINO


@pytest.fixture
def released(parity: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The files of the worked case `instance`."""
    weights = tmp_path / "released.pth"
    command = [sys.executable, parity / "make_weights.py"]
    subprocess.run([*command, parity / "instance_parameters.tsv", weights], check=True)
    return parity / "instance_config.yaml", weights


def test_output_is_a_config_and_a_checkpoint_of_ours(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    remarks = convert_released.convert(*released, tmp_path / "ours")
    cfg = load_config(str(tmp_path / "ours" / "config.yaml"))
    assert cfg.MODEL.MASK_DINO.QUERY_SELECTION.LARGEST_PROPOSALS == "finest"
    assert cfg.MODEL.MASK_DINO.DENOISING.BOX_NOISE == 0.0
    cfg.MODEL.DEVICE = "cpu"
    saved = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    assert set(MaskDINO(cfg).state_dict()) == set(saved)
    expected = convert_weights(torch.load(released[1], weights_only=True)["model"], 8)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert not any("disagrees" in remark for remark in remarks)


def test_the_checkpoint_decides_where_the_config_disagrees(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    values = yaml.safe_load(released[0].read_text())
    values["MODEL"]["MaskDINO"]["DEC_LAYERS"] = 9
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(values))
    remarks = convert_released.convert(wrong, released[1], tmp_path / "ours")
    assert [r for r in remarks if "disagrees" in r and "DECODER.NUM_LAYERS is 9, set to 3" in r]


def test_usage_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = convert_released.__doc__.replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.lstrip().startswith("python "))
    given = []
    monkeypatch.setattr(convert_released, "convert", lambda *paths: given.extend(paths) or [])
    monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
    assert convert_released.main() == 0
    assert [str(path) for path in given] == ["maskdino_R50.yaml", "maskdino_r50.pth", "converted"]


def test_nothing_is_overwritten(released: tuple[Path, Path], tmp_path: Path) -> None:
    convert_released.convert(*released, tmp_path / "ours")
    with pytest.raises(FileExistsError, match="choose another folder"):
        convert_released.convert(*released, tmp_path / "ours")


def test_other_checkpoints_are_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, other)
    with pytest.raises(ValueError, match="no released Mask DINO names"):
        convert_released.convert(released[0], other, tmp_path / "ours")
