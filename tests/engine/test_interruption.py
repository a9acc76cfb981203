"""Ctrl-C and SIGTERM: the step is finished and saved, and a resumed run is the unbroken one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from maskdino.checkpoint.reading import CheckpointError
from maskdino.engine.interruption import Interrupted
from maskdino.engine.launch import launch
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system.errors import WriteError
from tests.engine.stand_in import (
    CallbackHook,
    read_checkpoint,
    resume_in_process,
    tiny_config,
    train,
    train_in_process,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def interrupted(trainer: MaskDINOTrainer, number: int) -> Interrupted:
    """Trains until a signal ends it; handlers are as before."""
    before = [signal.getsignal(s) for s in SIGNALS]
    trainer.resume_or_load(False)
    with pytest.raises(Interrupted) as error:
        trainer.train()
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert error.value.status == 128 + number
    return error.value


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["step", "hook"])
def test_the_step_is_saved_and_gone_on_from(number: int, moment: str, tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "whole"))
    cfg = tiny_config(tmp_path / "broken")
    trainer = MaskDINOTrainer(cfg)

    def send(*_: object) -> None:
        if trainer.iter == 2:  # not one of those after which there is a checkpoint
            os.kill(os.getpid(), number)

    if moment == "hook":
        trainer.register_hooks([CallbackHook(after_step=send)])
    else:
        trainer.model.register_forward_pre_hook(send)
    error = interrupted(trainer, number)
    assert str(error) == "interrupted after iteration 3; go on with --resume"
    assert (tmp_path / "broken" / "last_checkpoint").read_text() == "model_0000002.pth"
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    whole, broken = (read_checkpoint(tmp_path / name) for name in ("whole", "broken"))
    for name, value in whole["model"].items():
        assert torch.equal(value, broken["model"][name])
    assert str(whole["trainer"]) == str(broken["trainer"])


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_second_signal_ends_the_step_which_is_not_saved(tmp_path: Path) -> None:
    trainer = MaskDINOTrainer(tiny_config(tmp_path))

    def send(*_: object) -> None:
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.register_forward_pre_hook(send)
    assert "after iteration 2;" in str(interrupted(trainer, signal.SIGTERM))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_processes_forked_in_a_training_end_when_told(tmp_path: Path) -> None:
    """Those of pools that other packages abandon, such as detectron2's loader of Cityscapes."""
    cfg = tiny_config(tmp_path)
    trainer = MaskDINOTrainer(cfg)
    codes = []

    def fork(_: object) -> None:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join(30)
        codes.append(worker.exitcode)

    trainer.register_hooks([CallbackHook(after_step=fork)])
    trainer.resume_or_load(False)
    trainer.train()
    assert codes == [-signal.SIGTERM] * cfg.SOLVER.MAX_ITER


def test_a_full_disk_under_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = MaskDINOTrainer(tiny_config(tmp_path))

    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "notes.txt"))

    trainer.register_hooks([CallbackHook(after_step=fail)])
    trainer.resume_or_load(False)
    message = rf"cannot write {tmp_path}/notes.txt: No space left.*make room.*--resume"
    with pytest.raises(WriteError, match=message):
        trainer.train()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds weights, but no state of a training: leave out --resume"),
        ({"trainer": {"iteration": 3}}, "of another trainer: it lacks .*optimizer"),
    ],
)
def test_what_is_no_state_of_a_training(content: dict, message: str, tmp_path: Path) -> None:
    trainer = MaskDINOTrainer(tiny_config(tmp_path))
    data = {"model": trainer.model.state_dict(), **content}
    torch.save(data, tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(CheckpointError, match=f"the last checkpoint of {tmp_path} .*{message}"):
        trainer.resume_or_load(True)


GROUP = """
import os, signal, sys
from pathlib import Path
from maskdino.engine.interruption import Interrupted
from maskdino.engine.trainer import MaskDINOTrainer
from tests.engine.stand_in import tiny_config
from tests.engine.test_interruption import send_at
trainer = MaskDINOTrainer(tiny_config(Path(sys.argv[1]), "DATALOADER.NUM_WORKERS", 2))
trainer.resume_or_load(False)
send_at(trainer, 2, lambda: os.killpg(os.getpgrp(), signal.SIGTERM))
try:
    trainer.train()
except Interrupted as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_signal_to_all_processes_of_a_job(
    tmp_path: Path, repository: Path, warm_python: str
) -> None:
    """Those that load images are needed until the step is made."""
    ended = subprocess.run(
        [warm_python, "-c", GROUP, str(tmp_path)],
        cwd=repository,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "interrupted after iteration 3; go on with --resume" in ended.stdout, ended.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def send_at(trainer: MaskDINOTrainer, iteration: int, send: Callable[[], None]) -> None:
    """Sends signals in a step, before its first forward pass."""
    sent: list[bool] = []

    def hook(*_: object) -> None:
        if trainer.iter == iteration and not sent:
            sent.append(True)
            send()

    trainer.model.register_forward_pre_hook(hook)


def train_and_signal(cfg: CfgNode, number: int, way: str, parent: int) -> None:
    """One of two processes, of which the first or the second sends a signal, to whom `way` says.

    `parent` is the process that called `launch`.
    """
    trainer = MaskDINOTrainer(cfg)
    if way == "all" and comm.get_rank() == 0:
        send_at(trainer, 2, lambda: os.kill(parent, number))
    elif way == "one" and comm.get_rank() == 1:
        send_at(trainer, 2, lambda: os.kill(os.getpid(), number))
    elif way == "twice" and comm.get_rank() == 0:

        def send() -> None:
            for _ in range(2):
                os.kill(parent, number)
                time.sleep(2)
            time.sleep(10**6)  # a step that would not end

        send_at(trainer, 2, send)
    elif way == "evaluation" and comm.get_rank() == 0:
        plain = trainer.model.module
        plain._middle = lambda _: os.kill(parent, number) or time.sleep(100)
    trainer.resume_or_load(False)
    trainer.train()


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    ("number", "way"),
    [pytest.param(SIGNALS[0], "all", marks=pytest.mark.campaign), (SIGNALS[1], "one")],
)
def test_two_processes_end_after_the_same_step(number: int, way: str, tmp_path: Path) -> None:
    words = ("SOLVER.ACCUMULATION_STEPS", 2)
    cfg = tiny_config(tmp_path / "broken", *words)
    with pytest.raises(Interrupted) as error:
        launch(train_and_signal, cfg, number, way, os.getpid(), processes=2)
    assert error.value.status == 128 + number
    assert str(error.value) == "interrupted after iteration 3; go on with --resume"
    assert (tmp_path / "broken" / "last_checkpoint").read_text() == "model_0000002.pth"
    launch(resume_in_process, cfg, processes=2)
    whole = tiny_config(tmp_path / "whole", *words)
    launch(train_in_process, whole, processes=2)
    found, expected = (read_checkpoint(tmp_path / name) for name in ("broken", "whole"))
    for name, value in expected["model"].items():
        assert torch.equal(value, found["model"][name])
    assert str(expected["trainer"]) == str(found["trainer"])


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_second_signal_ends_all_processes_at_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="interrupted; go on with --resume"):
        args = (tiny_config(tmp_path), signal.SIGINT, "twice", os.getpid())
        launch(train_and_signal, *args, processes=2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("forked")
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_two_processes_leave_an_evaluation(tmp_path: Path) -> None:
    words = ("DATASETS.TEST", "('nuclei_val',)", "TEST.EVAL_PERIOD", 3)
    cfg = tiny_config(tmp_path, *words, "INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 64)
    with pytest.raises(Interrupted, match="after iteration 3; go on"):
        args = (cfg, signal.SIGTERM, "evaluation", os.getpid())
        launch(train_and_signal, *args, processes=2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
