"""The processes that load images end with the training, whatever ends it."""

import multiprocessing
from pathlib import Path

import pytest

from maskdino.engine.trainer import MaskDINOTrainer
from tests.engine.stand_in import tiny_config


def test_an_error_in_a_step_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Python, as it ends, waits for them forever: they leave the first SIGTERM alone."""
    trainer = MaskDINOTrainer(tiny_config(tmp_path, "DATALOADER.NUM_WORKERS", 1))
    alive = []

    def fails(*_: object) -> None:
        alive.extend(multiprocessing.active_children())
        raise ValueError("a loss of somebody's own")

    monkeypatch.setattr(trainer.model, "forward", fails)
    with pytest.raises(ValueError, match="somebody's own") as error:  # keeps the traceback
        trainer.train()
    assert error.tb is not None and alive
    assert not set(alive) & set(multiprocessing.active_children())
