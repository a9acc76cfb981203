"""Steps that are commands of their own: the GPU tests and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from gpu_checks.common import ROOT, Run

SANITIZED = "computes_what_the_cpu_does and float32"


def tests(run: Run) -> None:
    """`pytest -m gpu`."""
    command = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10", "-rA", "tests"]
    if run.dry:
        command[-1] = "tests/ops/test_ms_deform_attn_cuda.py"
    log = run.out / "pytest.log"
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    lines = log.read_text().splitlines()
    run.say(status=done.returncode, summary=lines[-1] if lines else "")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            run.say(FAILED=line[:400])


def sanitizer(run: Run) -> None:
    """Bad accesses and races of the operators, by NVIDIA's tool."""
    if not run.on_gpu or shutil.which("compute-sanitizer") is None:
        run.say(skipped="needs a GPU and compute-sanitizer")
        return
    for tool in ("memcheck", "racecheck"):
        path = "tests/ops/test_ms_deform_attn_cuda.py"
        inner = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", SANITIZED, path]
        done = subprocess.run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *inner],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        tail = (done.stdout + done.stderr).strip().splitlines()[-4:]
        run.say(tool=tool, status=done.returncode, tail=tail)
