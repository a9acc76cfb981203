"""Memory of CUDA graphs, and captures that leave nothing behind where they fail."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Who begins to capture waits for the GPU, which breaks off what others capture.
_one_at_a_time = threading.RLock()


@functools.cache
def _stream_of(index: int) -> torch.cuda.Stream:
    """One for all captures on a GPU: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream(index)


class GraphMemory:
    """Memory that graphs of one GPU share: they run one after the other.

    What was freed on a stream the allocator keeps for that stream, so all are captured on one.

    Args:
        device: the GPU, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream_of(device.index)
        self._last: torch.cuda.Stream | None = None
        self._left: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """For what is captured later: libraries set themselves up when they are first called.

        The current stream waits for what is asked for within, and that for the current stream.
        """
        current = torch.cuda.current_stream(self._device)
        with _one_at_a_time, torch.cuda.stream(self._stream):
            self._stream.wait_stream(current)
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
                # Other threads, such as those that load images, may go on meanwhile.
                mode = "thread_local"
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
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
        mode = "thread_local"
        with torch.cuda.graph(torch.cuda.CUDAGraph(), None, self._stream, capture_error_mode=mode):
            torch.zeros(1, device=self._device)

    def take_turn(self) -> None:
        """Before a replay: lets the current stream wait for the one of the replay before."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
