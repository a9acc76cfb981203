"""Large tensors on a CPU get the memory of those before them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest
import torch

from maskdino.system import allocator

PAGES = (64 << 20) // 4096

COUNT = f"""
import resource, sys, torch
from maskdino.system.allocator import keep_large_blocks
kept = keep_large_blocks(torch.device(sys.argv[1]))
torch.ones(1)
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({PAGES} * 1024)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *faults)
"""


def faults(python: str, device: str, **environment: str) -> list[int]:
    """Whether blocks are kept, and the page faults of ten tensors of 64 MiB, one by one."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(allocator.DECISIONS)}
    done = subprocess.run(
        [python, "-c", COUNT, device],
        env=given | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has what is set")
def test_later_tensors_take_the_pages_of_earlier_ones(warm_python: str) -> None:
    kept, *counts = faults(warm_python, "cpu")
    assert kept
    # Not of each: the first ones, being aligned, find too little room, by the state of the heap.
    assert statistics.median(counts) < PAGES / 100
    # On a GPU, and where the user decided, the default stays: not told by the pages, which a
    # system with large pages everywhere has fewer of.
    assert faults(warm_python, "cuda")[0] == 0
    assert faults(warm_python, "cpu", MALLOC_MMAP_MAX_="65536")[0] == 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert not allocator.keep_large_blocks(torch.device("cpu"))
