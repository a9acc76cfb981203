"""Fixtures of the tests of commands."""

from tests.data.conftest import make_cfg

__all__ = ["make_cfg"]
