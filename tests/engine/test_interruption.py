"""Ctrl-C and SIGTERM: the step is finished and saved, and a resumed run is the unbroken one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.reading import CheckpointError
from maskdino.engine.interruption import Interrupted
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system import files
from maskdino.system.errors import WriteError
from tests.engine.stand_in import CallbackHook, read_checkpoint, tiny_config, train

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


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writer failed")]
)
def test_a_full_disk_is_one_error_with_advice(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = MaskDINOCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(WriteError, match=rf"cannot write {tmp_path}/model.pth: .*--resume"):
        checkpointer.save("model")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = MaskDINOTrainer(tiny_config(tmp_path))

    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")

    trainer.register_hooks([CallbackHook(after_step=fail)])
    trainer.resume_or_load(False)
    with pytest.raises(WriteError, match=rf"metrics.json.*make room for {tmp_path}.*--resume"):
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
