"""Steps of the ten-minute command that end early, or of which a part fails, say what they know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import pytest


@pytest.fixture(autouse=True)
def _tools(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the tools is on the module path while a test runs."""
    monkeypatch.syspath_prepend(str(repository / "tools"))


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_tests_that_are_stopped_say_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_checks import common, others

    class Pytest:
        """Is interrupted with the step, and then takes a while."""

        def __init__(self, _: list[str], *, stdout: TextIO, **__: object) -> None:
            self.log, self.waited = Path(stdout.name), False

        def wait(self) -> int:
            if not self.waited:
                self.waited = True
                raise KeyboardInterrupt
            self.log.write_text("FAILED tests/test_a.py::test_b - assert\n= 1 failed in 9 s =\n")
            return 2

    monkeypatch.setattr(others.subprocess, "Popen", Pytest)
    others.tests(common.Run("pytest_gpu", tmp_path, "cuda", dry=False))
    summary, failed = lines_of(tmp_path)
    assert summary["status"] == 2 and "1 failed" in summary["summary"]
    assert "test_b" in failed["FAILED"]


def test_a_case_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_checks import common, training

    def fails(_: common.Run, precision: str, __: int, *, recompute: str, replays: bool) -> None:
        if replays:
            raise RuntimeError("out of memory")
        run.say(precision=precision, recompute=recompute)

    run = common.Run("training_speed", tmp_path, "cuda", dry=False)
    monkeypatch.setattr(training, "_speed", fails)
    training.speed(run)
    lines = lines_of(tmp_path)
    assert len(lines) == len(training.SPEED_CASES)
    assert ["FAILED" in line for line in lines] == [case[-1] for case in training.SPEED_CASES]
