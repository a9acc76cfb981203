"""Steps on a GPU: those of the CPU, mixed precision, no waiting, other GPUs, a group on NCCL."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.engine.train_step import TrainStep
from maskdino.model import MaskDINO
from tests.gpu.cases import TASKS, copy_to, make_batch, make_cfg, make_model, same_draws

pytestmark = pytest.mark.gpu

COUNTS = ((5, 3), (0, 1), (0, 0))  # objects of the two images
LOSS_BOUND = 1e-3  # relative
GRADIENT_BOUND = 2e-3  # norm of the difference of all gradients, relative
HALF_LOSS_BOUND = 0.1  # relative, of the first step: other queries may be selected
SPREAD = 0.05  # of the weights of the class head: the start of training
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def start_of_training(task: str, **overrides: object) -> MaskDINO:
    """A model on the CPU, in training mode."""
    return make_model(make_cfg(task, **overrides), class_spread=SPREAD).train()


def losses_and_gradients(
    model: MaskDINO, batch: list[dict]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Both by name, on the CPU."""
    with same_draws():
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = {
        name: weight.grad.double().cpu()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def assert_same_step(found: tuple, expected: tuple) -> None:
    """Compares what `losses_and_gradients` gives."""
    (losses, gradients), (their_losses, their_gradients) = found, expected
    assert losses == pytest.approx(their_losses, rel=LOSS_BOUND, abs=1e-5)
    assert gradients.keys() == their_gradients.keys()
    whole = norm(their_gradients.values())
    assert 0 < whole < math.inf
    difference = norm(gradients[name] - theirs for name, theirs in their_gradients.items())
    assert difference < GRADIENT_BOUND * whole
    for name, theirs in their_gradients.items():
        bound = 0.01 * (theirs.norm() + 1e-3 * whole)
        assert (gradients[name] - theirs).norm() < bound, name


def norm(tensors: Iterator[Tensor]) -> Tensor:
    """The norm of all numbers together."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_equal_the_cpu(
    task: str, counts: tuple[int, int], device: torch.device
) -> None:
    model, batch = start_of_training(task), make_batch(task, counts)
    found = losses_and_gradients(copy_to(model, device), batch)
    assert_same_step(found, losses_and_gradients(model, batch))


def test_layers_computed_twice_have_the_same_gradients(device: torch.device) -> None:
    model, batch = start_of_training("instance"), make_batch("instance")
    twice = start_of_training("instance", RECOMPUTE="all")
    found = losses_and_gradients(twice.to(device), batch)
    assert_same_step(found, losses_and_gradients(model, batch))


@pytest.fixture(params=DTYPES)
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A type to train in, chosen as the trainer chooses it: float16 where a GPU has no bfloat16."""
    if request.param == "float16":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    return request.param


def make_step(task: str, precision: str, device: torch.device) -> TrainStep:
    """Steps of a model on the device, from the start."""
    cfg = make_cfg(task)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER = 5e-4, 1.0
    model = start_of_training(task).to(device)
    step = TrainStep(
        model,
        build_optimizer(cfg, model),
        build_gradient_clipper(cfg),
        accumulation_steps=1,
        mixed_precision=precision != "float32",
    )
    if device.type == "cuda":
        assert step.grad_scaler.is_enabled() == (precision == "float16")
    return step


def run(step: TrainStep, batch: list[dict]) -> float:
    """One step with the same random numbers each time; its loss, before the step."""
    with same_draws():
        loss = step.run(iter([batch]))["total_loss"]
    assert math.isfinite(loss)
    return loss


def losses_of_accepted_steps(step: TrainStep, batch: list[dict], number: int) -> list[float]:
    """Losses of steps, without those that the loss scaler left out, which must change nothing.

    Each loss is of the weights before its step: a step that did nothing is followed by its equal.
    """
    losses = [run(step, batch)]
    for _ in range(16):
        loss = run(step, batch)
        if loss == pytest.approx(losses[-1], rel=1e-5):
            assert step.grad_scaler.is_enabled()
        else:
            losses.append(loss)
        if len(losses) == number:
            break
    return losses


@pytest.mark.parametrize("task", TASKS)
def test_steps_in_each_precision(task: str, precision: str, device: torch.device) -> None:
    """The loss of one batch falls in a few steps; batches with few objects, or none, come after."""
    step, batch = make_step(task, precision, device), make_batch(task)
    reference = start_of_training(task)
    with same_draws():
        expected = sum(reference(batch).values()).item()
    bound = LOSS_BOUND if precision == "float32" else HALF_LOSS_BOUND
    losses = losses_of_accepted_steps(step, batch, 3)
    assert losses[0] == pytest.approx(expected, rel=bound)
    assert losses[-1] < 0.95 * losses[0]
    for counts in COUNTS[1:]:
        run(step, make_batch(task, counts))
    step.check_gradient()
    assert all(weight.isfinite().all() for weight in step.model.parameters())
    assert all(weight.dtype == torch.float32 for weight in step.model.parameters())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the GPU, but for events, which nothing else waits with."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("task", "precision"),
    [*itertools.product(TASKS, ["bfloat16"]), ("instance", "float32"), ("instance", "float16")],
    indirect=["precision"],
)
def test_a_training_step_waits_for_nothing(task: str, precision: str, cuda: torch.device) -> None:
    """But for the copies of the matching costs and of the losses, by events."""
    step = make_step(task, precision, cuda)
    batches = [make_batch(task, counts) for counts in COUNTS]
    for _ in range(2):
        step.run(iter(batches[:1]))  # constants by shape, the optimizer's state
    for batch in batches:
        with no_waiting():
            scalars = step.run(iter([batch]))
        assert math.isfinite(scalars["total_loss"])


def test_waiting_is_noticed(cuda: torch.device) -> None:
    number = torch.ones((), device=cuda)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


def test_another_gpu_than_the_current_one(second_gpu: torch.device) -> None:
    model, batch = start_of_training("instance"), make_batch("instance")
    found = losses_and_gradients(copy_to(model, second_gpu), batch)
    assert torch.cuda.current_device() == 0
    assert_same_step(found, losses_and_gradients(model, batch))


OTHER_GPU = """
import torch
torch.cuda.set_device(1)
from tests.gpu.test_training import make_batch, make_step, run
run(make_step("instance", "bfloat16", torch.device("cuda", 1)), make_batch("instance"))
print([torch._C._cuda_hasPrimaryContext(gpu) for gpu in range(2)])
"""


@pytest.mark.usefixtures("second_gpu")
def test_other_gpus_are_not_touched(repository: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", OTHER_GPU]
    found = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[False, True]"


@pytest.fixture(scope="module", autouse=True)
def group(
    device: torch.device, tmp_path_factory: pytest.TempPathFactory, repository: Path
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that trains in a group of one, and its results: it runs beside the other tests."""
    folder = tmp_path_factory.mktemp("group")
    environment = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # a free one
        "NCCL_SOCKET_IFNAME": "lo",  # there may be no other network
        "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]),
    }
    output = folder / "losses.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.one_process", device, output]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=repository,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield process, output
    process.kill()
    process.wait()


def test_a_group_of_one_process_trains_as_no_group(
    device: torch.device, group: tuple[subprocess.Popen, Path]
) -> None:
    """As torchrun starts it: on NCCL with a GPU, on gloo without."""
    process, output = group
    assert process.wait(timeout=120) == 0, (output.parent / "log").read_text()[-4000:]
    found = json.loads(output.read_text())
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    assert found["grouped"] == pytest.approx(found["alone"], rel=1e-3)
    assert found["counted as two"] == pytest.approx(found["alone"][0], rel=1e-3)
    assert found["difference"] < 0.01
    assert found.get("replayed", found["alone"]) == pytest.approx(found["alone"], rel=1e-3)
    assert found.get("replayed difference", 0) < 0.01
