"""Graphs by shape: when they are made, kept, replayed and left out; without a GPU."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from maskdino.modeling import cuda_graphs
from maskdino.modeling.cuda_graphs import CALLS_BEFORE, CudaGraphs
from maskdino.modeling.layers import map_sine_embedding
from maskdino.ops.constants import holding_constants
from maskdino.structures import Predictions
from tests.helpers import tiny_model


class Network(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.calls = 0

    def predict(self, images: Tensor) -> tuple[Predictions, None]:
        self.calls += 1
        total = self.layer(images.sum().view(1, 1))
        return Predictions(total, total, None), None


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes in the order in which they are captured; replays do not call the network."""
    shapes: list[tuple[int, ...]] = []

    def capture(network: Callable, images: Tensor, _: object) -> Callable:
        shapes.append(tuple(images.shape))
        model = network.__self__

        def replay(images: Tensor) -> tuple[Predictions, None]:
            calls = model.calls
            results = network(images)
            model.calls = calls
            return results

        return replay

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "GraphMemory", lambda device: device)
    return shapes


def call(graphs: CudaGraphs, model: Network, size: int, key: object = None) -> float:
    images = torch.ones(1, 3, 2, size)
    with torch.no_grad():
        return graphs(model, model.predict, images, key)[0].boxes.item()


def test_a_shape_that_comes_again_is_captured_once(captured: list) -> None:
    model, graphs = Network(), CudaGraphs()
    found = [call(graphs, model, 5) for _ in range(CALLS_BEFORE + 3)]
    assert captured == [(1, 3, 2, 5)]
    assert model.calls == CALLS_BEFORE
    assert len(set(found)) == 1
    assert call(graphs, model, 6) != found[0] and len(graphs) == 1


def test_the_least_recently_used_is_forgotten(captured: list) -> None:
    model, graphs = Network(), CudaGraphs(most=2)
    for size in (5, 6, 5, 7, 5, 6):
        for _ in range(CALLS_BEFORE + 1):
            call(graphs, model, size)
    assert [shape[-1] for shape in captured] == [5, 6, 7, 6]
    assert len(graphs) == 2


def test_more_shapes_in_turns_than_there_is_room_for(captured: list) -> None:
    """A capture takes as long as many replays."""
    model, graphs = Network(), CudaGraphs(most=2)
    for _ in range(4 * (CALLS_BEFORE + 1)):
        for size in (5, 6, 7):
            call(graphs, model, size)
    assert len(captured) <= 4 * 3 and len(graphs) == 2


def test_what_a_capture_fixes_makes_another_graph(captured: list) -> None:
    model, graphs = Network(), CudaGraphs()
    for key in ("float32", "bfloat16"):
        for _ in range(CALLS_BEFORE + 2):
            call(graphs, model, 5, key)
    assert len(captured) == 2
    before = call(graphs, model, 5, "float32")
    with torch.no_grad():
        model.layer.weight.add_(1)  # in place: the graph reads it where it is
    assert call(graphs, model, 5, "float32") != before
    assert len(captured) == 2
    model.layer.weight = nn.Parameter(model.layer.weight.clone())
    for _ in range(CALLS_BEFORE + 1):
        call(graphs, model, 5, "float32")
    assert len(captured) == 3


def test_a_network_that_was_replaced_is_not_kept() -> None:
    replaced, graphs = Network(), CudaGraphs()
    call(graphs, replaced, 5, replaced)
    kept, other = weakref.ref(replaced), Network()
    del replaced
    call(graphs, other, 5, other)
    gc.collect()
    assert kept() is None


@pytest.mark.usefixtures("captured")
def test_hooks_and_gradients_are_not_passed_over() -> None:
    model, graphs = Network(), CudaGraphs()
    for _ in range(CALLS_BEFORE + 1):
        call(graphs, model, 5)
    seen = []
    handle = model.layer.register_forward_hook(lambda *_: seen.append(1))
    call(graphs, model, 5)
    assert len(seen) == 1
    handle.remove()
    calls = model.calls
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    call(graphs, model, 5)
    everywhere.remove()
    assert model.calls == calls + 1
    calls = model.calls
    call(graphs, model, 5)
    assert model.calls == calls
    results, _ = graphs(model, model.predict, torch.ones(1, 3, 2, 5), None)
    assert results.boxes.requires_grad


def test_a_network_that_cannot_be_captured_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "GraphMemory", lambda device: device)
    model, graphs = Network(), CudaGraphs()
    with caplog.at_level(logging.WARNING):
        found = {call(graphs, model, size) for size in (5, 5, 5, 5, 5)}
    assert len(found) == 1 and model.calls == 5 and len(graphs) == 0
    (record,) = caplog.records
    assert "operation not permitted" in record.getMessage() and "more" not in record.getMessage()


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads images where it always does: what a thread put there must be its own still."""

    def capture(network: Callable, images: Tensor, _: object) -> Callable:
        held = images.clone()

        def replay(images: Tensor) -> tuple[Predictions, None]:
            held.copy_(images)
            time.sleep(0.01)  # another thread goes on
            return network(held)

        return replay

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "GraphMemory", lambda device: device)
    model, graphs = Network(), CudaGraphs()

    @torch.no_grad()
    def predicted(number: int) -> bool:
        images = torch.full((1, 3, 2, 5), float(number))
        found = graphs(model, model.predict, images, None)[0].boxes
        return bool(found.equal(model.predict(images)[0].boxes))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(predicted, range(12)))
    assert len(graphs) == 1


@pytest.mark.usefixtures("captured")
def test_copies_begin_without_graphs() -> None:
    model, graphs = Network(), CudaGraphs(most=3)
    for _ in range(CALLS_BEFORE + 1):
        call(graphs, model, 5)
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert len(other) == 0
        assert len(graphs) == 1


def test_training_forgets_the_graphs_of_an_evaluation() -> None:
    model = tiny_model().eval()
    graphs = model._graphs
    assert model.eval()._graphs is graphs
    assert model.train()._graphs is not graphs


def test_constants_are_held() -> None:
    before = map_sine_embedding(((3, 4),), 8, torch.device("cpu"))
    with holding_constants() as held:
        again = map_sine_embedding(((3, 4),), 8, torch.device("cpu"))
    assert len(held) == 1 and held[0] is again is before
    map_sine_embedding(((3, 4),), 8, torch.device("cpu"))
    assert len(held) == 1


def test_who_holds_equal_constants_holds_on() -> None:
    """As do two threads that capture."""
    with holding_constants() as held:
        with holding_constants() as other:
            map_sine_embedding(((3, 4),), 8, torch.device("cpu"))
        found = map_sine_embedding(((3, 5),), 8, torch.device("cpu"))
    assert len(other) == 1 and held[-1] is found
