"""Signals wait for what must not be left half done."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from torch import nn

from maskdino.checkpoint.ema import WeightAverage
from maskdino.system.signals import ENDING, uninterrupted


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", ENDING)
def test_the_block_ends_before_the_signal_comes(number: int) -> None:
    seen: list[str] = []

    def handle(*_: object) -> None:
        seen.append("signal")
        raise KeyboardInterrupt

    before = signal.signal(number, handle)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), number)
            seen.append("end")
        assert seen == ["end", "signal"]
        assert signal.getsignal(number) is handle
    finally:
        signal.signal(number, before)


def test_other_threads_change_no_handlers() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    seen: list[list[object]] = []

    def look() -> None:
        with uninterrupted():
            seen.append([signal.getsignal(number) for number in ENDING])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_weights_are_never_half_exchanged() -> None:
    """Ctrl-C as the averaged weights take the model's place: a checkpoint is saved after it."""
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    whole = model.state_dict

    def interrupted() -> dict:
        os.kill(os.getpid(), signal.SIGINT)
        return whole()

    model.state_dict = interrupted
    with pytest.raises(KeyboardInterrupt), average.applied():
        pass
    assert all(torch.equal(value, own[name]) for name, value in whole().items())
