"""Runs that are killed at any moment and gone on with end as ones that nothing disturbed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.engine.kills import Campaign, server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, and looks into /proc")


def test_a_few_kills(tmp_path: Path, repository: Path) -> None:
    campaign = Campaign(tmp_path, iterations=30, processes=1)
    with server(repository) as context:
        campaign.go(context, 3, random.Random(0))
    assert not campaign.faults
    assert campaign.kills == 3 and campaign.finished >= 1


@pytest.mark.campaign
@pytest.mark.parametrize(("processes", "kills"), [(1, 50), (2, 50)])
def test_campaign(
    processes: int, kills: int, tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    """Some minutes; the figures are in docs/reliability.md."""
    campaign = Campaign(tmp_path, iterations=200, processes=processes)
    with server(repository) as context:
        campaign.go(context, kills, random.Random(processes))
    with capsys.disabled():
        sys.stdout.write(f"\n{campaign.figures()}\n")
    assert not campaign.faults
