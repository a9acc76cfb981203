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


class _Gpu:
    """Where graphs of a GPU are captured, and where they ran last.

    They share a stream, as the allocator keeps what was freed on a stream for that stream, and
    cuBLAS its memory for each stream that it has seen. So they share that memory, too.
    """

    def __init__(self, index: int) -> None:
        self.stream = torch.cuda.Stream(index)
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
                with self._capturing(graph, self._pool):
                    try:
                        yield graph
                    except RuntimeError as error:
                        cause = error  # the error of the capture's end says less
                        raise
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

    def _unwind(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture for PyTorch too, which does not where CUDA has found it invalid.

        Else its allocator would keep unused memory where there is no other, and generators of older
        releases (2.11 for one) would draw no more numbers.
        """
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # before 2.8
        known = [getattr(torch._C, name) for name in names if hasattr(torch._C, name)]
        try:
            for end in known[:1]:
                end(self._device.index, self._pool)
        except RuntimeError:  # it has ended
            return
        torch._C._cuda_releasePool(self._device.index, self._pool)
        self._left.append(graph)  # the allocator of pinned memory is not told, and asks it further
        # Generators begin and end with a capture, whichever.
        with self._capturing(torch.cuda.CUDAGraph(), None):
            torch.zeros(1, device=self._device)
