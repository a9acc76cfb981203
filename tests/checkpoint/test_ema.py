"""Tests of maskdino.checkpoint.ema that need no training; those of its formula are the engine's."""

import pytest
import torch
from torch import nn

from maskdino.checkpoint.ema import WeightAverage


def test_the_model_has_its_own_weights_again_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    torch.nn.init.constant_(model.weight, 3.0)
    average.update()
    kept = average.state_dict()["weight"].clone()
    with pytest.raises(OSError, match="disk full"), average.applied():
        assert torch.equal(model.weight, kept)
        raise OSError("disk full")
    assert (model.weight == 3.0).all()
    assert torch.equal(average.state_dict()["weight"], kept)
