"""Assignments of least cost, solved in threads while the caller goes on.

Shape key: O outputs, Q queries, N objects of the batch.
"""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskdino.structures import Matches, Targets

logger = logging.getLogger(__name__)

IMPOSSIBLE = 1e6  # stands for a cost that is not finite


class PendingMatches:
    """Costs on their way to the host, and assignments that threads work on."""

    def __init__(self, costs: Tensor, targets: Targets) -> None:
        """Starts with the costs (O, Q, N) of giving an object to a query of its image."""
        self._targets, self._device = targets, costs.device
        self._copied = None
        if costs.is_cuda:
            self._costs = torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True)
            self._costs.copy_(costs, non_blocking=True)
            # Of the device that copies, which need not be the current one.
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(costs.device))
        else:
            self._costs = costs.cpu()
        self._pairs = _waiter().submit(self._solve)

    def result(self) -> Matches:
        """Waits for the assignments."""
        return Matches.from_numpy(self._pairs.result(), self._device)

    def _solve(self) -> list[np.ndarray]:
        """For each image (4, pairs): output, image, query and target of each pair."""
        if self._copied is not None:
            # Without it, a thread's first call of CUDA makes a context on the first GPU.
            with torch.cuda.device(self._device):
                self._copied.synchronize()
        costs, targets, pairs = self._costs.numpy(), self._targets, []
        for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
            of_image = _finite(costs[..., first : first + count], targets.names[image])
            solved = _solvers().map(linear_sum_assignment, of_image)
            parts = [
                np.stack([np.full_like(q, output), np.full_like(q, image), q, first + target])
                for output, (q, target) in enumerate(solved)
            ]
            pairs.append(np.concatenate(parts, axis=1))
        return pairs


@functools.cache
def _waiter() -> ThreadPoolExecutor:
    """One thread, which waits for the GPU and for the others."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="matching")


@functools.cache
def _solvers() -> ThreadPoolExecutor:
    """Threads that compute at the same time: SciPy's solver releases the interpreter lock."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="assignment")


def _finite(costs: np.ndarray, name: str) -> np.ndarray:
    bad = ~np.isfinite(costs)
    if not bad.any():
        return costs
    logger.warning(
        "%d of %d matching costs of image %s are not finite; matched as impossible",
        bad.sum(),
        costs.size,
        name,
    )
    return np.nan_to_num(costs, nan=IMPOSSIBLE, posinf=IMPOSSIBLE, neginf=IMPOSSIBLE)
