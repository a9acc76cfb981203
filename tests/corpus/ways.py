"""The commands that the corpus is brought to."""

from __future__ import annotations

from maskdino.cli import (
    train,
    train_custom,
)
from tests.corpus.case import Command


def plan(words: list[str]) -> None:
    """All that `maskdino train-custom` does before it trains."""
    train_custom.prepare(train_custom.parse_arguments(words))


WAYS: dict[str, Command] = {
    "train": train.main,
    "evaluate": train.main,
    "train-custom": plan,
    "train-custom-skip": plan,
}
