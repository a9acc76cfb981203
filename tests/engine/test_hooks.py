"""Tests of maskdino.engine.hooks, with a counter in the trainer's place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from maskdino.checkpoint.ema import WeightAverage
from maskdino.engine.hooks import (
    ConsoleWriter,
    Evaluate,
    PeriodicCheckpoint,
    Resources,
    SaveAverage,
)


class Recorder:
    """A checkpointer that writes down what it is asked to save."""

    def __init__(self, look: Callable[[], object] = lambda: None) -> None:
        self.saved: list[tuple] = []
        self.look = look

    def save(self, name: str, **kwargs: object) -> None:
        self.saved.append((name, kwargs, self.look()))


def after_steps(hook: HookBase, steps: int, check: Callable[[], None] = lambda: None) -> None:
    """Calls the hook as a trainer does."""
    for iteration in range(steps):
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=steps, check_gradient=check)
        hook.after_step()


@pytest.mark.parametrize(
    ("period", "steps", "expected"),
    [
        (3, 7, [("model_0000002", 2), ("model_0000005", 5), ("model_final", 6)]),
        (3, 6, [("model_0000002", 2), ("model_final", 5)]),
        (10, 4, [("model_final", 3)]),
    ],
)
def test_checkpoints_are_of_sound_steps(period: int, steps: int, expected: list) -> None:
    checked: list[int] = []
    recorder = Recorder(lambda: len(checked))
    after_steps(PeriodicCheckpoint(recorder, period), steps, lambda: checked.append(1))
    # Each checkpoint after one more check.
    assert recorder.saved == [
        (name, {"iteration": iteration}, number)
        for number, (name, iteration) in enumerate(expected, start=1)
    ]


def test_broken_weights_are_not_saved() -> None:
    def check() -> None:
        raise FloatingPointError("broken")

    recorder = Recorder()
    with pytest.raises(FloatingPointError, match="broken"):
        after_steps(PeriodicCheckpoint(recorder, 2), 5, check)
    assert recorder.saved == []


def test_a_period_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="CHECKPOINT_PERIOD is 0"):
        PeriodicCheckpoint(Recorder(), 0)


def test_the_average_is_saved_at_the_end() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.5)
    nn.init.constant_(model.weight, 2.0)
    average.load_state_dict({"weight": torch.tensor([[7.0]])})
    recorder = Recorder(lambda: model.weight.item())
    hook = SaveAverage(recorder, average)
    for iteration in (3, 4):  # the training was interrupted after its last step, or came to its end
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=4)
        hook.after_train()
    assert recorder.saved == [("model_final", {}, 7.0)]
    assert model.weight.item() == 2.0


@pytest.mark.parametrize("iteration", [3, 4])
def test_no_evaluation_after_an_error_in_the_last_iteration(iteration: int) -> None:
    evaluated: list[int] = []
    hook = Evaluate(0, lambda: evaluated.append(iteration))
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=4)
    hook.after_train()
    assert evaluated == [4] * (iteration == 4)


def test_throughput_and_memory() -> None:
    hook = Resources(6, torch.device("cpu"))
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(storage=storage)
        hook.after_step()
        assert "images_per_second" not in storage.latest()  # the first step has no time yet
        storage.put_scalar("time", 1.5)
        hook.after_step()
        assert storage.latest()["images_per_second"][0] == 4.0
        assert 50 < storage.latest()["max_memory_mb"][0] < 1e6


def test_the_line_of_the_console(caplog: pytest.LogCaptureFixture) -> None:
    writer = ConsoleWriter(max_iter=10)
    with EventStorage(3) as storage, caplog.at_level(logging.INFO, "maskdino"):
        values = {"loss_mask": 2.0, "loss_mask_layer1": 9.0, "loss_box_layer1": 8.0, "lr": 1e-4}
        for name, value in {"total_loss": 12.0, "time": 0.5, **values}.items():
            storage.put_scalar(name, value)
        writer.write()
        writer.write()  # once for each iteration
        assert storage.latest()["eta_seconds"][0] == 3  # six more of half a second
        assert storage.smoothing_hints()["eta_seconds"] is False  # of half an hour ago: no use
        storage.iter = 10
        writer.write()  # nothing after the end
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        "iter 4/10  eta 0:00:03  0.5 s/iter  total_loss 12  loss_box_layer1 8  loss_mask 2  "
        "lr 0.0001"
    )
