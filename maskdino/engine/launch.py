"""Starting one process per GPU, or several on a CPU, by ourselves or under torchrun."""

import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from maskdino.data import DataError
from maskdino.engine.errors import data_errors_in_one_line, data_errors_logged_in_one_line, end_with

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class _Processes:
    """How many processes there are, and where they meet; see `launch`."""

    processes: int
    machines: int
    machine_rank: int
    url: str


def launch(
    main: Callable[..., object],
    *args: object,
    processes: int,
    machines: int = 1,
    machine_rank: int = 0,
    url: str = "auto",
) -> None:
    """Runs ``main(*args)`` in every process of a training.

    Under torchrun (it sets RANK, WORLD_SIZE and LOCAL_RANK), this process joins the others. Else
    the processes of this machine are started: through detectron2's launcher where there are GPUs,
    and with gloo on a CPU. Where the data are at fault (`maskdino.data.DataError`), all end
    with one line that says so; other errors keep their traceback.

    Args:
        main: a function of a module, for it is pickled.
        args: its arguments.
        processes: processes, with one GPU each if there are GPUs, on this machine.
        machines: number of machines.
        machine_rank: this machine's number, from 0.
        url: where the processes meet, as ``tcp://host:port``; "auto" for a single machine.

    Raises:
        ValueError: if there are fewer GPUs than processes.
        SystemExit: 1, if the data are at fault.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        _join_torchrun()
        with data_errors_in_one_line():
            main(*args)
        _leave_the_others()
        return
    if processes * machines == 1:
        with data_errors_in_one_line():
            main(*args)
        return
    with tempfile.TemporaryDirectory() as folder:
        fault = Path(folder) / "fault"
        try:
            where = _Processes(processes, machines, machine_rank, url)
            _start(_run, (main, args, fault), where)
        except (ProcessRaisedException, ProcessExitedException):
            # Which process ended first is chance: the others fail when they lose it.
            if fault.exists():
                end_with(fault.read_text())
            raise


def _start(main: Callable[..., object], args: tuple, where: _Processes) -> None:
    """Starts the processes of this machine, and waits for them."""
    if torch.cuda.is_available():
        found = torch.cuda.device_count()
        if where.processes > found:
            raise ValueError(f"{where.processes} GPUs asked for, but {found} found here.")
        launch_on_gpus(
            main, where.processes, where.machines, where.machine_rank, where.url, args, TIMEOUT
        )
        return
    if where.url == "auto":
        if where.machines > 1:
            raise ValueError("Several machines need --dist-url tcp://HOST:PORT of the first one.")
        where = replace(where, url=f"tcp://127.0.0.1:{free_port()}")
    torch.multiprocessing.spawn(_cpu_process, args=(main, args, where), nprocs=where.processes)


def _cpu_process(
    local_rank: int, main: Callable[..., object], args: tuple, where: _Processes
) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        # All cores for each process would make them wait for one another.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // where.processes))
    torch.distributed.init_process_group(
        "gloo",
        init_method=where.url,
        world_size=where.processes * where.machines,
        rank=where.machine_rank * where.processes + local_rank,
        timeout=TIMEOUT,
    )
    _create_local_group(where.processes)
    main(*args)
    _leave_the_others()


def _leave_the_others() -> None:
    """Ends the group of processes, for a process that has done its part.

    After an error, others may be inside a collective that never completes. Leaving can wait for it,
    and nobody would see the error: such a process just ends, and the others are ended or fail.
    """
    gc.collect()  # a trainer that lingers would keep the group's threads, beyond the end of Python
    torch.distributed.destroy_process_group()


def _run(main: Callable[..., object], args: tuple, fault: Path) -> None:
    """Runs ``main`` in a process that we started; leaves a note if the data are at fault."""
    try:
        with data_errors_logged_in_one_line():
            main(*args)
    except DataError as error:
        fault.write_text(str(error))
        raise


def _join_torchrun() -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    _create_local_group(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))


def _create_local_group(processes: int) -> None:
    """Tells detectron2 which processes share this machine."""
    if hasattr(comm, "create_local_process_group"):  # newer than 0.6
        comm.create_local_process_group(processes)
        return
    rank, world_size = comm.get_rank(), comm.get_world_size()
    for first in range(0, world_size, processes):
        ranks = list(range(first, first + processes))
        group = torch.distributed.new_group(ranks)  # every process must create every group
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
