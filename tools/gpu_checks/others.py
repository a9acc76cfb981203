"""Steps that are commands of their own: the GPU tests, a user's commands, compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from gpu_checks.common import ROOT, Run

NUCLEI = ROOT / "datasets/nuclei/val"
SANITIZED = "computes_what_the_cpu_does and float32"


def tests(run: Run) -> None:
    """`pytest -m gpu`."""
    command = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10", "-ra", "tests"]
    if run.dry:
        command[-1] = "tests/ops/test_ms_deform_attn_cuda.py"
    log = run.out / "pytest.log"
    words = [sys.executable, "-m", "pytest", *command]
    with open(log, "w") as file:
        started = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        status = started.wait()
    except KeyboardInterrupt:  # at the limit of the step, for pytest too, which says what failed
        status = started.wait()
    lines = log.read_text().splitlines()
    run.say(status=status, summary=lines[-1] if lines else "")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            run.say(FAILED=line[:400])


def commands(run: Run) -> None:
    """Trains on the nuclei for a few steps, goes on, evaluates and predicts, as a user would."""
    output = run.out / "nuclei"
    config = ["--config-file", "configs/nuclei/instance/maskdino_lite2.yaml"]
    config[1] = "configs/nuclei/instance/maskdino_tiny.yaml" if run.dry else config[1]
    train = ["tools/train_net.py", *config]
    steps, more = ("2", "3") if run.dry else ("150", "200")
    device = ["OUTPUT_DIR", str(output), "MODEL.DEVICE", run.device]
    predict = ["-m", "maskdino", "predict", *config, "--weights", f"{output}/model_final.pth"]
    images = sorted(str(path) for path in NUCLEI.iterdir())[:8]
    predict += ["--device", run.device, "--json", "--output", str(run.out / "drawn")]
    calls = {
        "train": [*train, *device, "SOLVER.MAX_ITER", steps, "SOLVER.CHECKPOINT_PERIOD", "100"],
        "resume": [*train, "--resume", *device, "SOLVER.MAX_ITER", more],
        "evaluate": [*train, "--eval-only", *device, "MODEL.WEIGHTS", f"{output}/model_final.pth"],
        "predict": [*predict, "--input", *images],
    }
    for name, call in list(calls.items())[: 1 if run.dry else None]:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *call], cwd=ROOT, capture_output=True, text=True)
        seconds = round(time.perf_counter() - start, 1)
        log = (done.stdout + done.stderr).strip()
        (run.out / f"log_commands_{name}.txt").write_text(log)
        outcome = {"FAILED": log[-600:]} if done.returncode else {"tail": log[-600:]}
        run.say(command=name, status=done.returncode, seconds=seconds, **outcome)


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
