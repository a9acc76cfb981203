"""Fixtures of the tests of evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.catalogs import own_datasets


@pytest.fixture(autouse=True)
def _own_datasets() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    with own_datasets():
        yield
