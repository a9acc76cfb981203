"""Tests of tools/train_net.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maskdino.cli import train
from maskdino.config import load_config
from maskdino.engine.evaluating import build_model
from tests.engine.stand_in import CONFIG, tiny_config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "nowhere.yaml"], "no configuration 'nowhere.yaml'"),
        (["SOLVER.BASE_LRR", "1"], "Unknown configuration key SOLVER.BASE_LRR.*SOLVER.BASE_LR"),
        (["NUM_QUERIES", "1"], "did you mean MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES"),
        (["SOLVER.MAX_ITER"], "KEY VALUE pairs"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch.*SOLVER.MAX_ITER"),
        (["MODEL.WEIGHTS", "lost.pth"], "there is no checkpoint lost.pth"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu', which is no device"),
        (["MODEL.MASK_DINO.TEST.PRECISION", "half"], "TEST.PRECISION is 'half'; it must be one of"),
        (
            ["MODEL.DEVICE", "cpu", "MODEL.MASK_DINO.TEST.PRECISION", "tf32"],
            "TEST.PRECISION is tf32, which the device cpu does not compute in; use auto or one of",
        ),
        (["--eval-only"], "the configuration names no MODEL.WEIGHTS: give"),
        (["--report", "DATASETS.TEST", "()"], "--report needs a dataset.* DATASETS.TEST is empty"),
    ],
)
def test_mistakes_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    if "--config-file" not in words:
        words = ["--config-file", str(CONFIG), *words]
    monkeypatch.setattr(sys, "argv", ["train_net.py", *words])
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        train.main()


def test_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("VERSION: 2\nMODEL:\n  MASK_DINO:\n    NUM_CLASS: 3\n")
    with pytest.raises(KeyError, match=r"MASK_DINO.NUM_CLASS in .*mine.yaml.*NUM_CLASSES"):
        train.read_config(train.parse_arguments(["--config-file", str(path)]))


def test_configurations_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    trap = tmp_path / "trap"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{trap}]\n")
    with pytest.raises(Exception, match="python/object"):
        train.read_config(train.parse_arguments(["--config-file", str(path)]))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.DEVICE", "cuda:7"], "MODEL.DEVICE is cuda:7, but PyTorch finds 2 GPUs here"),
        (
            ["--num-gpus", "2", "MODEL.DEVICE", "cuda:1"],
            "cuda:1, but each of 2 processes needs a GPU",
        ),
    ],
)
def test_gpus_that_are_not_there_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(CONFIG), *words])
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        train.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_training_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    settings = ("MODEL.DEVICE", "cuda", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    config.write_text(tiny_config(tmp_path / "out", *settings).dump())
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(config)])
    train.main()
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    said = [line for line in lines if "MODEL.DEVICE is cuda, but" in line]
    assert len(said) == 1 and said[0].endswith("computing on the CPU.")
    assert load_config(str(tmp_path / "out" / "config.yaml")).MODEL.DEVICE == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train_net.py", "--config-file", str(CONFIG), "--num-gpus", "2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="no GPU; use --num-processes"):
        train.main()


def test_trains_resumes_and_evaluates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    test_set = ("DATASETS.TEST", "('nuclei_val',)", "INPUT.MIN_SIZE_TEST", 32)
    config.write_text(tiny_config(tmp_path / "out", "SOLVER.MAX_ITER", 5, *test_set).dump())

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(config), *words])
        train.main()

    run("--report")
    out = tmp_path / "out"
    report = out / "report.html"
    first_page = report.read_text()
    report.unlink()
    assert load_config(str(out / "config.yaml")) == load_config(str(config))
    results = out / "inference" / "results.json"
    first = results.read_text()
    assert '"segm"' in first
    results.unlink()
    run("--resume")
    assert results.read_text() == first
    assert not report.exists()
    results.unlink()
    weights = ("MODEL.WEIGHTS", str(out / "model_final.pth"))
    run("--eval-only", "--report", *weights, "TEST.DETECTIONS_PER_IMAGE", "99")
    # What the training went by stays: it would be resumed with it.
    assert load_config(str(out / "config.yaml")) == load_config(str(config))
    assert load_config(str(out / "evaluation.yaml")).TEST.DETECTIONS_PER_IMAGE == 99
    assert results.read_text() == first
    assert report.read_text() == first_page
    assert "over 24 of 24 images" in first_page
    assert f"The report is {report}" in (out / "log.txt").read_text()
    assert "Command: train_net.py" in (out / "log.txt").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("MODEL.WEIGHTS", "{}", "OUTPUT_DIR", "out"),
        ("--opts", "MODEL.WEIGHTS", "{}", "OUTPUT_DIR", "out"),
        ("--weights", "{}", "OUTPUT_DIR", "out"),
        ("--weights", "{}", "--eval-only", "--opts", "OUTPUT_DIR", "out"),
    ],
)
def test_weights_and_keys_are_given_as_in_the_other_commands(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    config, weights = tmp_path / "config.yaml", tmp_path / "model.pth"
    cfg = tiny_config(tmp_path)
    config.write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    given = [word.format(weights) for word in words]
    args = train.parse_arguments(["--config-file", str(config), *given])
    assert args.eval_only == ("--eval-only" in words)
    read = train.read_config(args)
    assert Path(read.MODEL.WEIGHTS) == weights and read.OUTPUT_DIR == "out"


def test_each_process_knows_the_data_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that are started read no configuration: they are handed one."""
    config = tmp_path / "config.yaml"
    config.write_text(tiny_config(tmp_path).dump())
    args = train.parse_arguments(["--config-file", str(config), "--eval-only"])
    known = []
    monkeypatch.setattr(train, "register_beside", known.append)
    monkeypatch.setattr(train, "set_up", lambda cfg, **_: cfg)
    monkeypatch.setattr(train, "evaluate_weights", lambda *_, **__: {})
    train.run(args, tiny_config(tmp_path))
    assert known == [config]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal as Ctrl-C does")
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_training_ends_in_one_line(
    processes: int, repository: Path, tmp_path: Path, warm_python: str
) -> None:
    python = warm_python if processes == 1 else sys.executable
    words = ["--config-file", "nuclei/instance/maskdino_tiny", "--num-processes", str(processes)]
    words += ["SOLVER.IMS_PER_BATCH", "2", "INPUT.LSJ.SIZE", "[64, 64]"]
    words += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "out")]
    process = subprocess.Popen(
        [python, "-m", "maskdino", "train", *words],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches all processes of a terminal's group
    )
    lines = iter(process.stdout.readline, "")
    assert any("training starts at iteration 0" in line for line in lines)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted.*; go on with --resume", rest.splitlines()[-1])
    assert "Traceback" not in rest
    assert (tmp_path / "out" / "last_checkpoint").is_file()
