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


@functools.cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """Of all captures on a GPU, as the allocator keeps what is freed on a stream for that one."""
    return torch.cuda.Stream(index)


class GraphMemory:
    """Memory that graphs of one GPU share: they run one after the other.

    Args:
        device: the GPU, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream_of(device.index)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None
        self._left: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """For what is captured later: libraries set themselves up when they are first called.

        The current stream waits for what is asked for within, and that for the current stream.
        """
        current = torch.cuda.current_stream(self._device)
        with _one_at_a_time:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)

    @contextmanager
    def captured(self) -> Iterator[torch.cuda.CUDAGraph]:
        """Captures what is asked for within, where the device is the current one.

        Raises:
            RuntimeError: something within waits for the GPU, or cannot be captured.
        """
        graph, cause = torch.cuda.CUDAGraph(), None
        # Where a capture cannot be ended, `torch.cuda.graph` leaves its stream the current one.
        with _one_at_a_time, torch.cuda.stream(self._stream):
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

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        """Captures; where cuBLAS works is memory of the graph's own pool.

        Else it works where it did for other graphs of this stream, and PyTorch 2.14 gives that back
        as soon as one of them is gone, of whatever pool (issue 193402).
        """
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads, such as those that load images, may go on meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode=mode):
                yield
        finally:
            torch._C._cuda_clearCublasWorkspaces()

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

    def take_turn(self) -> None:
        """Before a replay: lets the current stream wait for the one of the replay before."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
