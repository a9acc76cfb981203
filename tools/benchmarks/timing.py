"""Measuring time and memory alike for all contenders, and describing the machine."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

MEBIBYTE = 2**20
# Of glibc's malloc.h, and where its thresholds settle by themselves in a program of large blocks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTLED_TRIM, _SETTLED_MMAP = 64 * MEBIBYTE, 32 * MEBIBYTE


def describe_machine(device: str, threads: int | None) -> str:
    """Set the number of threads and return a Markdown list of everything a number depends on."""
    if threads is not None:
        torch.set_num_threads(threads)
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    lines = [
        f"- date: {datetime.date.today().isoformat()}",
        f"- processor: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads "
        f"used, instruction set of torch {torch.backends.cpu.get_cpu_capability()}",
        f"- load of the machine before the run (1/5/15 minutes): {load}",
        f"- versions: torch {torch.__version__}, Python {platform.python_version()}",
    ]
    if device == "cuda":
        lines.append(f"- GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return "\n".join(lines) + "\n"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def median_milliseconds(
    contenders: Mapping[str, Callable[[], object]], repeats: int, device: str, clock: str = "wall"
) -> dict[str, float]:
    """Time contenders in turns, so that a busy moment hits all of them, after one warm-up each.

    On a GPU the time between two events of its stream is taken, and nothing waits until all calls
    are on their way: waiting inside would add the host's way to the GPU and back to every call.

    Args:
        contenders: calls by name.
        repeats: timed calls of each.
        device: "cuda" takes the GPU's time.
        clock: "wall", or "cpu" for the processor time of all threads; a GPU has its own.
    """
    for run in contenders.values():
        run()
    if device == "cuda":
        return _median_on_gpu(contenders, repeats)
    now = time.perf_counter if clock == "wall" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = now()
            run()
            times[name].append(1e3 * (now() - start))
    return {name: statistics.median(numbers) for name, numbers in times.items()}


def _median_on_gpu(
    contenders: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    torch.cuda.synchronize()
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    for _ in range(repeats):
        for name, run in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            spans.setdefault(name, []).append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) for begin, end in pairs)
        for name, pairs in spans.items()
    }


def peak_mebibytes(run: Callable[[], object], device: str) -> float:
    """Return how much memory a call holds at its peak beyond what was held before it.

    On a CPU that is resident memory as Linux counts it; large blocks are taken from the system and
    given back at once, so that none is hidden in what the allocator kept. Measure memory before
    time: timed calls leave blocks behind that the allocator hands out again.
    """
    gc.collect()
    if device == "cuda":
        run()  # what a first call loads and keeps
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    allocator = ctypes.CDLL(None)
    allocator.mallopt(_M_MMAP_THRESHOLD, MEBIBYTE)
    run()  # what a first call loads and keeps
    allocator.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_kib = _status("VmRSS")
    run()
    peak = (_status("VmHWM") - before_kib) / 1024
    allocator.mallopt(_M_MMAP_THRESHOLD, _SETTLED_MMAP)
    allocator.mallopt(_M_TRIM_THRESHOLD, _SETTLED_TRIM)
    return peak


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
