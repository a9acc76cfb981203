"""Configurations that other programs read."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from maskdino.config import add_maskdino_config, load_config
from maskdino.config.loading import complete_config


def test_keys_that_a_configuration_lacks_have_their_usual_values() -> None:
    whole = load_config(None)
    assert complete_config(whole) is whole
    completed = complete_config(CfgNode({"MODEL": {"DEVICE": "cpu"}}))
    assert completed.MODEL.DEVICE == "cpu"
    assert completed.MODEL.MASK_DINO == whole.MODEL.MASK_DINO


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ENCODER: {ACTIVATION_CHECKPOINT: False, RECOMPUTE_FEEDFORWARD: False}", "none"),
        ("ENCODER: {ACTIVATION_CHECKPOINT: True}", "all"),
        ("RECOMPUTE_ATTENTION: True", "cheap"),
        ("RECOMPUTE_ATTENTION: True, ENCODER: {RECOMPUTE_FEEDFORWARD: True}", "all"),
        ("RECOMPUTE: cheap, ENCODER: {ACTIVATION_CHECKPOINT: True}", "cheap"),
    ],
)
@pytest.mark.parametrize("version", ["VERSION: 2\n", ""])
def test_keys_that_recompute_replaces(
    given: str, expected: str, version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each run and each published model has written them, on or off."""
    file = tmp_path / "old.yaml"
    file.write_text(f"{version}MODEL: {{MASK_DINO: {{{given}}}}}\n")
    with caplog.at_level(logging.WARNING):
        recompute = load_config(str(file)).MODEL.MASK_DINO.RECOMPUTE
    assert recompute == expected
    said = [record.message for record in caplog.records if "VERSION" not in record.message]
    assert len(said) == (expected != "none" and "RECOMPUTE:" not in given)
    assert all("is read as" in message for message in said)


def test_bases_at_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of one is another beside it, or is named in full."""
    here, there = "https://example.com/configs/", "https://example.org/"
    files = {
        f"{here}base.yaml": f"SOLVER: {{MAX_ITER: 7}}\n_BASE_: [sub/low.yaml, {there}other.yaml]\n",
        f"{here}sub/low.yaml": "SEED: 3\nSOLVER: {MAX_ITER: 5, IMS_PER_BATCH: 5}\n",
        f"{there}other.yaml": "SEED: 4\n",
    }
    monkeypatch.setattr(CfgNode, "_open_cfg", lambda name: io.StringIO(files[name]))
    path = tmp_path / "mine.yaml"
    path.write_text(f"VERSION: 2\n_BASE_: {here}base.yaml\nOUTPUT_DIR: out\n")
    cfg = load_config(path)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (4, 7, 5)
    for content, message in (
        ("SEED: [\n", r"other\.yaml, line 2: cannot be read as YAML"),
        ("_BASE_: http://example.org/a.yaml\n", r"other\.yaml: _BASE_ is 'http:.*https://"),
    ):
        files[f"{there}other.yaml"] = content
        with pytest.raises(ValueError, match=message):
            load_config(str(path))


def test_old_keys_on_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    old = "MODEL.MASK_DINO.ENCODER.ACTIVATION_CHECKPOINT"
    assert load_config(None, [old, "True"]).MODEL.MASK_DINO.RECOMPUTE == "all"
    assert load_config(None, [old, "False"]).MODEL.MASK_DINO.RECOMPUTE == "none"
    assert "ignoring" not in caplog.text


def test_keys_are_added_once() -> None:
    cfg = get_cfg()
    add_maskdino_config(cfg)
    cfg.MODEL.MASK_DINO.NUM_CLASSES = 7
    add_maskdino_config(cfg)  # by a module of the user, and by what reads its configuration
    assert cfg.MODEL.MASK_DINO.NUM_CLASSES == 7


@pytest.mark.parametrize("words", [["--weights", "w.pth"], ["--eval-only"]])
def test_options_behind_the_keys_are_named(words: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{words[0]} stands behind keys and values: options co"):
        load_config(None, ["OUTPUT_DIR", "out", *words])
