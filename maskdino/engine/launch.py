"""Several processes of one training: torchrun's, or started here as torchrun starts them."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from maskdino.engine.interruption import Interrupted
from maskdino.integration.compat import create_local_process_group
from maskdino.system.errors import UserError
from maskdino.system.signals import ENDING, INTERRUPTED

TIMEOUT = timedelta(minutes=30)
PATIENCE = 600  # seconds
LONGEST = 4000  # characters of a traceback
USER_ERROR, BUG = 0, -1  # what a process says it ended with, where it is no signal's number
TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}  # what it sets, among others


def launch(
    main: Callable[..., object],
    *args: object,
    processes: int,
    machines: int = 1,
    machine_rank: int = 0,
    url: str = "auto",
) -> None:
    """Runs ``main(*args)`` in every process of a training.

    Under torchrun, this process joins the others. Else the processes of this machine are started,
    with NCCL where there are GPUs and with gloo where there are none. What the user
    can mend (`maskdino.system.errors.UserError`) ends all of them with one line that says so; other
    errors keep their traceback.

    Args:
        main: importable by its name, for it is pickled.
        args: its arguments, likewise.
        processes: processes, with one GPU each if there are GPUs, on this machine.
        machines: number of machines.
        machine_rank: this machine's number, from 0.
        url: where the machines meet, as ``tcp://host:port`` of the first; "auto" for a single one.

    Raises:
        ValueError: there are fewer GPUs than processes, or several machines have no address.
        ChildFailedError: a process that was started here failed.
        SystemExit: 1, after an error that the user can mend.
        KeyboardInterrupt: after Ctrl-C, as `Interrupted` where processes were started here, and
            after SIGTERM; they have ended, at the second signal at once.
    """
    try:
        if os.environ.keys() >= TORCHRUN:
            _join_others(main, args)
        elif processes * machines == 1:
            main(*args)
        else:
            # Torch makes a folder for errors of processes, which it reads, and leaves it.
            with tempfile.TemporaryDirectory(prefix="maskdino_") as folder:
                _run_all(_configure(processes, machines, machine_rank, url, folder), main, args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        sys.exit(1)


def _run_all(config: LaunchConfig, main: Callable[..., object], args: tuple) -> None:
    """Runs the processes of this machine; errors as of `launch`."""
    messages = torch.multiprocessing.get_context("spawn").SimpleQueue()
    message, number, failed = "interrupted; go on with --resume", 0, None
    try:
        with _handlers_restored(), _second_signal_kills():
            elastic_launch(config, _run_started)(main, args, messages)
    except ChildFailedError as error:
        failed = error
    except SignalException as error:
        number = int(error.sigval)
    # Which process ended first is chance: the others may fail when they lose it.
    said: list[tuple[str, int]] = []
    while not messages.empty():
        said.append(messages.get())
    if said and said[0][1] == USER_ERROR:
        raise UserError(said[0][0])
    if said and said[0][1] == BUG:
        sys.stderr.write(said[0][0])
    signals = [words for words in said if words[1] not in (USER_ERROR, BUG)]
    if signals:  # a process that others told of their signal says SIGINT, the smallest
        message, number = max(signals, key=lambda words: words[1])
    if number:
        raise Interrupted(message, number)
    if failed is not None:
        raise failed


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """Afterwards signals are handled as before.

    Torch's handlers stay after a launch, and processes that are forked later (multiprocessing's
    pools) might then ignore that they shall end.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # others cannot set any
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _second_signal_kills() -> Iterator[None]:
    """Inside, a second Ctrl-C or SIGTERM kills the processes that have been started meanwhile.

    Torch passes the first one on, and waits for their end whatever comes.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    others = multiprocessing.active_children()
    arrivals, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        count = 0
        while came := os.read(arrivals, 64):  # one byte for each signal, its number
            count += sum(number in ENDING for number in came)
            if count > 1:
                for child in multiprocessing.active_children():
                    if child not in others:
                        child.kill()
        os.close(arrivals)

    before = signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)


def _configure(
    processes: int, machines: int, machine_rank: int, url: str, folder: str
) -> LaunchConfig:
    """What torchrun would make of its arguments; see `launch`."""
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"{processes} GPUs asked for, but {found} found here.")
    if machines > 1 and url == "auto":
        raise ValueError("Several machines need --dist-url tcp://HOST:PORT of the first one.")
    here = url == "auto"
    # Newer releases of PyTorch: how long processes may take to save their state after Ctrl-C; 30 s.
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    longer: dict[str, Any] = {"shutdown_timeout": PATIENCE} if "shutdown_timeout" in known else {}
    return LaunchConfig(
        **longer,
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id="maskdino",
        rdzv_backend="c10d" if here else "static",
        rdzv_endpoint="localhost:0" if here else url.removeprefix("tcp://"),
        rdzv_configs={} if here else {"rank": machine_rank},
        max_restarts=0,
        local_addr="localhost" if here else None,
        logs_specs=DefaultLogsSpecs(folder),
    )


def _run_started(main: Callable[..., object], args: tuple, messages: SimpleQueue) -> None:
    """Runs ``main`` in a process that was started here."""
    if hasattr(os, "setpgrp"):
        # Ctrl-C reaches the process that started this one, which passes it on: else it comes twice.
        os.setpgrp()
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # before there is a training
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # All cores for each process would make them wait for one another.
        share = (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, share))
    try:
        _join_others(main, args)
    except Interrupted as error:
        messages.put((str(error), error.number))
        # On its return, torch waits for the process that started this one, which may be waiting for
        # this one's end.
        end = threading.Timer(1, os._exit, (0,))
        end.daemon = True
        end.start()
    except UserError as error:
        messages.put((str(error), USER_ERROR))
        sys.exit(1)
    except Exception:
        # Said now: when this process is gone the others fail too, and torch may report one of them.
        # The pipe, which nobody reads yet, holds 64 KiB.
        rank, trace = os.environ["RANK"], traceback.format_exc()[-LONGEST:]
        messages.put((f"Process {rank} failed:\n{trace}", BUG))
        raise


def _join_others(main: Callable[..., object], args: tuple) -> None:
    """Runs ``main`` in a process that torchrun, or we like it, started.

    After an error, others may be inside a collective that never completes. Leaving their group can
    wait for it, and nobody would see the error: such a process just ends, and the others are ended
    or fail.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
    interruption = None
    try:
        main(*args)
    except Interrupted as error:  # of all of them, after the same step
        # Anew, without the traceback, whose frames hold the trainer.
        interruption = Interrupted(str(error), error.number)
    gc.collect()  # a trainer that lingers would keep the group's threads, beyond the end of Python
    torch.distributed.destroy_process_group()
    if interruption is not None:
        raise interruption
