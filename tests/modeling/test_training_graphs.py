"""Training steps that replay: equal to steps that do not; without a GPU, so nothing is captured."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from maskdino.backbones.frozen_norm import FrozenNorm
from maskdino.model import MaskDINO
from maskdino.modeling import training_graphs
from maskdino.modeling.training_graphs import (
    CALLS_BEFORE,
    Step,
    TrainingGraphs,
    capture_step,
    stand_ins,
    tensors_of,
)
from maskdino.structures import Predictions
from tests.helpers import drawn_batch, tiny_cfg

SIZES = ((64, 64), (64, 48))
OBJECTS = ((3, 2), (5, 1), (0, 0), (2, 0), (1, 8))
TASKS = {
    "instance": {},
    "learned queries": {"QUERY_SELECTION__ENABLED": False},
    "no denoising": {"DENOISING__MODE": "off"},
    "boxes": {"MASK_ON": False},
    "recomputed": {"RECOMPUTE": "all"},
}


class Runs:
    """What stands in for a capture: a step that computes anew where graphs would replay.

    Steps share memory: the forward pass of one writes over the gradients of all.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.gradients: list[Tensor] = []
        self.forwards = 0

    def __call__(
        self, network: Callable, inputs: Sequence[Tensor], weights: Sequence[Tensor], _: object
    ) -> Step:
        self.shapes.append(tuple(inputs[0].shape))
        held = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        model = network.__self__
        assert weights == [x for x in model.parameters() if x.requires_grad]

        def sources() -> list[Tensor]:
            return [*held, *(x for x in model.parameters() if x.requires_grad)]

        result = network(*held).map(lambda x: x.detach().requires_grad_(x.requires_grad))
        output_gradients = [torch.zeros_like(x) for x in tensors_of(result) if x.requires_grad]
        outputs: list[Tensor] = []

        def forward() -> None:
            with torch.enable_grad():
                found = tensors_of(network(*held))
            for kept, new in zip(tensors_of(result), found, strict=True):
                kept.detach().copy_(new.detach())
            outputs[:] = [x for x in found if x.requires_grad]

        def replay() -> None:
            self.forwards += 1
            for shared in self.gradients:
                shared.fill_(float("nan"))
            forward()

        def gradients_of_outputs() -> tuple[Tensor | None, ...]:
            wanted = [x for x in sources() if x.requires_grad]
            return torch.autograd.grad(outputs, wanted, output_gradients, allow_unused=True)

        forward()
        found = iter(gradients_of_outputs())
        gradients = [next(found) if x.requires_grad else None for x in sources()]
        self.gradients += [x for x in gradients if x is not None]

        def backward() -> None:
            new = iter(gradients_of_outputs())
            for kept, source in zip(gradients, sources(), strict=True):
                grad = next(new) if source.requires_grad else None
                assert (kept is None) == (grad is None)
                if kept is not None:
                    kept.copy_(grad)

        return Step(held, replay, result, output_gradients, backward, gradients)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    monkeypatch.setattr(training_graphs, "capture_step", stand_in)
    monkeypatch.setattr(training_graphs, "GraphMemory", lambda device: device)
    return stand_in


def pair(**overrides: object) -> tuple[MaskDINO, MaskDINO]:
    """Equal models, of which the first replays; samples lie between cells, as after training."""
    torch.manual_seed(0)
    cfg = tiny_cfg(**overrides)
    cfg.MODEL.BACKBONE.NAME = "build_strided_convolutions"
    plain = MaskDINO(cfg).train()
    for layer in (*plain.encoder.layers, *plain.decoder.layers):
        nn.init.normal_(getattr(layer, "cross_attn", layer.self_attn).sampling_offsets.bias)
    replaying = copy.deepcopy(plain)
    replaying.training_graphs = TrainingGraphs()
    return replaying, plain


def step(model: MaskDINO, objects: tuple[int, int], sizes: Sequence = SIZES) -> dict[str, float]:
    """Losses; gradients are added up."""
    torch.manual_seed(sum(objects))
    losses = model(drawn_batch(sizes, objects, masks=model.pixel_embedding is not None))
    torch.stack(list(losses.values())).sum().backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}


def assert_equal_gradients(found: MaskDINO, expected: MaskDINO) -> None:
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            bound = 1e-3 * theirs.grad.norm().clamp(min=1e-3)
            assert (ours.grad - theirs.grad).norm() <= bound, name


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients(task: str, runs: Runs) -> None:
    models = pair(**TASKS[task])
    for number, objects in enumerate(OBJECTS):
        found, expected = (step(model, objects) for model in models)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert_equal_gradients(*models)
        assert runs.forwards == max(0, number + 1 - CALLS_BEFORE)
        for model in models:
            model.zero_grad(set_to_none=True)
    assert len(runs.shapes) == len(models[0].training_graphs) == 1


def test_gradients_are_added_up(runs: Runs) -> None:
    """Of several passes before a step: no pass writes over what another left."""
    models = pair()
    for number in range(3):  # of which the first is where the graphs left it
        for model in models:
            for _ in range(0 if number else CALLS_BEFORE):
                step(model, (2, 3))
            model.zero_grad(set_to_none=True)
            for objects in ((2, 3), (1, 1), (5, 0))[: number + 1]:
                step(model, objects)
    assert runs.forwards == 1 + 2 + 3
    assert_equal_gradients(*models)


def test_gradients_of_several_shapes_are_added_up(runs: Runs) -> None:
    models, sizes = pair(), (SIZES, ((96, 64), (64, 64)))
    for number in range(CALLS_BEFORE + 3):
        for model in models:
            model.zero_grad(set_to_none=True)
            for of_batch in sizes if number % 2 else sizes[::-1]:
                step(model, (2, 3), of_batch)
        assert_equal_gradients(*models)
    assert len(runs.shapes) == 2


def test_weights_that_change_in_place_change_the_replay(runs: Runs) -> None:
    models = pair()
    for model in models:
        for _ in range(CALLS_BEFORE + 1):
            before = step(model, (2, 1))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
    found, expected = (step(model, (2, 1)) for model in models)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found != pytest.approx(before, rel=1e-2)
    assert len(runs.shapes) == 1


def test_buffers_that_change_make_graphs_anew(runs: Runs) -> None:
    """A replay passes over modules, which keep what follows from their buffers."""
    models = pair()
    for model in models:
        model.backbone.layers[0] = nn.Sequential(model.backbone.layers[0], FrozenNorm(16))
    for scale in (1.0, 3.0):
        for model in models:
            model.backbone.layers[0][1].weight.fill_(scale)
        for _ in range(CALLS_BEFORE + 1):
            found, expected = (step(model, (2, 1)) for model in models)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(runs.shapes) == 2 and len(models[0].training_graphs) == 1


def test_the_shapes_that_come_again_first_have_graphs(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes in turns would else be captured again and again, which costs more than it saves."""
    model, _ = pair(DENOISING__MODE="off")
    model.training_graphs = TrainingGraphs(most=2)
    for _ in range(CALLS_BEFORE + 2):
        for size in (64, 96, 128):
            step(model, (1, 1), ((size, size),) * 2)
    assert [shape[-1] for shape in runs.shapes] == [64, 96] and runs.forwards == 4
    (record,) = caplog.records
    assert "more than 2 shapes" in record.message


def test_frozen_weights_and_precisions_have_graphs_of_their_own(runs: Runs) -> None:
    model, _ = pair()
    for _ in range(CALLS_BEFORE + 1):
        step(model, (1, 1))
    model.backbone.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    for _ in range(CALLS_BEFORE + 1):
        step(model, (1, 1))
    assert len(runs.shapes) == 2 and len(model.training_graphs) == 1
    assert all(weight.grad is None for weight in model.backbone.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(CALLS_BEFORE + 1):
            step(model, (1, 1))
    assert len(runs.shapes) == 3


def test_frozen_weights_that_are_replaced_make_graphs_anew(runs: Runs) -> None:
    models = pair()
    for model in models:
        model.backbone.requires_grad_(False)
    for _ in range(2):
        for _ in range(CALLS_BEFORE + 1):
            found, expected = (step(model, (1, 1)) for model in models)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        torch.manual_seed(3)
        first = torch.randn_like(models[0].backbone.layers[0].weight)
        for model in models:
            model.backbone.layers[0].weight = nn.Parameter(first.clone(), requires_grad=False)
            model.zero_grad(set_to_none=True)
    assert len(runs.shapes) == 2


def test_hooks_are_called(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = pair()
    called = []
    model.decoder.register_forward_hook(lambda *_: called.append(1))
    with caplog.at_level(logging.WARNING):
        for _ in range(CALLS_BEFORE + 2):
            step(model, (1, 1))
    assert len(called) == CALLS_BEFORE + 2 and not runs.shapes
    (record,) = caplog.records
    assert "decoder has a hook" in record.message


def test_hooks_of_all_modules_are_called(runs: Runs) -> None:
    model, _ = pair()
    called = Counter()
    handle = register_module_forward_hook(lambda module, *_: called.update([type(module)]))
    for _ in range(CALLS_BEFORE + 2):
        step(model, (1, 1))
    handle.remove()
    assert called[type(model.decoder)] == CALLS_BEFORE + 2 and not runs.shapes


def test_hooks_of_the_model_itself_are_called(runs: Runs) -> None:
    model, _ = pair()
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    for _ in range(CALLS_BEFORE + 2):
        step(model, (1, 1))
    assert len(called) == CALLS_BEFORE + 2 and runs.forwards == 2


def test_batch_norm_that_learns_is_not_replayed(
    runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = pair()
    model.backbone.layers[0] = nn.Sequential(model.backbone.layers[0], nn.BatchNorm2d(16))
    for _ in range(CALLS_BEFORE + 1):
        step(model, (1, 1))
    assert not runs.shapes and "backbone.layers.0.1 is batch norm" in caplog.text
    model.backbone.eval()
    for _ in range(CALLS_BEFORE + 1):
        step(model, (1, 1))
    assert len(runs.shapes) == 1


def test_what_cannot_be_captured_trains_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def fails(*_: object) -> None:
        tries.append(1)
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(training_graphs, "capture_step", fails)
    monkeypatch.setattr(training_graphs, "GraphMemory", lambda device: device)
    models = pair()
    for _ in range(CALLS_BEFORE + 3):
        found, expected = (step(model, (2, 1)) for model in models)
        assert found == pytest.approx(expected, rel=1e-4)
    (record,) = [r for r in caplog.records if "SOLVER.CUDA_GRAPHS" in r.message]
    assert record.message.endswith("out of memory") and len(tries) == 1


def test_without_gradients_nothing_is_replayed(runs: Runs) -> None:
    models = pair()
    with torch.no_grad():
        for _ in range(CALLS_BEFORE + 1):
            torch.manual_seed(1)
            losses = [model(drawn_batch(SIZES, (1, 1))) for model in models[:1]]
    assert losses and not runs.shapes


class Graph:
    """Its replay is counted."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Memory:
    """Captures run at once, as nothing stands in for CUDA."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    @contextlib.contextmanager
    def rehearsed(self) -> Iterator[None]:
        assert not self.graphs
        yield

    @contextlib.contextmanager
    def captured(self) -> Iterator[Graph]:
        self.graphs.append(Graph())
        yield self.graphs[-1]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return Memory()


def test_what_a_capture_holds(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs, results and gradients of the passes."""
    monkeypatch.setattr(torch, "zeros_like", torch.ones_like)  # gradients before the backward pass
    cached, gradients = [], training_graphs._gradients

    def watched(*args: Sequence[Tensor]) -> list[Tensor | None]:
        cached.append(torch.is_autocast_cache_enabled())
        return gradients(*args)

    monkeypatch.setattr(training_graphs, "_gradients", watched)
    _, model = pair()
    content = torch.randn(2, 6, 64, requires_grad=True)
    inputs = torch.randn(2, 3, 64, 64), content, torch.randn(2, 6, 4), torch.arange(6) // 3
    weights = list(model.parameters())
    held = capture_step(model._network, inputs, weights, memory)
    held.forward()
    assert [graph.replays for graph in memory.graphs] == [1, 0]
    held.backward()
    assert [graph.replays for graph in memory.graphs] == [1, 1]
    assert cached == [False, False] and torch.is_autocast_cache_enabled()
    assert all(torch.equal(a, b) and a is not b for a, b in zip(held.inputs, inputs, strict=True))
    expected = tensors_of(model._network(*inputs))
    for ours, theirs in zip(tensors_of(held.result), expected, strict=True):
        assert ours.is_leaf and ours.requires_grad == theirs.requires_grad
        torch.testing.assert_close(ours.detach(), theirs.detach())
    sum(x.sum() for x in expected if x.requires_grad).backward()
    for source, gradient in zip((*inputs, *weights), held.gradients, strict=True):
        assert (source.grad is None) == (gradient is None)
        if gradient is not None:
            assert (gradient - source.grad).norm() <= 1e-4 * source.grad.norm()


def test_gradients_of_a_sum_do_not_share_memory(memory: Memory) -> None:
    """Clipping changes each weight's gradient in place."""
    weights = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    boxes = torch.randn(3)
    held = capture_step(lambda x: Predictions(sum(weights), x, None), [boxes], weights, memory)
    of_boxes, *gradients = held.gradients
    assert of_boxes is None and len({x.data_ptr() for x in gradients}) == 3


def test_a_capture_leaves_out_what_earlier_steps_know_of_weights() -> None:
    """Whoever holds a step, as several processes do, holds the stream on which it ran."""
    _, model = pair()
    weights = list(model.parameters())
    known = {weight.view_as(weight).grad_fn.next_functions[0][0] for weight in weights}
    with pytest.raises(RuntimeError, match="full"), stand_ins(model, weights) as parameters:
        losses = model(drawn_batch(SIZES, (2, 1)))
        waiting, seen = [loss.grad_fn for loss in losses.values()], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions]
        found = {id(node.variable) for node in seen if hasattr(node, "variable")}
        assert found == {id(parameter) for parameter in parameters} and not seen & known
        for parameter, weight in zip(parameters, weights, strict=True):
            assert parameter.data_ptr() == weight.data_ptr() and parameter is not weight
        raise RuntimeError("full")
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_copies_begin_without_graphs(runs: Runs) -> None:
    model, _ = pair()
    for _ in range(CALLS_BEFORE + 1):
        step(model, (1, 1))
    graphs = model.training_graphs
    model.zero_grad(set_to_none=True)
    for other in (copy.deepcopy(model).training_graphs, pickle.loads(pickle.dumps(graphs))):
        assert isinstance(other, TrainingGraphs) and len(other) == 0
    assert len(graphs) == len(runs.shapes) == 1
