"""The ten-minute command, dry on a CPU: every step reports, and nothing that was found is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import load_module


def command(
    repository: Path, *words: object, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    script = repository / "tools" / "gpu_check.py"
    return subprocess.run(
        [python, str(script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_dry_run_reports_every_step_and_is_read(
    repository: Path, tmp_path: Path, warm_python: str
) -> None:
    words = ("--out", tmp_path, "--device", "cpu", "--dry", "--limit", 500)
    done = command(repository, *words, python=warm_python)
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path)
    assert not [line for line in lines if "FAILED" in line], lines
    steps = load_module(repository / "tools" / "gpu_check.py").STEPS
    names = [step.name for step in steps]
    ran = [line["ran"] for line in lines if line["step"] == "runner"]
    assert sorted(ran) == sorted(names)
    timed = [step.name for step in steps if step.alone]
    assert ran[-len(timed) :] == timed  # when all others have ended
    assert {line["step"] for line in lines} == {"runner", *names}
    for step in ("operator_is_right", "training_is_sound"):
        outcomes = [line["ok"] for line in lines if line["step"] == step]
        assert len(outcomes) > 10 and all(outcomes)
    (parity,) = (line for line in lines if line["step"] == "parity")
    assert max(parity["of"].values()) < 1e-5
    read = command(repository, "--read", tmp_path)
    assert read.returncode == 0
    for step in names:
        assert f"### {step.replace('_', ' ')}\n" in read.stdout
    header = (
        "| precision | batch | size | objects | recompute | graphs | first_loss | ms | peak_mib |"
    )
    assert header in read.stdout


def test_a_step_that_hangs_is_stopped_and_what_it_said_stays(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_module(repository / "tools" / "gpu_check.py")
    script = tmp_path / "hangs.py"
    script.write_text(
        "import pathlib, sys, time\n"
        f"print({tool.READY!r}, flush=True)\n"
        "sys.stdin.readline()\n"
        f"path = pathlib.Path({str(tmp_path / 'results.jsonl')!r})\n"
        'open(path, \'a\').write(\'{"step": "first", "ms": 1}\\n\')\n'
        "try:\n"
        "    time.sleep(600)\n"
        "finally:\n"
        "    print('what failed before', flush=True)\n"
    )
    monkeypatch.setattr(tool, "__file__", str(script))
    args = tool.parse_arguments(["--out", str(tmp_path), "--device", "cpu"])
    steps = [tool.Step(name, "none", "none", 2) for name in ("first", "second")]
    tool.run_steps(steps, args)
    lines = lines_of(tmp_path)
    assert [line.get("ran") for line in lines] == [None, "first", None, "second"]
    stopped = [line for line in lines if line["step"] == "runner"]
    assert all("limit of 2 s" in line["FAILED"] for line in stopped)
    assert all("what failed before" in line["tail"] for line in stopped)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{}", "--limit", "30"], "--limit is 30 seconds; at least 60 are needed"),
        (["--out", "{}/file/below"], "cannot be written"),
        (["--out", "{}", "--only", "speed"], "--only names the steps ['speed']; there are"),
        (["--out", "{}", "--peer", "{}/none"], "is no folder"),
        (["--read", "{}/none"], "has no results.jsonl"),
        ([], "give --out DIR"),
    ],
)
def test_bad_input_is_one_line(
    repository: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    done = command(repository, *(word.format(tmp_path) for word in words))
    assert done.returncode in (1, 2)
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [("None False", "built without CUDA"), ("13.0 False", "finds no GPU")],
)
def test_a_missing_gpu_is_one_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, answer: str, message: str
) -> None:
    tool = load_module(repository / "tools" / "gpu_check.py")
    done = subprocess.CompletedProcess([], 0, stdout=answer, stderr="")
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ValueError, match=message):
        tool.check_gpu()
