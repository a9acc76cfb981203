"""What the steps share: the report, time, memory, launches, host waits.

Nothing of this package is imported here: in a process of the released code, `maskdino` is its own.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
LINES = "results.jsonl"
TOP_KERNELS = 60
NAME_LENGTH = 200  # of a kernel
PLACES = 12  # lines of code that are named with their number of waits
REPLAY_MS = 50.0  # that a timed series of replays takes, roughly
CONFIGS = str(ROOT / "configs/coco/{}/maskdino_{}.yaml")
R50, TINY = CONFIGS.format("instance", "R50"), CONFIGS.format("instance", "tiny")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# PyTorch's defaults: convolutions may round to TF32, matrix products may not.
DEFAULTS = "as released"
PRECISION_KEY = "MODEL.MASK_DINO.TEST.PRECISION"


@dataclass(frozen=True)
class Run:
    """What every step is given: its name, where it runs and where its lines go."""

    step: str
    out: Path
    device: str  # "cuda" or "cpu"
    dry: bool  # small sizes, to try the steps themselves
    peer: Path | None = None  # a checkout of the released implementation

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def say(self, **values: object) -> None:
        """Appends one result to the report, safe on the disk before the next one begins."""
        line = json.dumps({"step": self.step, **values})
        print(line, flush=True)
        with open(self.out / LINES, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def attempt(self, **case: object) -> Iterator[None]:
        """Inside, an error costs a line of the report; what follows is worth trying."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.say(**case, FAILED=f"{type(error).__name__}: {error}"[:600])

    def wait(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize()


def milliseconds(run: Run, call: Callable[[], object], repeats: int = 10) -> float:
    """Median over blocks of the time of a call that follows others, as in a loop that never waits.

    A block is `repeats` calls; the clock is read before and after it, and only there waits anybody.
    """
    repeats, warm = (1, 0) if run.dry else (repeats, 3)
    for _ in range(warm):
        call()
    times = []
    gc.collect()  # its walks through the many objects of recorded launches are no time of the call
    gc.disable()
    try:
        for _ in range(3):
            run.wait()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            run.wait()
            times.append(1e3 * (time.perf_counter() - start) / repeats)
    finally:
        gc.enable()
    return round(statistics.median(times), 3)


def measure(run: Run, case: dict, call: Callable[[], object], repeats: int = 10) -> None:
    """Says time and memory of a call, and in a line of their own its waits and launches."""
    ms = milliseconds(run, call, repeats)
    run.say(**case, ms=ms, peak_mib=peak_mebibytes(run, call))
    with host_waits(run) as waits:
        call()
    places = dict(waits.most_common(PLACES))
    run.say(**case, waits=sum(waits.values()), where=places, **launches(run, call))


def captured(call: Callable[[], object], calls: int = 1) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of several calls, and the result of the last, which a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # a capture that fails leaves its stream the current one
        call()
        call()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def replayed_microseconds(call: Callable[[], object]) -> float:
    """Time of a call on the GPU alone: a captured graph of several calls, replayed."""
    calls = 10
    graph, _ = captured(call, calls)
    graph.replay()
    replays = max(1, min(20, int(REPLAY_MS / _replay_ms(graph, 1))))
    times = [_replay_ms(graph, replays) / (calls * replays) for _ in range(5)]
    return round(1e3 * statistics.median(times), 2)


def _replay_ms(graph: torch.cuda.CUDAGraph, times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mebibytes(run: Run, call: Callable[[], object]) -> int:
    """Peak of allocated memory during a call, weights and optimizer included; 0 on a CPU."""
    if not run.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    call()
    run.wait()
    return round(torch.cuda.max_memory_allocated() / 2**20)


def launches(run: Run, call: Callable[[], object]) -> dict[str, object]:
    """Kernel launches of a call, its time on the GPU, and the kernels that take most of it."""
    if not run.on_gpu:
        return {}
    run.wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        run.wait()
    events = recorded.key_averages()
    kernels = [
        e
        for e in events
        if e.self_device_time_total > 0
        and "CUDA" in str(e.device_type)
        and not e.is_user_annotation  # an optimizer's step, which is kernels counted already
    ]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {
        "launches": sum(e.count for e in events if "LaunchKernel" in e.key),
        "copies": sum(e.count for e in events if e.key.startswith("cudaMemcpy")),
        "gpu_ms": round(sum(e.self_device_time_total for e in kernels) / 1e3, 2),
        "top": [
            [e.key[:NAME_LENGTH], e.count, round(e.self_device_time_total / 1e3, 3)]
            for e in kernels[:TOP_KERNELS]
        ],
    }


@contextmanager
def host_waits(run: Run) -> Iterator[Counter]:
    """Counts the operations that make the host wait for the GPU, by the line that caused them."""
    found: Counter = Counter()
    if not run.on_gpu:
        yield found
        return

    def record(
        message: object, _category: type, filename: str, lineno: int, *_rest: object
    ) -> None:
        if "called a synchronizing" not in str(message):
            return
        package = str(ROOT / "maskdino")
        inside = [f for f in traceback.extract_stack() if f.filename.startswith(package)]
        where = (inside[-1].filename, inside[-1].lineno) if inside else (filename, lineno)
        found[f"{Path(where[0]).name}:{where[1]}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = record
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def arithmetic(run: Run, precision: str) -> Iterator[None]:
    """float32, tf32, or, with PyTorch's own flags, `DEFAULTS` or autocast to a half type."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    if precision in ("float32", "tf32"):
        for flag in flags:
            flag.allow_tf32 = precision == "tf32"
    half = HALVES.get(precision)
    try:
        with torch.autocast(run.device, dtype=half, enabled=half is not None and run.on_gpu):
            yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is exact, to two digits."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float(f"{(ours - exact).norm() / exact.norm().clamp(min=1e-30):.2g}")
