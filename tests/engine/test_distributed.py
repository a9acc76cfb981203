"""Mask DINO trained by several processes, and on several machines, against one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from torch import Tensor

from maskdino.engine.launch import launch
from maskdino.ops.points import PointSampler
from tests.engine.stand_in import read_checkpoint, tiny_config, train, train_in_process
from tests.helpers import NARROW

# What depends on the batch of a process, or is drawn at random, differs by design: noised queries
# (padded to the most objects of an image of the batch) are off, points are fixed below. Adam would
# make much of the rounding of gradients that are almost nothing.
SETTINGS = {
    **NARROW,
    "MODEL.MASK_DINO.NUM_CLASSES": 1,
    "MODEL.MASK_DINO.DENOISING.MODE": "off",
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.MAX_ITER": 3,
    "SOLVER.CHECKPOINT_PERIOD": 100,
}


# As in configs/coco/ablation/table11_mask_only.yaml.
MASKS_ALONE = {
    f"MODEL.MASK_DINO.{node}.{term}_WEIGHT": 0.0
    for node in ("MATCHER", "LOSS")
    for term in ("L1", "GIOU")
}


def config(output: Path, overrides: dict[str, object] | None = None) -> CfgNode:
    """Three steps of the narrow model on four small nuclei images each."""
    settings = SETTINGS | (overrides or {})
    return tiny_config(output, *(word for item in settings.items() for word in item))


def train_at_fixed_points(cfg: CfgNode) -> None:
    """Trains with the same points for each mask, wherever it is computed."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(1, cfg.MODEL.MASK_DINO.LOSS.NUM_POINTS, 2, generator=generator)

    def sample_uniform(_: PointSampler, number: int, device: torch.device) -> Tensor:
        return places.to(device).expand(number, -1, -1)

    def sample_uncertain(sampler: PointSampler, maps: Tensor) -> Tensor:
        return sampler.sample_uniform(len(maps), maps.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PointSampler, "sample_uniform", sample_uniform)
        patch.setattr(PointSampler, "sample_uncertain", sample_uncertain)
        train(cfg)


def losses(folder: Path) -> dict[str, float]:
    """The last logged losses of a run."""
    last = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    return {name: value for name, value in last.items() if "loss" in name}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_at_fixed_points(config(folder))
    return folder


def assert_trained_alike(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    ours, theirs = read_checkpoint(found)["model"], read_checkpoint(expected)["model"]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("forked")
def test_two_processes_train_as_one(alone: Path, tmp_path: Path) -> None:
    launch(train_at_fixed_points, config(tmp_path), processes=2)
    assert_trained_alike(tmp_path, alone)


@pytest.mark.usefixtures("forked")
def test_two_processes_train_masks_alone(tmp_path: Path) -> None:
    """Several processes wait for the gradient of every trainable parameter."""
    denoising = {"MODEL.MASK_DINO.DENOISING.MODE": "boxes_and_masks"}
    launch(train_in_process, config(tmp_path, MASKS_ALONE | denoising), processes=2)
    assert read_checkpoint(tmp_path)["iteration"] == 2
    terms = {name.split("_")[1] for name in losses(tmp_path) if name != "total_loss"}
    assert terms == {"class", "mask"}


@pytest.mark.slow
def test_two_machines_train_as_one(
    alone: Path, tmp_path: Path, repository: Path, warm_python: str
) -> None:
    """Two launchers that know each other by address alone, as on two machines.

    Their processes are spawned, as those of users, and not copied.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from maskdino.engine.launch import launch\n"
        "from tests.engine.test_distributed import config, train_at_fixed_points\n"
        "if __name__ == '__main__':\n"
        "    folder, rank = Path(sys.argv[1]), int(sys.argv[2])\n"
        "    launch(train_at_fixed_points, config(folder), processes=1, machines=2,\n"
        f"           machine_rank=rank, url={url!r})\n"
    )
    file = tmp_path / "machine.py"
    file.write_text(script)
    machines = [
        subprocess.Popen(
            [warm_python, str(file), str(tmp_path), str(rank)],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(repository)},
        )
        for rank in range(2)
    ]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    assert_trained_alike(tmp_path, alone)
