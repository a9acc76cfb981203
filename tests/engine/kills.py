"""Runs that are killed again and again, and gone on with; see `test_kills.py`.

Processes come from a server that has imported all there is to import, so that a start takes a
second. Where there are two, they meet as torchrun's do.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from maskdino.checkpoint.reading import find_resumption
from maskdino.engine import metrics_file
from maskdino.engine.launch import launch
from maskdino.engine.run_folder import locked
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system import files
from maskdino.system.files import MARK
from tests.engine.stand_in import tiny_config

# Files in whose writing a run is killed, by how their paths begin.
WRITTEN = (
    "model_",
    "last_checkpoint",
    "ema/model_final",
    "best/model_best",
    "best/history",
    "metrics",
    "inference/results",
)
MOMENTS = ("half", "whole", "moved")  # half written; whole, but under another name; in its place


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        seconds: after its start, from outside; None: as it writes.
        file: how the path of the file begins.
        stage: one of `MOMENTS`.
        count: how many times that is reached before it is killed.
        process: which one is killed first.
    """

    seconds: float | None
    file: str = ""
    stage: str = ""
    count: int = 1
    process: int = 0

    @staticmethod
    def draw(generator: random.Random, processes: int) -> Moment:
        """Half of them at any moment, half of them inside a writing."""
        if generator.random() < 0.5:
            seconds, process = generator.uniform(0, 4), generator.randrange(processes)
            return Moment(seconds, process=process)
        stage, file = generator.choice(MOMENTS), generator.choice(WRITTEN)
        return Moment(None, file, stage, generator.randint(1, 3))


class Judged(MaskDINOTrainer):
    """Its evaluation is a number of the weights that jumps about, and takes no time."""

    @classmethod
    def test(cls, _cfg: CfgNode, model: nn.Module, _: Any = None) -> dict[str, Any]:
        total = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
        return {"segm": {"AP": total * 1e4 % 100}}


def kill_config(output: Path, iterations: int) -> CfgNode:
    """A run with all that is saved: averaged weights, the best ones, metrics, results."""
    ema = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9)
    best = ("SOLVER.BEST.METRIC", "segm/AP", "TEST.EVAL_PERIOD", 4)
    steps = ("SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 3)
    words = (*ema, *best, *steps, "SOLVER.ACCUMULATION_STEPS", 2, "LOG.WRITERS", "[]")
    return tiny_config(output, *words, "DATASETS.TEST", "('nuclei_val',)")


def _train(cfg: CfgNode, resume: bool, rank: int) -> None:
    with locked(cfg.OUTPUT_DIR) if rank == 0 else nullcontext():
        trainer = Judged(cfg)
        trainer.resume_or_load(resume)
        trainer.train()


def _work(cfg: CfgNode, resume: bool, moment: Moment | None, rank: int, port: int) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    with open(f"{cfg.OUTPUT_DIR}.log{rank}", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if moment is not None and moment.seconds is None and rank == 0:
        _kill_in_writing(moment, Path(cfg.OUTPUT_DIR))
    if port:
        group = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in group.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2"}
        launch(_train, cfg, resume, rank, processes=1)
    else:
        _train(cfg, resume, rank)


def _kill_in_writing(moment: Moment, folder: Path) -> None:
    """Lets this process kill itself when it has come to a moment in the writing of a file."""
    left = [moment.count]
    sync, move = os.fsync, os.replace

    def reached(path: str, stage: str) -> bool:
        name = os.path.relpath(path, folder)
        if stage == moment.stage and name.startswith(moment.file):
            left[0] -= 1
        return left[0] == 0

    def fsync(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        if os.path.isdir(path):
            return sync(number)
        if reached(path, "half"):
            os.truncate(path, max(0, os.path.getsize(path) - 20))
            os.kill(os.getpid(), signal.SIGKILL)
        sync(number)
        if reached(path, "whole"):
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    def replace(source: str | os.PathLike, target: str | os.PathLike) -> None:
        move(source, target)
        if reached(os.fspath(target), "moved"):
            os.kill(os.getpid(), signal.SIGKILL)

    for module in (files, metrics_file):
        module.os = _Patched(fsync, replace)


class _Patched:
    """The module `os` with two functions of another."""

    def __init__(self, fsync: Callable, replace: Callable) -> None:
        self.fsync, self.replace = fsync, replace

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@contextlib.contextmanager
def server(repository: Path) -> Iterator[Any]:
    """The context of processes that start fast."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(repository)  # for the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        yield context
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run(context: Any, cfg: CfgNode, moment: Moment | None, processes: int) -> bool:
    """Goes on with a run, or begins it; returns whether it came to its end.

    Raises:
        RuntimeError: a process ended otherwise than by the kill.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if processes > 1 else 0
    workers = [
        context.Process(target=_work, args=(cfg, True, moment, rank, port))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    victim = workers[0 if moment is None else moment.process]
    victim.join(600 if moment is None or moment.seconds is None else moment.seconds)
    # A machine that is gone, or one process of several whose others may notice.
    if moment is not None and moment.process:
        victim.kill()
        victim.join()
        workers[0].join(moment.seconds / 20)
    if moment is None or victim.exitcode == 0:
        for worker in workers:
            worker.join(60)
    for worker in workers:
        worker.kill()
        worker.join()
    codes = [worker.exitcode for worker in workers]
    # Those that noticed that another was killed end with an error.
    if any(code not in (0, -signal.SIGKILL) for code in codes) and -signal.SIGKILL not in codes:
        log = Path(f"{cfg.OUTPUT_DIR}.log0").read_text()
        raise RuntimeError(f"statuses {codes}: {log[-3000:]}")
    return codes == [0] * processes


@dataclass
class Campaign:
    """Kills of runs, each compared with a run that nothing disturbed.

    Attributes:
        folder: of the runs.
        iterations: of each.
        processes: of each.
        kills: so far.
        finished: runs that came to their end.
        faults: what differed, with the kill.
    """

    folder: Path
    iterations: int
    processes: int
    kills: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.whole = self.folder / "whole"

    def go(self, context: Any, kills: int, generator: random.Random) -> None:
        """Makes the undisturbed run, then kills others until there were so many kills."""
        if not run(context, kill_config(self.whole, self.iterations), None, self.processes):
            raise RuntimeError("the undisturbed run did not end")
        while self.kills < kills:
            folder = self.folder / f"killed{self.finished}"
            cfg = kill_config(folder, self.iterations)
            ended = False
            while not ended:
                kill = self.kills < kills
                moment = Moment.draw(generator, self.processes) if kill else None
                ended = run(context, cfg, moment, self.processes)
                if not ended:
                    self.kills += 1
                    self.moments.append(moment)
                    self._compare_newest(folder, moment)
            self.finished += 1
            self._compare_end(folder)

    def _compare_newest(self, folder: Path, moment: Moment | None) -> None:
        newest = find_resumption(str(folder)).path if folder.is_dir() else ""
        if not newest:
            return
        fault = difference(read(newest), read(self.whole / Path(newest).name))
        if fault:
            self.faults.append(f"kill {self.kills} ({moment}), {newest}: {fault}")

    def _compare_end(self, folder: Path) -> None:
        names = ("model_final.pth", "ema/model_final.pth", "best/model_best.pth")
        for name in names:
            fault = difference(read(folder / name), read(self.whole / name))
            if fault:
                self.faults.append(f"{folder.name}/{name}: {fault}")
        for name in ("last_checkpoint", "best/history.json", "inference/results.json"):
            if (folder / name).read_bytes() != (self.whole / name).read_bytes():
                self.faults.append(f"{folder.name}/{name} differs")
        logged = [
            [json.loads(line)["iteration"] for line in (f / "metrics.json").open()]
            for f in (folder, self.whole)
        ]
        # A process that lost another ends with a line of its last iteration.
        if sorted({*logged[0]}) != logged[0] or not {*logged[1]} <= {*logged[0]}:
            self.faults.append(f"{folder.name}/metrics.json has iterations {logged[0]}")
        left = [str(path) for path in folder.rglob(f"*{MARK}*")]
        if left:
            self.faults.append(f"temporary files are left: {left}")

    def figures(self) -> str:
        """What happened, in a line."""
        inside = sum(moment.seconds is None for moment in self.moments)
        equal = self.kills + self.finished - len(self.faults)
        return (
            f"{self.kills} kills, {inside} of them inside the writing of a file, in "
            f"{self.finished} runs of {self.iterations} iterations on {self.processes} "
            f"process(es): {equal} of {self.kills + self.finished} states bit-equal"
        )


def read(path: str | os.PathLike) -> Any:
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def difference(found: Any, expected: Any, path: str = "") -> str:
    """Where nested containers of tensors and numbers differ in a bit; "": nowhere."""
    if type(found) is not type(expected):
        return f"{path}: {type(found)} is not {type(expected)}"
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"{path}: {sorted(found)} are not {sorted(expected)}"
        pairs = [(found[key], expected[key], f"{path}.{key}") for key in expected]
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{path}: {len(found)} is not {len(expected)}"
        pairs = [(found[i], expected[i], f"{path}[{i}]") for i in range(len(expected))]
    else:
        is_same = torch.equal if isinstance(expected, torch.Tensor) else (lambda a, b: a == b)
        return "" if is_same(found, expected) else f"{path} differs"
    return next(filter(None, (difference(*pair) for pair in pairs)), "")
