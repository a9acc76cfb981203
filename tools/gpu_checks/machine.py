"""The machine, and the library that is built for it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date

import torch
import torchvision

from gpu_checks.common import ROOT, Run, milliseconds
from maskdino.ops import _library
from maskdino.ops.ms_deform_attn import compiled_op_available


def environment(run: Run) -> None:
    """Card, driver, versions, and the two ceilings: copies and matrix products."""
    values = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cores": os.cpu_count(),
    }
    if run.on_gpu:
        values |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": _nvidia_smi(),
            "copy_gb_per_s": _copy_rate(run),
            "bf16_tflops": _product_rate(run),
        }
    run.say(**values)


def library(run: Run) -> None:
    """Which kernels the library that is there has."""
    path = _library.find_library()
    served = {kind: compiled_op_available(kind) for kind in ("cpu", "cuda")}
    reasons = {kind: _library.why_not(kind) for kind, there in served.items() if not there}
    run.say(file=path and path.name, **served, reasons=reasons)


def build(run: Run) -> None:
    """Builds the operators as a user does, for the card that is there, in a copy of the sources."""
    if run.dry:
        run.say(skipped="dry run")
        return
    copy = run.out / "build"
    for name in ("csrc", "maskdino"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "MAX_JOBS": str(os.cpu_count())}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
    seconds = round(time.perf_counter() - start, 1)
    built = [path.name for path in (copy / "maskdino").glob("*.so")]
    shutil.rmtree(copy)
    tail = "" if built else (done.stdout + done.stderr)[-2000:]
    run.say(status=done.returncode, build_s=seconds, built=built, tail=tail)


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,memory.total"]
    if shutil.which(command[0]) is None:
        return "not found"
    answer = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True)
    return answer.stdout.strip()


def _copy_rate(run: Run) -> float:
    """Gigabytes per second, read and written, of a copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return round(2 * source.numel() / milliseconds(run, lambda: target.copy_(source)) / 1e6)


def _product_rate(run: Run) -> float:
    """TFLOP/s of a product of bfloat16 matrices with random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return round(2 * 8192**3 / milliseconds(run, lambda: a @ b) / 1e9)
