"""A disk without room: one line that names the file and says what to do; what was there stays."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from maskdino.engine.evaluating import write_results
from maskdino.engine.run_folder import LOGGERS, open_logs
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system.errors import WriteError
from maskdino.system.files import MARK
from tests.engine.stand_in import CallbackHook, read_checkpoint, tiny_config, train

resource = pytest.importorskip("resource", reason="limits the size of files")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Inside, no file can be written beyond a size: the system says so as it says of a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("iteration", "size", "file"),
    [(3, 20_000, "model_0000003.pth"), (5, 20_000, "model_final.pth"), (5, 50, "metrics.json")],
)
def test_a_training_ends_with_a_line_and_goes_on_later(
    iteration: int, size: int, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config(tmp_path / "full", "SOLVER.EMA.ENABLED", True, "LOG.WRITERS", "[]")
    trainer = MaskDINOTrainer(cfg)
    limit = files_end_at(size)

    def fill(running: MaskDINOTrainer) -> None:
        if running.iter == iteration:
            limit.__enter__()

    trainer.register_hooks([CallbackHook(before_step=fill)])
    trainer.resume_or_load(False)
    try:
        with pytest.raises(WriteError) as error:
            trainer.train()
    finally:
        limit.__exit__(None, None, None)
    message = str(error.value)
    assert message.startswith(f"cannot write {tmp_path}/full/{file}: File too large. ")
    assert "make room" in message and "--resume" in message and "\n" not in message
    assert "Traceback" not in caplog.text
    last = f"model_{iteration - 2:07d}.pth"
    assert (tmp_path / "full" / "last_checkpoint").read_text() == last
    assert read_checkpoint(tmp_path / "full", last)["iteration"] == iteration - 2
    assert not list(tmp_path.rglob(f"*{MARK}*"))

    train(cfg, resume=True)
    train(tiny_config(tmp_path / "whole", "SOLVER.EMA.ENABLED", True, "LOG.WRITERS", "[]"))
    found, expected = (read_checkpoint(tmp_path / name) for name in ("full", "whole"))
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            assert torch.equal(value, found[part][name])
    lines = (tmp_path / "full" / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [5]


def test_results_before_stay(tmp_path: Path) -> None:
    write_results(str(tmp_path), {"segm": {"AP": 1.0}})
    path = tmp_path / "inference" / "results.json"
    before = path.read_text()
    with files_end_at(5), pytest.raises(WriteError, match=rf"cannot write {path}: .*make room"):
        write_results(str(tmp_path), {"segm": {"AP": 2.0}})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def _handlers() -> Iterator[None]:
    """The loggers have no handlers of other tests, and afterwards those of before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = []
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("_handlers")
def test_a_log_without_room_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    open_logs(tmp_path)
    logger = logging.getLogger("maskdino.somewhere")
    logger.info("before")
    with files_end_at((tmp_path / "log.txt").stat().st_size):
        for _ in range(3):
            logger.info("without room")
    logger.info("after")
    shown = capsys.readouterr()
    assert shown.out.count("without room") == 3  # the console has it all
    (line,) = shown.err.splitlines()
    for part in (f"cannot write {tmp_path}/log.txt: File too large", "goes on", "make some"):
        assert part in line
    written = (tmp_path / "log.txt").read_text().splitlines()
    assert [text.split(": ")[1] for text in written] == ["before", "after"]
