"""Words of messages."""

from __future__ import annotations

import pytest

from maskdino.system.words import counted


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ["object"], "1 object"),
        (0, ["object"], "0 objects"),
        (2, ["label image"], "2 label images"),
        (1, ["class"], "1 class"),
        (3, ["class"], "3 classes"),
        (3, ["box"], "3 boxes"),
        (3, ["batch"], "3 batches"),
        (1, ["category", "categories"], "1 category"),
        (80, ["category", "categories"], "80 categories"),
    ],
)
def test_nouns_follow_their_number(number: int, words: list[str], text: str) -> None:
    assert counted(number, *words) == text
