"""Processes that panopticapi starts end when told, whatever the training does of signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from maskdino.evaluation.panoptic import default_termination


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_processes_end_when_told_although_this_one_delays_it() -> None:
    def delay(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, delay)
    try:
        with default_termination():
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            worker.start()
            worker.terminate()
            worker.join(30)
        assert worker.exitcode == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is delay
    finally:
        signal.signal(signal.SIGTERM, before)
