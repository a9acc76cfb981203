"""Training steps whose network is replayed as CUDA graphs, against steps kernel by kernel."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from maskdino.backbones.frozen_norm import FrozenNorm
from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.engine.train_step import TrainStep
from maskdino.modeling.training_graphs import CALLS_BEFORE, TrainingGraphs
from tests.gpu.cases import TASKS, make_batch, make_cfg, make_model, same_draws
from tests.gpu.test_training import no_waiting

pytestmark = pytest.mark.gpu

OBJECTS = ((5, 3), (0, 1), (0, 0), (2, 7))
SPREAD = 0.05  # of the weights of the class head: the start of training
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
# A rounding may select another query, in a half type nearly always.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}


def make_step(
    task: str,
    device: torch.device,
    precision: str,
    *,
    replays: bool,
    accumulation: int = 1,
    **overrides: object,
) -> TrainStep:
    """Steps of a model on the device, from the start."""
    cfg = make_cfg(task, **overrides)
    model = make_model(cfg, class_spread=SPREAD).train().to(device)
    model.training_graphs = TrainingGraphs() if replays else None
    step = TrainStep(
        model,
        build_optimizer(cfg, model),
        build_gradient_clipper(cfg),
        accumulation_steps=accumulation,
        mixed_precision=precision != "float32",
    )
    assert step._dtype is DTYPES[precision]
    return step


def run(step: TrainStep, batches: list[list[dict]]) -> tuple[float, float]:
    """One step with the same random numbers each time; its loss, and the norm of its gradient."""
    with same_draws():
        loss = step.run(iter(batches))["total_loss"]
    return loss, float(step._gradient_norm)


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_steps_equal_those_kernel_by_kernel(
    task: str, precision: str, recompute: str, cuda: torch.device
) -> None:
    if recompute != "none" and task != "instance":
        pytest.skip("the same layers")
    steps = [
        make_step(task, cuda, precision, replays=replays, RECOMPUTE=recompute)
        for replays in (True, False)
    ]
    for number in range(CALLS_BEFORE + 5):
        batch = make_batch(task, OBJECTS[number % len(OBJECTS)], seed=number)
        found, expected = (run(step, [batch]) for step in steps)
        assert found == pytest.approx(expected, rel=BOUNDS[precision], abs=1e-3), number
    assert len(steps[0].model.training_graphs) == 1


def test_somebody_holds_what_autograd_knows_of_weights(cuda: torch.device) -> None:
    """As `DistributedDataParallel` does: a capture must not wait for the stream of that time."""
    steps = [make_step("instance", cuda, "float32", replays=replays) for replays in (True, False)]
    held = [weight.view_as(weight).grad_fn for weight in steps[0].model.parameters()]
    for number in range(CALLS_BEFORE + 2):
        batch = make_batch("instance", (2, 3), seed=number)
        found, expected = (run(step, [batch]) for step in steps)
        assert found == pytest.approx(expected, rel=BOUNDS["float32"]), number
    assert held and len(steps[0].model.training_graphs) == 1


def test_several_batches_of_a_step(cuda: torch.device) -> None:
    steps = [
        make_step("instance", cuda, "float32", replays=replays, accumulation=3)
        for replays in (True, False)
    ]
    for number in range(5):
        batches = [
            make_batch("instance", (2, 3), seed=3 * number + i)[i % 2 :]  # two canvases
            for i in range(3)
        ]
        found, expected = (run(step, batches) for step in steps)
        assert found == pytest.approx(expected, rel=BOUNDS["float32"]), number


def test_a_replayed_step_waits_for_nothing(cuda: torch.device) -> None:
    step = make_step("instance", cuda, "bfloat16", replays=True)
    batches = [make_batch("instance", counts) for counts in OBJECTS]
    for _ in range(CALLS_BEFORE + 1):
        step.run(iter(batches[:1]))
    for batch in batches:
        with no_waiting():
            assert math.isfinite(step.run(iter([batch]))["total_loss"])
    assert len(step.model.training_graphs) == 1


def test_other_sizes_and_evaluation_in_between(cuda: torch.device) -> None:
    """Graphs share memory with each other, and not with what runs beside them."""
    steps = [make_step("instance", cuda, "float32", replays=replays) for replays in (True, False)]
    for number in range(3 * (CALLS_BEFORE + 2)):
        batch = make_batch("instance", (2, 3), seed=number)
        batch = batch if number % 3 else batch[1:]  # another canvas
        found, expected = (run(step, [batch]) for step in steps)
        assert found == pytest.approx(expected, rel=BOUNDS["float32"]), number
        if number % 4 == 0:
            for step in steps:
                step.model.eval()
                with torch.no_grad():
                    step.model(batch)
                step.model.train()
    assert len(steps[0].model.training_graphs) == 2


def test_norms_that_are_loaded_anew_count(cuda: torch.device) -> None:
    """A graph reads what a frozen norm made of its buffers, as long as that stays."""
    steps = [make_step("instance", cuda, "float32", replays=replays) for replays in (True, False)]
    batches = [make_batch("instance", (2, 3), seed=1), make_batch("instance", (2, 3), seed=1)[1:]]
    norms = [m for s in steps for m in s.model.modules() if isinstance(m, FrozenNorm)]
    assert norms
    for number in range(2 * (CALLS_BEFORE + 2)):
        if number == CALLS_BEFORE + 1:
            for norm in norms:
                norm.weight.mul_(1.1)
        batch = batches[number == CALLS_BEFORE + 1]  # another canvas, which runs as it is
        found, expected = (run(step, [batch]) for step in steps)
        assert found == pytest.approx(expected, rel=BOUNDS["float32"]), number


def test_a_network_that_waits_trains_on(
    cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    step = make_step("instance", cuda, "float32", replays=True)
    network = step.model._network

    def waits(images: torch.Tensor, *noised: torch.Tensor) -> object:
        images.sum().item()
        return network(images, *noised)

    step.model._network = waits
    with caplog.at_level(logging.WARNING):
        losses = [run(step, [make_batch("instance")])[0] for _ in range(CALLS_BEFORE + 3)]
        step.run(iter([make_batch("instance")]))  # whose numbers the GPU draws
    assert losses[-1] < losses[0] and len(step.model.training_graphs) == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len([r for r in caplog.records if "kernel by kernel" in r.message]) == 1
