"""What a training on own data says of its time, with a clock that is set by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskdino.config import load_config
from maskdino.custom import measure
from maskdino.custom.measure import Pace, measure_pace, total_seconds
from maskdino.custom.training import Plan, TellTime


def test_seconds_of_a_whole_training() -> None:
    assert total_seconds(10, 0, 2.0, 5.0) == 25.0  # one evaluation, at the end
    assert total_seconds(10, 5, 2.0, 5.0) == 30.0
    assert total_seconds(10, 4, 2.0, 5.0) == 35.0  # after 4, 8 and 10


@pytest.mark.parametrize(
    ("planned", "text"),
    [
        (
            0.5,
            "After the first epoch: 2 s per iteration, where 0.5 were planned; "
            "the whole training takes about 0:03:50 instead of 0:01:20",
        ),
        (None, "After the first epoch: 2 s per iteration; the whole training takes about 0:03:50"),
    ],
)
def test_the_estimate_is_corrected_after_the_first_epoch(
    planned: float | None, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Plan(epoch=5, step=planned, evaluation=3.0).write(tmp_path)
    now = 0.0
    hook = TellTime(Plan.read(tmp_path), eval_period=10, clock=lambda: now)
    hook.trainer = SimpleNamespace(max_iter=100)
    said = []
    with caplog.at_level(logging.INFO):
        for step in range(12):
            hook.before_step()
            now += 60.0 if step < 2 else 2.0  # the first ones are slow
            hook.after_step()
            now += 500.0  # what the hooks after it take
            said.append(len(caplog.messages))
    assert said == [0] * 4 + [1] * 8
    assert caplog.messages == [text]


def test_runs_of_earlier_versions_have_no_plan(tmp_path: Path) -> None:
    assert Plan.read(tmp_path) is None


@pytest.mark.parametrize(
    ("busy", "own", "others"),
    [
        (19.0, 11.0, 0.8),  # of two cores, in ten seconds
        (20.0, 20.5, 0.0),  # clocks that tick apart
        (17.0, 2.0, 0.0),  # there is room for all
        (0.0, 2.0, 0.0),  # the system does not tell
    ],
)
def test_programs_that_take_time_from_a_trial(
    busy: float, own: float, others: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([(5.0, 100.0, 1.0), (15.0, 100.0 + busy, 1.0 + own)])
    monkeypatch.setattr(measure, "_processor_seconds", lambda: next(seconds))
    monkeypatch.setattr(measure, "_in_own_process", lambda *_: Pace(1.0, 2.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert measure_pace(load_config(None), print, 1) == Pace(1.0, 2.0, pytest.approx(others))


def test_seconds_of_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = tmp_path / "stat"
    statistics.write_text("cpu  100 200 300 9000 9000 10 20 30 50 60\ncpu0 1 2 3\n")
    monkeypatch.setattr(measure, "STATISTICS", statistics)
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    time, busy, own = measure._processor_seconds()
    assert busy == 6.6  # neither idle nor waiting for a disk; guests are users too
    assert own > 0
    statistics.unlink()
    later = measure._processor_seconds()
    assert later[0] > time and later[1] == 0
