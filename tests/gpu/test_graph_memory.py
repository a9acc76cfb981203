"""Captures on a GPU: those that fail, memory that is shared, replays of several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from maskdino.modeling.cuda_graphs import CALLS_BEFORE
from maskdino.ops.graph_memory import GraphMemory
from tests.gpu.cases import error_of, make_batch, make_cfg, make_model

pytestmark = pytest.mark.gpu

LARGE = 1 << 26  # bytes
BOUND = 1e-2  # of boxes in bfloat16, in parts of the largest


@pytest.fixture
def memory(cuda: torch.device) -> GraphMemory:
    return GraphMemory(torch.ones(1, device=cuda).device)


def test_a_capture_that_waits_leaves_nothing_behind(memory: GraphMemory) -> None:
    stream, x = torch.cuda.current_stream(), torch.ones(4, device="cuda")
    for _ in range(2):
        with pytest.raises(RuntimeError), memory.captured():
            (x + 1).sum().item()
        assert torch.cuda.current_stream() == stream
        assert torch.rand(3, device="cuda").sum().item() > 0
    with memory.captured() as graph:
        y = x + 1
    graph.replay()
    assert y.tolist() == [2.0] * 4


def test_a_graph_of_before_replays_after_a_failure(memory: GraphMemory) -> None:
    x = torch.ones(4, device="cuda")
    with memory.captured() as graph:
        y = x + torch.rand_like(x)
    with pytest.raises(RuntimeError), memory.captured():
        x.sum().item()
    torch.manual_seed(0)
    graph.replay()
    torch.manual_seed(0)
    assert y.equal(x + torch.rand_like(x))


def test_graphs_share_memory(memory: GraphMemory) -> None:
    x = torch.ones(LARGE // 4, device="cuda")
    reserved, kept = [torch.cuda.memory_reserved()], []
    for _ in range(3):
        with memory.captured() as graph:
            kept.append((graph, (x + 1).sum()))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] - reserved[0] < 2 * LARGE


def test_a_graph_outlives_others(memory: GraphMemory) -> None:
    """Long sums of few processors, for which cuBLAS takes memory."""
    left, right = torch.randn(2, 1 << 15, 640, device="cuda").bfloat16()
    with memory.rehearsed():
        left.t() @ right
    with memory.captured() as graph:
        found = left.t() @ right
    graph.replay()
    expected, other = found.clone(), GraphMemory(left.device)
    with other.rehearsed():
        right.t() @ left
    with other.captured() as gone:
        right.t() @ left
    del gone, other
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = torch.full((LARGE,), torch.nan, device="cuda")
    graph.replay()
    assert found.equal(expected) and taken.isnan().all()


def test_captures_go_on_after_one_without_memory(memory: GraphMemory) -> None:
    x = torch.ones(LARGE // 4, device="cuda")
    kept = []
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError), memory.captured():
            kept.append(x + 1)
            torch.empty(1 << 50, device="cuda")
        with memory.captured() as graph:
            y = x + 1
        graph.replay()
        assert y.sum().item() == 2 * len(x)


def test_threads_on_streams_of_their_own(cuda: torch.device) -> None:
    """And two models."""
    plain, *models = (
        make_model(make_cfg("instance", TEST__PRECISION="bfloat16", TEST__CUDA_GRAPHS=graphs))
        .eval()
        .to(cuda)
        for graphs in (False, True, True)
    )
    batches = [plain.preprocess(make_batch("instance", seed=seed)).tensor for seed in range(8)]
    with torch.no_grad():
        expected = [plain.predict_precisely(images)[0].boxes for images in batches]
        for model in models:
            model.predict_precisely(batches[0])  # makes what all threads read
    torch.cuda.synchronize()
    assert min(error_of(x, expected[0]) for x in expected[1:]) > 5 * BOUND

    @torch.no_grad()
    def error(number: int) -> float:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = models[number % 2].predict_precisely(batches[number])[0].boxes
            torch.cuda.current_stream().synchronize()
        return error_of(found, expected[number])

    with ThreadPoolExecutor(4) as threads:
        for _ in range(CALLS_BEFORE + 3):
            assert max(threads.map(error, range(8))) < BOUND
    assert all(len(model._graphs) == 1 for model in models)
