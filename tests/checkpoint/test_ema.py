"""Tests of maskdino.checkpoint.ema that need no training; those of its formula are the engine's."""

import pytest
import torch
from torch import nn

from maskdino.checkpoint.ema import WeightAverage


def test_the_model_has_its_own_weights_again_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    torch.nn.init.constant_(model.weight, 3.0)
    average.update(0)
    kept = average.state_dict()["weight"].clone()
    with pytest.raises(OSError, match="disk full"), average.applied():
        assert torch.equal(model.weight, kept)
        raise OSError("disk full")
    assert (model.weight == 3.0).all()
    assert torch.equal(average.state_dict()["weight"], kept)


def test_a_short_training_forgets_where_it_began() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.995)
    expected = model.weight.item()
    for step in range(3):
        torch.nn.init.constant_(model.weight, float(step))
        average.update(step)
        kept = (1 + step) / (10 + step)
        expected = kept * expected + (1 - kept) * step
    torch.testing.assert_close(average.state_dict()["weight"], torch.tensor([[expected]]))
    for step in range(3, 200):
        torch.nn.init.constant_(model.weight, float(step))
        average.update(step)
    # A constant decay of 0.995 would still hold 0.37 of the first weights, and be at 73.
    assert 170 < float(average.state_dict()["weight"]) < 190


def test_late_steps_keep_what_they_were_told_to() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.995)
    began = model.weight.item()
    torch.nn.init.constant_(model.weight, 1.0)
    average.update(1790)
    wanted = torch.tensor([[0.995 * began + 0.005]])
    torch.testing.assert_close(average.state_dict()["weight"], wanted)
