"""Large blocks of memory on a CPU: kept by the process, rather than given back at each release."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

# How variables begin by which users decide how memory is allocated.
DECISIONS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_large_blocks(device: torch.device) -> bool:
    """Lets glibc keep large blocks that are freed, where a process computes on the CPU.

    By default a tensor of 32 MiB or more is allocated as a mapping of its own, which is given back
    when the tensor is freed: in each step the system makes its pages again, and fills them with
    zeros. Blocks that are kept serve the next tensors as they are. The process then stays as large
    as it once was.

    Where the user has set one of `DECISIONS`, nothing is changed.

    Returns:
        Whether this process now keeps its blocks.
    """
    decided = any(name.startswith(DECISIONS) for name in os.environ)
    if device.type != "cpu" or decided or platform.libc_ver()[0] != "glibc":
        return False
    allocator = ctypes.CDLL(None)
    return bool(allocator.mallopt(M_MMAP_MAX, 0) and allocator.mallopt(M_TRIM_THRESHOLD, NEVER))
