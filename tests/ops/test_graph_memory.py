"""Captures that fail, and replays on several streams; something stands in for CUDA."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from maskdino.ops import graph_memory
from maskdino.ops.graph_memory import GraphMemory

GPU = torch.device("cuda", 1)


class Stream:
    def __init__(self, device: object = None) -> None:
        self.device, self.waits_for = device, []

    def wait_stream(self, other: Stream) -> None:
        self.waits_for.append(other)


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __del__(self) -> None:
        if self.cuda.clears:
            self.cuda.works.clear()


class Number:
    def zero_(self) -> None:
        pass


class Cuda:
    """What PyTorch (2.6 to 2.14) does of a capture, also where CUDA has found it invalid.

    Attributes:
        current: stream.
        open: pools for which a capture allocates.
        draws: whether generators draw numbers outside of a capture.
        invalid: whether the capture that is under way is.
    """

    def __init__(self) -> None:
        self.usual = self.current = Stream(GPU)
        self.open: list[object] = []
        self.refused: list[object] = []  # whose graphs are gone, or which are known as open still
        self.draws, self.invalid = True, False
        self.pools = 0
        self.clears = False  # whether a graph that is gone takes along where cuBLAS works
        self.works: list[str] = []  # in which memory cuBLAS does, on the stream of captures

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, _: object, pool: object, stream: Stream, *, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and pool not in self.refused
        assert pool is None or not (self.clears and self.works)
        before, self.current = self.current, stream
        self.open.append(pool)
        self.draws = False
        try:
            yield
        except Exception:
            self.refused.append(pool)
            raise
        finally:
            if self.invalid:
                self.invalid = False
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end(GPU.index, pool)
            self.draws, self.current = True, before

    def end(self, device: int, pool: object) -> None:
        if pool not in self.open:
            raise RuntimeError("not currently recording to mempool_id")
        assert device == GPU.index
        self.open.remove(pool)

    def wait(self) -> None:
        """Of the host, for the GPU: CUDA finds the capture invalid."""
        self.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")


END = "_cuda_endAllocateToPool"


@pytest.fixture(params=[(END, True), (END, False), ("_cuda_endAllocateCurrentStreamToPool", False)])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """That of newer and of older releases."""
    it = Cuda()
    end, it.clears = request.param
    for name in ("graph", "graph_pool_handle", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(it, name))
    monkeypatch.setattr(graph_memory, "_gpu", functools.cache(graph_memory._Gpu))
    monkeypatch.setattr(graph_memory, "CLEARS_WITH_GRAPHS", it.clears)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(it))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: it.current)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: Number())
    monkeypatch.delattr(torch._C, END, raising=False)
    monkeypatch.setattr(torch._C, end, it.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
    return it


def test_captures_are_made_on_one_stream(cuda: Cuda) -> None:
    streams = set()
    for memory in (GraphMemory(GPU), GraphMemory(GPU)):
        with memory.rehearsed():
            streams.add(cuda.current)
            assert cuda.current.waits_for[-1] is cuda.usual
        assert cuda.usual.waits_for[-1:] == [*streams]
        for _ in range(2):
            with memory.captured() as graph:
                streams.add(cuda.current)
                assert graph is not None and cuda.open
            assert cuda.current is cuda.usual and not cuda.open
    (stream,) = streams
    assert stream.device == GPU.index and stream is not cuda.usual


def test_a_capture_that_fails_leaves_nothing_behind(cuda: Cuda) -> None:
    memory = GraphMemory(GPU)
    for _ in range(2):  # the second as if there had been no first
        with pytest.raises(RuntimeError, match="not permitted"), memory.captured():
            cuda.wait()
        assert cuda.current is cuda.usual and cuda.draws and not cuda.open
    with memory.captured():
        pass


def test_what_fails_beside_cuda_ends_the_capture(cuda: Cuda) -> None:
    memory = GraphMemory(GPU)
    for message in ("out of memory", "a number"):
        with pytest.raises(RuntimeError, match=message), memory.captured():
            raise RuntimeError(message)
        assert cuda.current is cuda.usual and cuda.draws and not cuda.open
    with memory.captured():
        pass


def test_what_was_under_way_is_let_go(cuda: Cuda) -> None:
    """Where memory ran out, the step that follows needs it: before Python looks for cycles."""
    memory, known = GraphMemory(GPU), []

    def runs_out() -> None:
        activations = Stream()
        known.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    gc.disable()
    try:
        with pytest.raises(RuntimeError) as caught, memory.captured():
            runs_out()
        del caught
        assert known[0]() is None
    finally:
        gc.enable()
    assert not cuda.open


def test_where_cublas_works_is_there_as_long_as_graphs(cuda: Cuda) -> None:
    """In newer releases in memory of each graph's own pool, in older ones for good."""
    memory, kept = GraphMemory(GPU), []
    with memory.rehearsed():
        cuda.works.append("of the stream")
    for _ in range(2):
        with memory.captured() as graph:
            kept.append(graph)
            if not cuda.works:
                cuda.works.append("of the pool")
        assert cuda.works == ([] if cuda.clears else ["of the stream"])
    with pytest.raises(RuntimeError), memory.captured():
        cuda.works.append("of the pool that is gone")
        cuda.wait()
    assert not (cuda.clears and cuda.works)


def test_streams_take_turns(cuda: Cuda) -> None:
    """Also with graphs of other memory: cuBLAS may work in one place for all of a stream."""
    memories, other = (GraphMemory(GPU), GraphMemory(GPU)), Stream(GPU)
    for memory in memories:
        with memory.turn():
            pass
    assert not cuda.usual.waits_for
    with cuda.stream(other), memories[0].turn():
        assert other.waits_for == [cuda.usual]
    with memories[1].turn():
        assert cuda.usual.waits_for == [other]


def test_a_rehearsal_waits_for_replays_and_they_for_it(cuda: Cuda) -> None:
    memory, other = GraphMemory(GPU), Stream(GPU)
    with cuda.stream(other), memory.turn():
        pass
    with memory.rehearsed():
        stream = cuda.current
    assert cuda.usual.waits_for == [other, stream] and stream.waits_for == [cuda.usual]
    with cuda.stream(other), memory.turn():
        assert other.waits_for == [cuda.usual]


def test_memory_made_in_inference_is_of_use_in_training(cuda: Cuda) -> None:
    modes = []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(
            torch, "zeros", lambda *_, **__: modes.append(torch.is_inference_mode_enabled())
        )
        GraphMemory(GPU)
    assert modes == [False] and cuda.pools == 1
