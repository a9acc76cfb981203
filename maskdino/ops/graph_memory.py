"""Memory of CUDA graphs, and captures that leave nothing behind where they fail."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Who begins to capture waits for the GPU, which breaks off what others capture.
_one_at_a_time = threading.RLock()
# What cuBLAS works in for a stream is given back as soon as a graph of that stream is gone, also
# from others that are left (PyTorch issue 193402).
CLEARS_WITH_GRAPHS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


class _Gpu:
    """Where graphs of a GPU are captured, and where they ran last.

    They share a stream: for that the allocator keeps what was freed on it, and cuBLAS what it works
    in.
    """

    def __init__(self, index: int) -> None:
        self.stream = torch.cuda.Stream(index)
        with torch.inference_mode(False):  # of use outside of it too
            self.number = torch.zeros(1, device=torch.device("cuda", index))
        self.last: torch.cuda.Stream | None = None


_gpu = functools.cache(_Gpu)


class GraphMemory:
    """Memory that graphs of one GPU share: they run one after the other.

    Args:
        device: the GPU, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._gpu = device, _gpu(device.index)
        self._pool = torch.cuda.graph_pool_handle()
        self._left: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For a replay on the current stream: after those of before, on whichever stream.

        Not for the backward pass: who captures may be waiting for its thread.
        """
        current = torch.cuda.current_stream(self._device)
        with _one_at_a_time:
            if self._gpu.last is not None and self._gpu.last != current:
                current.wait_stream(self._gpu.last)
            self._gpu.last = current
            yield

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """For what is captured later: libraries set themselves up when they are first called.

        The current stream waits for what is asked for within, and that for the current stream.
        """
        current = torch.cuda.current_stream(self._device)
        with self.turn():
            self._gpu.stream.wait_stream(current)
            with torch.cuda.stream(self._gpu.stream):
                yield
            current.wait_stream(self._gpu.stream)

    @contextmanager
    def captured(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures what is asked for within, where the device is the current one.

        Raises:
            RuntimeError: something within waits for the GPU, or cannot be captured.
        """
        graph, cause = torch.cuda.CUDAGraph(), None
        # Where a capture cannot be ended, `torch.cuda.graph` leaves its stream the current one.
        with _one_at_a_time, torch.cuda.stream(self._gpu.stream):
            try:
                if CLEARS_WITH_GRAPHS:  # cuBLAS is to work in memory of this pool
                    self._forget()
                with self._capturing(graph, self._pool):
                    try:
                        yield graph
                    except RuntimeError as error:
                        cause = error  # the error of the capture's end says less
                        raise
                if CLEARS_WITH_GRAPHS:
                    self._forget()
            except RuntimeError as error:
                self._unwind(graph)
                # Of a pool without graphs, which the other may be, the allocator knows no more.
                self._pool = torch.cuda.graph_pool_handle()
                raise cause or error from None
            finally:
                cause = None  # whose frames, this one too, hold what was under way

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # Other threads, such as those that load images, may go on meanwhile.
        mode = "thread_local"
        return torch.cuda.graph(graph, pool, self._gpu.stream, capture_error_mode=mode)

    def _forget(self) -> None:
        """Makes a graph and lets it go: with it what libraries know of a capture or its stream."""
        with self._capturing(torch.cuda.CUDAGraph(), None):
            self._gpu.number.zero_()

    def _unwind(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture for PyTorch too, which does not where CUDA has found it invalid.

        Else its allocator would keep unused memory where there is no other, and generators of older
        releases (2.11 for one) would draw no more numbers: these know a capture until one ends.
        """
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # before 2.8
        known = [getattr(torch._C, name) for name in names if hasattr(torch._C, name)]
        try:
            for end in known[:1]:
                end(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
            self._left.append(graph)  # the allocator of pinned memory is not told, and asks it
        except RuntimeError:  # it has ended
            pass
        self._forget()
