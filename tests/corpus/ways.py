"""The commands that the corpus is brought to."""

from __future__ import annotations

from maskdino.cli import convert_backbone, convert_released, predict, train, train_custom
from maskdino.config import load_config
from maskdino.custom.prepare import register_prepared
from maskdino.data.checks import check_datasets
from tests.corpus.case import Command


def plan(words: list[str]) -> None:
    """All that `maskdino train-custom` does before it trains."""
    train_custom.prepare(train_custom.parse_arguments(words))


def go_on(words: list[str]) -> None:
    """All that `maskdino train-custom --resume` reads before it trains."""
    args = train_custom.parse_arguments(words)
    run = train_custom.prepare(args)
    register_prepared(run.output)
    check_datasets(load_config(str(run.config)))


WAYS: dict[str, Command] = {
    "train": train.main,
    "evaluate": train.main,
    "resume": train.main,
    "train-custom": plan,
    "train-custom-skip": plan,
    "train-custom-resume": go_on,
    "predict": predict.main,
    "convert-released": convert_released.main,
    "convert-backbone": convert_backbone.main,
}
