"""Whole trainings on a GPU: interrupted and resumed, to rounding, and to the bit if asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine.hooks import CallbackHook

from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.modeling.training_graphs import CALLS_BEFORE
from tests.engine.stand_in import read_checkpoint
from tests.engine.test_trainer import assert_same
from tests.gpu.cases import make_cfg
from tests.gpu.drawn import drawn_dataset  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu

ITERATIONS = 4
MIDDLE = "model_0000001.pth"  # checkpoint after two iterations


@dataclass
class Run:
    """A training that was watched."""

    folder: Path
    images: list[list[str]] = field(default_factory=list)  # of each iteration
    losses: list[float] = field(default_factory=list)
    graphs: int = 0  # with which it ended


def run_cfg(dataset: str, device: torch.device, folder: Path) -> CfgNode:
    """Four iterations in mixed precision, with averaged weights and a checkpoint in the middle."""
    cfg = make_cfg("instance", NUM_CLASSES=2)
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR, cfg.SEED = str(device), str(folder), 5
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (dataset,), ()
    cfg.INPUT.LSJ.SIZE = [64, 96]
    cfg.DATALOADER.NUM_WORKERS = 0
    solver = cfg.SOLVER
    solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS = 2, ITERATIONS, (), 0
    solver.CHECKPOINT_PERIOD = 2
    solver.AMP.ENABLED = solver.EMA.ENABLED = True
    return cfg


def train(cfg: CfgNode, *, resume: bool = False) -> Run:
    """Trains, and notes images and losses."""
    run = Run(Path(cfg.OUTPUT_DIR))
    trainer = MaskDINOTrainer(cfg)
    trainer.model.register_forward_pre_hook(
        lambda _, inputs: run.images.append([image["file_name"] for image in inputs[0]])
    )
    trainer.register_hooks(
        [CallbackHook(after_step=lambda t: run.losses.append(t.storage.latest()["total_loss"][0]))]
    )
    trainer.resume_or_load(resume)
    trainer.train()
    run.graphs = len(trainer.model.training_graphs or ())
    return run


def train_twice(dataset: str, device: torch.device, folder: Path) -> tuple[Run, Run]:
    """A run, and another that goes on from the first one's checkpoint in the middle.

    The second one reads its data in another process, which must not matter.
    """
    whole = train(run_cfg(dataset, device, folder / "whole"))
    rest = folder / "rest"
    rest.mkdir()
    shutil.copy(whole.folder / MIDDLE, rest)
    (rest / "last_checkpoint").write_text(MIDDLE)
    cfg = run_cfg(dataset, device, rest)
    cfg.DATALOADER.NUM_WORKERS = 1
    return whole, train(cfg, resume=True)


def test_a_resumed_run_goes_on(
    drawn_dataset: str,  # noqa: F811
    device: torch.device,
    tmp_path: Path,
) -> None:
    """Same data; losses to rounding, for sums in the backward pass come in any order."""
    whole, rest = train_twice(drawn_dataset, device, tmp_path)
    assert len(whole.images) == ITERATIONS
    assert rest.images == whole.images[2:]
    assert rest.losses[0] == pytest.approx(whole.losses[2], rel=1e-3)
    assert rest.losses[1] == pytest.approx(whole.losses[3], rel=0.05)
    ours, theirs = (read_checkpoint(run.folder) for run in (rest, whole))
    assert ours.keys() == theirs.keys()
    assert ours["trainer"]["scheduler"] == theirs["trainer"]["scheduler"]


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    """Asks torch for deterministic algorithms during a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic_algorithms")
def test_a_resumed_run_ends_with_the_same_bits_if_asked(
    drawn_dataset: str,  # noqa: F811
    device: torch.device,
    tmp_path: Path,
) -> None:
    whole, rest = train_twice(drawn_dataset, device, tmp_path)
    assert rest.losses == whole.losses[2:]
    assert_same(read_checkpoint(rest.folder), read_checkpoint(whole.folder))


def test_graphs_of_a_training_that_evaluates_averaged_weights(
    drawn_dataset: str,  # noqa: F811
    device: torch.device,
    tmp_path: Path,
) -> None:
    """The exchange with the averaged weights drops graphs, which are made anew."""
    runs = []
    for replays in (True, False):
        cfg = run_cfg(drawn_dataset, device, tmp_path / str(replays))
        cfg.SOLVER.CUDA_GRAPHS, cfg.SOLVER.AMP.ENABLED = replays, False
        cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = (drawn_dataset,), CALLS_BEFORE + 2
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
        cfg.SOLVER.MAX_ITER = 2 * cfg.TEST.EVAL_PERIOD
        runs.append(train(cfg))
    found, expected = runs
    assert found.losses == pytest.approx(expected.losses, rel=0.1)
    assert (found.graphs, expected.graphs) == (int(device.type == "cuda"), 0)
