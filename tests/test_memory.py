"""Memory does not grow with the number of images, nor much with their size."""

from __future__ import annotations

import pytest

from tests.memory import in_child, needs_linux

pytestmark = needs_linux


@pytest.mark.slow
@pytest.mark.parametrize("what", ["predictions", "training", "evaluation"])
def test_nothing_is_kept(what: str, warm_python: str) -> None:
    """A hundred steps leave no tensor; pages of memory would tell little of so few."""
    middle, end = in_child("tests.flat_memory", what, "100", python=warm_python)["alive"]
    assert middle == end


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("what", "steps"), [("predictions", 2000), ("training", 500), ("evaluation", 2000)]
)
def test_memory_is_flat(what: str, steps: int) -> None:
    """In MiB; an evaluation keeps a record of each object, of less than 2 KiB with its mask."""
    found = in_child("tests.flat_memory", what, str(steps))
    print(what, steps, found)  # noqa: T201 - figures for the record, shown by -rP
    records = 10 * steps * 2 / 1024 if what == "evaluation" else 0
    assert found["last"] - found["first"] < 16 + records
    assert found["alive"][0] == found["alive"][1]


@pytest.mark.campaign
@pytest.mark.parametrize("what", ["predict", "evaluate", "train"])
def test_a_large_image_with_many_masks(what: str) -> None:
    """4,000 x 6,000 pixels, 100 objects; as masks of pixels alone, these are 2.3 GiB."""
    found = in_child("tests.large_image", what)
    print(what, found)  # noqa: T201 - figures for the record, shown by -rP
    assert found["objects"] == 100
    assert found["most"] < 2000


@pytest.mark.campaign
@pytest.mark.parametrize("queries", [100, 1200])
def test_a_thousand_objects_in_a_small_image(queries: int) -> None:
    """Training steps with fewer and more queries than objects."""
    found = in_child("tests.many_objects", str(queries), "1")
    print(queries, found)  # noqa: T201 - figures for the record, shown by -rP
    assert found["most"] < 2000
