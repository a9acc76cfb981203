"""Fixtures of the tests of training."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
from torch.distributed.launcher.api import LaunchConfig

from maskdino.engine import launch
from tests.catalogs import own_datasets


@pytest.fixture(autouse=True)
def _own_datasets() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with own_datasets():
        yield


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that `launch` starts are copies of one that has imported all they need.

    That saves each of them seconds. Tests of how they start, of signals to their parent and of the
    environment do without it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    configure = launch._configure

    def forking(*args: object) -> LaunchConfig:
        config = configure(*args)
        config.start_method = "forkserver"
        return config

    multiprocessing.set_forkserver_preload(["maskdino", "tests.engine.stand_in"])
    monkeypatch.setattr(launch, "_configure", forking)
