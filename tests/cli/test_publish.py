"""What a training leaves becomes a model for others: which weights, and what is said of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import maskdino
from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.contents import contents_of
from maskdino.checkpoint.ema import WeightAverage
from maskdino.checkpoint.tensor_files import read_tensors, read_texts
from maskdino.cli import publish
from maskdino.model import MaskDINO
from tests.cli.test_convert_released import released as released_files
from tests.helpers import tiny_cfg

released = released_files
BIAS = "heads.class_head.bias"


class Stand:
    """Stands in for the state of an optimizer or trainer."""

    def state_dict(self) -> dict:
        return {"state": torch.ones(1000)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a training with an average; the bias of the class head tells weights apart."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_cfg()
    cfg.MODEL.MASK_DINO.CLASS_NAMES = ["a", "b", "c", "d", "e"]
    cfg.SOLVER.EMA.ENABLED, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = True, ("own_val",), str(folder)
    (folder / "config.yaml").write_text(cfg.dump())
    model = MaskDINO(cfg)
    average = WeightAverage(model, 0.5)

    def save(place: str, name: str, value: float, **state: object) -> None:
        torch.nn.init.constant_(model.heads.class_head.bias, value)
        iteration = {"iteration": state.pop("iteration")} if "iteration" in state else {}
        (folder / place).mkdir(exist_ok=True)
        MaskDINOCheckpointer(model, str(folder / place), **state).save(name, **iteration)

    save("best", "model_best", 1, iteration=9)
    average.state_dict()[BIAS].fill_(2)
    save("ema", "model_final", 2)
    save("", "model_final", 3, ema=average, optimizer=Stand(), trainer=Stand(), iteration=19)
    history = [
        {"iteration": i, "results": {"segm": {"AP": 10.0 + i, "AP-a": 1.0}}} for i in (9, 14)
    ]
    (folder / "best" / "history.json").write_text(json.dumps(history))
    lines = [json.dumps({"iteration": i, "segm/AP": 20.0 + i, "loss": 1.0}) for i in (4, 19)]
    (folder / "metrics.json").write_text("\n".join([*lines, '{"iteration": 19, "cut']))
    return folder


Command = Callable[..., int | str]


def command(*words: object) -> int | str:
    try:
        return publish.main([str(word) for word in words])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("words", "value", "averaged", "iterations", "metric"),
    [
        ([], 1, True, 10, 19.0),
        (["--weights", "best"], 1, True, 10, 19.0),
        (["--weights", "averaged"], 2, True, 20, 39.0),
        (["--weights", "last"], 3, False, 20, None),
    ],
)
def test_which_weights(
    words: list[str],
    value: float,
    averaged: bool,
    iterations: int,
    metric: float | None,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model"
    assert command(run, "-o", out, *words) == 0
    state = read_tensors(out / "model.safetensors")
    assert (state[BIAS] == value).all()
    cfg = tiny_cfg()
    assert set(state) == set(MaskDINO(cfg).state_dict())  # and nothing of the training
    facts = contents_of(str(out / "model.safetensors")).facts
    assert (facts.averaged, facts.iterations, facts.name) == (averaged, iterations, "model")
    assert facts.metrics.get("segm/AP") == metric
    assert facts.dataset == ("own_val" if metric else "")
    printed = capsys.readouterr().out
    assert f"weights    {'averaged (EMA)' if averaged else 'not averaged'}\n" in printed
    assert "classes    5: a, b, c, d, e\n" in printed
    assert f"iterations {iterations}\n" in printed
    assert "task       instance segmentation\n" in printed
    assert "also " not in printed
    assert "no license is stated" in printed
    model, _ = maskdino.load_pretrained(out, device="cpu")
    assert (model.heads.class_head.bias == value).all()


def test_a_training_that_keeps_less(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average of the last checkpoint; then, where none is kept, the last weights."""
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "best")
    shutil.rmtree(copy / "ema")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert command(copy, "-o", tmp_path / "a", "--license", "mit") == 0
    assert (read_tensors(tmp_path / "a" / "model.safetensors")[BIAS] == 2).all()
    printed = capsys.readouterr().out
    assert "no license" not in printed and "notes.txt" not in printed
    config = copy / "config.yaml"
    text = config.read_text()
    config.write_text(
        text.replace("EMA:\n    DECAY: 0.9998\n    ENABLED: true", "EMA:\n    ENABLED: false")
    )
    assert config.read_text() != text
    assert command(copy, "-o", tmp_path / "b", "--half") == 0
    assert (read_tensors(tmp_path / "b" / "model.safetensors")[BIAS] == 3).all()
    printed = capsys.readouterr().out
    assert "weights    not averaged, rounded to float16\n" in printed
    assert "float16" in printed and "float32" not in printed
    assert "metrics    segm/AP 39\n" in printed


def test_a_released_checkpoint(
    released: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under our names, with a configuration that `maskdino convert released` made."""
    from maskdino.cli.convert_released import convert

    convert(*released, tmp_path / "ours")
    config = tmp_path / "ours" / "config.yaml"
    (tmp_path / "numbers.json").write_text('{"segm": {"AP": 46.3}}')
    words = ["--config-file", config, "--metrics", tmp_path / "numbers.json"]
    assert command(released[1], "-o", tmp_path / "out", *words) == 0
    assert "holds      a Mask DINO\n" in capsys.readouterr().out
    ours = torch.load(tmp_path / "ours" / "model.pth", weights_only=True)["model"]
    state = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"segm/AP": 46.3}
    assert "MODEL" in read_texts(tmp_path / "out" / "model.safetensors")["config"]
    assert command("--inspect", released[1]) == 0
    assert "a Mask DINO, under the names of the released code" in capsys.readouterr().out


def test_what_is_in_a_checkpoint_of_a_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "model_final.pth"
    assert command("--inspect", path) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    state = torch.load(path, weights_only=True)["model"]
    count = sum(tensor.numel() for tensor in state.values())
    assert lines == {
        "file": f"{path}, {path.stat().st_size / 2**20:.1f} MiB",
        "holds": "a Mask DINO",
        "numbers": f"{count:,} float32, in {len(state)} tensors",
        "classes": "5 (scores of the class head)",
        "weights": "averaged or not: unknown",
        "iterations": "20",
        "also": "the optimizer's state, averaged weights, the state of a training",
    }


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["backbone.stem.weight"], "a backbone"),
        (["fc.weight"], "tensors of no known model, such as fc.weight"),
        (["transformer.encoder.layers.0.self_attn.in_proj_weight"], "the weights of DETR"),
    ],
)
def test_what_is_in_other_files(
    names: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: torch.ones(2, 3, dtype=torch.bfloat16) for name in names}
    torch.save(
        state | {"number": torch.tensor(1)} if "fc" in names[0] else state, tmp_path / "w.pth"
    )
    assert command("--inspect", tmp_path / "w.pth") == 0
    printed = capsys.readouterr().out
    assert f"holds      {kind}\n" in printed
    assert "6 bfloat16" in printed and "classes" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inspect", "gone.pth"], "there is no checkpoint gone.pth"),
        (["--inspect", "text.pth"], "text.pth is no checkpoint, or was cut off"),
        (["gone", "-o", "out"], "there is no folder or checkpoint gone"),
        (["empty", "-o", "out"], "there is no config.yaml in empty: give the folder of a training"),
        (["no_weights", "-o", "out"], "no_weights holds no weights of a training"),
        (["no_weights", "-o", "out", "--weights", "best"], "no_weights holds no best weights"),
        (["text.pth", "-o", "out"], "no_weights/config.yaml"),
        (["run", "-o", "full"], "full already has a model.safetensors; choose another folder"),
        (["run", "-o", "out", "--metrics", "text.pth"], "--metrics text.pth is no JSON"),
        (["run", "-o", "out", "--metrics", "three"], "--metrics three holds no names and values"),
        (["run", "-o", "out", "--metrics", "words"], "the metric AP is 'x', which is no number"),
        (["run/model_final.pth", "-o", "out", "--weights", "last"], "--weights is of the folder"),
        (["run", "-o", "run"], "run holds a config.yaml, but no model: choose another folder"),
        (["run", "-o", "out", "--dataset", "nobodys"], "there is no dataset 'nobodys'"),
        (["no_weights/wrong.pth", "-o", "out"], "does not fit the model of this config"),
    ],
)
def test_what_does_not_fit_is_one_line(
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "no_weights", "full"):
        Path(name).mkdir()
    shutil.copytree(run, "run")
    Path("no_weights/config.yaml").write_text(tiny_cfg().dump())
    torch.save({"heads.class_head.weight": torch.ones(7, 64)}, "no_weights/wrong.pth")
    Path("full/model.safetensors").touch()
    Path("text.pth").write_text("hello")
    Path("three").write_text("3")
    Path("words").write_text('{"AP": "x"}')
    if message.endswith("config.yaml"):
        words, message = [*words, "--config-file", "no_weights/config.yaml"], "text.pth is no check"
    said = command(*words)
    assert isinstance(said, str) and said.startswith("error: ") and message in said
    assert not Path("out", "model.safetensors").exists()


def test_arguments_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["a", "--inspect", "b"], ["a"]):
        assert command(*words) == 2
        assert "error: give" in capsys.readouterr().err
