"""Trains a narrow model in a process group of one, and without: a script for one of the tests.

    RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=... MASTER_PORT=... \\
        python -m tests.gpu.one_process DEVICE OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maskdino.engine.launch import launch
from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.engine.train_step import TrainStep, distribute
from tests.gpu.cases import make_batch, make_cfg, make_model, same_draws

BATCHES = ((5, 3), (0, 2), (2, 2), (0, 0))  # objects of the images: two steps of two micro-batches


def make_step(model: nn.Module) -> TrainStep:
    """Steps in float32, of two micro-batches each, without momentum, which enlarges rounding."""
    cfg = make_cfg("instance")
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTUM, cfg.SOLVER.BASE_LR = "SGD", 0.0, 1e-4
    return TrainStep(
        model,
        build_optimizer(cfg, getattr(model, "module", model)),
        build_gradient_clipper(cfg),
        accumulation_steps=2,
        mixed_precision=False,
    )


def run(step: TrainStep) -> list[float]:
    """Total losses of two steps."""
    batches = iter([make_batch("instance", counts) for counts in BATCHES])
    losses = []
    for number in range(len(BATCHES) // 2):
        with same_draws(number):
            losses.append(step.run(batches)["total_loss"])
    return losses


def distance(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between weights."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def main(device: torch.device, output: Path) -> None:
    """Writes losses, and by which part of what was learned the weights differ in the end."""
    torch.backends.cudnn.allow_tf32 = False
    start, alone, grouped, two = (
        make_model(make_cfg("instance"), class_spread=0.05).to(device) for _ in range(4)
    )
    as_two = mock.patch.object(comm, "get_world_size", lambda: 2)
    with as_two:  # one process alone is not wrapped
        wrapped = distribute(grouped)
    assert isinstance(wrapped, DistributedDataParallel)
    losses = {"alone": run(make_step(alone)), "grouped": run(make_step(wrapped))}
    losses["difference"] = distance(alone, grouped) / distance(alone, start)
    losses["backend"] = torch.distributed.get_backend()
    if device.type == "cuda":
        replayed = make_model(make_cfg("instance"), class_spread=0.05).to(device)
        replayed.replay_in_training()
        with as_two:
            wrapped = distribute(replayed)
        losses["replayed"] = run(make_step(wrapped))
        assert len(replayed.training_graphs) == 1
        losses["replayed difference"] = distance(alone, replayed) / distance(alone, start)
    # As if there were a second process, without objects and without losses: half the objects
    # double the losses, and half the losses are their mean.
    with as_two:
        losses["counted as two"] = run(make_step(two))[0]
    output.write_text(json.dumps(losses))


if __name__ == "__main__":
    launch(main, torch.device(sys.argv[1]), Path(sys.argv[2]), processes=1)
