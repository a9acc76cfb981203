"""Finds out everything about a GPU that can be had for ten minutes.

    python tools/gpu_check.py --out DIR --limit 560              # on the machine with the GPU
    python tools/gpu_check.py --out DIR --device cpu --dry       # small sizes, to try the steps
    python tools/gpu_check.py --read DIR                         # the results as tables

Each step is a process of its own with a limit of its own, and each result is a line of
DIR/results.jsonl at once: a run that is cut off, or a step that hangs or breaks the device, loses
nothing that was there before. Steps that time nothing run first and all at once; those that do run
after them, one by one, the most valuable first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 60  # of --limit
SHORTEST_STEP = 10  # seconds that must be left for another step to begin
LAST_WORDS = 8  # seconds that a step which is stopped has to say what it knows
READY = "ready to run"  # what a process says when its imports are done


@dataclass(frozen=True)
class Step:
    """A function `function` of tools/gpu_checks/`module`.py, and the seconds it may take."""

    name: str
    module: str
    function: str
    seconds: int
    alone: bool = True  # what others do would change what it measures


STEPS = (
    Step("library", "machine", "library", 20, alone=False),
    Step("pytest_gpu", "others", "tests", 180, alone=False),
    Step("commands", "others", "commands", 180, alone=False),
    Step("compile_training", "training", "compile_ahead", 180, alone=False),
    Step("compile_network", "inference", "compile_ahead", 180, alone=False),
    Step("operator_is_right", "operators", "is_right", 120, alone=False),
    Step("training_is_sound", "training", "is_sound", 120, alone=False),
    Step("parity", "inference", "parity", 120, alone=False),
    Step("sanitizer", "others", "sanitizer", 180, alone=False),
    Step("environment", "machine", "environment", 40),
    Step("training_speed", "training", "speed", 120),
    Step("inference_speed", "inference", "speed", 90),
    Step("training_compiled", "training", "compiled", 120),
    Step("graph_and_compile", "inference", "graphs", 90),
    Step("operator_speed", "operators", "speed", 75),
    Step("peer", "peers", "side_by_side", 120),
    Step("build", "machine", "build", 180),
)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``words`` stands in for it in tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="small sizes, to try the steps")
    parser.add_argument(
        "--only", metavar="STEP,...", help=f"of {', '.join(step.name for step in STEPS)}"
    )
    parser.add_argument(
        "--peer", type=Path, metavar="PATH", help="a checkout of the released implementation"
    )
    parser.add_argument("--read", type=Path, metavar="DIR", help="print the tables of a run")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.out is None and args.read is None:
        parser.error("give --out DIR to run the steps, or --read DIR to read their results")
    return args


def check(args: argparse.Namespace) -> list[Step]:
    """The steps asked for.

    Raises:
        ValueError: something is missing; the message says what, in one line.
    """
    if args.limit < LEAST_SECONDS:
        raise ValueError(f"--limit is {args.limit:g} seconds; at least {LEAST_SECONDS} are needed")
    known = {step.name: step for step in STEPS}
    names = args.only.split(",") if args.only else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only names the steps {unknown}; there are {list(known)}")
    if args.peer is not None and not args.peer.is_dir():
        raise ValueError(f"--peer {args.peer} is no folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.jsonl").touch()
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written: {error}") from error
    if args.device == "cuda":
        check_gpu()
    return [known[name] for name in names]


def check_gpu() -> None:
    """Asks for a GPU in another process, so that this one keeps its hands off it."""
    question = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", question], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"torch cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    version, available = done.stdout.split()
    if version == "None":
        raise ValueError("this torch was built without CUDA; install one with it, or --device cpu")
    if available != "True":
        raise ValueError("torch finds no GPU; look at nvidia-smi, or try --device cpu --dry")


class Worker:
    """A process that imports all it needs, waits for the word, and then runs one step.

    All start at once, and the first step begins when all are ready: imports take as long as a step
    and would disturb its times.
    """

    _begun = 0.0

    def __init__(self, step: Step, args: argparse.Namespace) -> None:
        self.step, self.out, self.log = step, args.out, args.out / f"log_{step.name}.txt"
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
        command += ["--step", step.name, "--out", str(args.out.resolve()), "--device", args.device]
        command += ["--dry"] if args.dry else []
        command += ["--peer", str(args.peer.resolve())] if args.peer else []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self.log, "w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )

    def wait_until_ready(self, deadline: float) -> None:
        """Returns when the imports are done, the process has ended, or it is `deadline`."""
        while time.monotonic() < deadline and self._process.poll() is None:
            if READY in self.log.read_text(errors="replace"):
                return
            time.sleep(0.1)

    def begin(self) -> None:
        """Gives the word."""
        self._begun = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `finish` says how
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()

    def finish(self, seconds: float) -> None:
        """Waits for the end, at most so many seconds from the word on, and reports it."""
        fault, left = "", self._begun + seconds - time.monotonic()
        try:
            status = self._process.wait(timeout=max(left, 0))
            fault = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGINT)
                self._process.wait(timeout=LAST_WORDS)  # pytest says what failed before
            self.stop()
            fault = f"stopped at its limit of {seconds:.0f} s"
        took = round(time.monotonic() - self._begun, 1)
        tail = self.log.read_text(errors="replace")[-1500:] if fault else ""
        outcome = {"FAILED": fault, "tail": tail} if fault else {}
        report(self.out, step="runner", ran=self.step.name, seconds=took, **outcome)

    def stop(self) -> None:
        """Ends the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_steps(steps: list[Step], args: argparse.Namespace) -> None:
    """Runs the steps, as far as the time goes."""
    end = time.monotonic() + args.limit
    workers = [Worker(step, args) for step in steps]
    together = [worker for worker in workers if not worker.step.alone]
    groups = [together] * bool(together) + [[worker] for worker in workers if worker.step.alone]
    try:
        for worker in workers:
            worker.wait_until_ready(end - args.limit / 2)
        for number, group in enumerate(groups):
            left = end - time.monotonic()
            if left < SHORTEST_STEP:
                names = ", ".join(each.step.name for rest in groups[number:] for each in rest)
                report(args.out, step="runner", skipped=f"no time left for {names}")
                return
            with ThreadPoolExecutor(len(group)) as waiting:
                for worker in group:
                    worker.begin()
                    seconds = left if args.dry else min(worker.step.seconds, left)
                    waiting.submit(worker.finish, seconds)
    finally:
        for worker in workers:
            worker.stop()


def report(out: Path, **values: object) -> None:
    """Appends a line of the runner's own."""
    line = json.dumps(values)
    print(line, flush=True)
    with open(out / "results.jsonl", "a") as file:
        file.write(line + "\n")


def work(args: argparse.Namespace) -> None:
    """The other side of `Worker`."""
    step = next(step for step in STEPS if step.name == args.step)
    function = getattr(importlib.import_module(f"gpu_checks.{step.module}"), step.function)
    from gpu_checks.common import Run

    print(READY, flush=True)
    if sys.stdin.readline():
        function(Run(args.step, args.out, args.device, args.dry, args.peer))


def main() -> None:
    """Runs the command."""
    args = parse_arguments()
    if args.step:
        work(args)
        return
    if args.read is not None:
        from gpu_checks.table import tables

        print(tables(args.read))
        return
    try:
        steps = check(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    run_steps(steps, args)


if __name__ == "__main__":
    main()
