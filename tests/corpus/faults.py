"""Faults of annotation files, and the outcome of each: in training, evaluation, and own data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from tests.corpus.case import Outcome, Ran, Refused, Works, by_way
from tests.corpus.scene import (
    EVERYTHING,
    SIZE,
    THINGS,
    expected,
    prepared,
    trained_on,
)

KIND = "annotations"
FILE = r"bad\.json"
WAYS = ("train", "evaluate", "train-custom", "train-custom-skip")
AREA = SIZE[0] * SIZE[1]
HUGE = 10**400
Spoil = Callable[[dict], object]


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, or only looks like it.

    Attributes:
        name: of it.
        spoil: changes the content of the file; or the bytes of the file; or does away with it.
        outcomes: of each way.
    """

    name: str
    spoil: Spoil | bytes | None
    outcomes: dict[str, Outcome]


BOTH = ("bbox", "segm")


def works(way: str, left: frozenset[int], said: str = "") -> Works:
    def trained(_: Ran) -> None:
        same(trained_on(), expected(left))

    def measured(ran: Ran) -> None:
        results = json.loads((ran.folder / "out" / "inference" / "results.json").read_text())
        (found,) = results["results"].values() if "results" in results else (results,)
        values = {task: round(found[task]["AP"], 3) for task in found}
        assert values == dict.fromkeys(BOTH, 100.0), values

    def written(ran: Ran) -> None:
        same(prepared(ran.folder), expected(left))

    checks = {"train": trained, "evaluate": measured}
    return Works(checks.get(way, written), said)


def same(have: object, want: object) -> None:
    """Asserts that what was found is what it must be, and shows both."""
    assert have == want, f"{have} is not {want}"


def fine(name: str, spoil: Spoil, left: frozenset[int] = EVERYTHING, **other: Outcome) -> Fault:
    """Nothing is wrong: `left` are the objects that are learned."""
    return Fault(name, spoil, {way: works(way, left) for way in WAYS} | by_way(other))


def of_own_data(name: str, spoil: Spoil, *words: str) -> Fault:
    """Own data are rewritten; registered ones are read by detectron2, which fails."""
    rewritten = {way: works(way, EVERYTHING) for way in WAYS if "custom" in way}
    return Fault(name, spoil, _refused(words) | rewritten)


def refused(name: str, spoil: Spoil | bytes | None, *words: str, **other: Outcome) -> Fault:
    """Nothing can be done with the file; train-custom's message is a list."""
    return Fault(name, spoil, _refused(words) | by_way(other))


def of_object(name: str, spoil: Spoil, *words: str, number: int = 2, **other: Outcome) -> Fault:
    """Something is wrong with one object, which is named, and can be left out."""
    outcomes = _refused((f"annotation {number} ", *words))
    outcomes["train-custom-skip"] = works("train-custom-skip", EVERYTHING - {number}, words[-1])
    return Fault(name, spoil, outcomes | by_way(other))


def of_image(name: str, spoil: Spoil, *words: str, **other: Outcome) -> Fault:
    """Something is wrong with the first image, which can be left out with its objects."""
    outcomes = _refused(words)
    left = frozenset(n for n in EVERYTHING if THINGS[n].image != 1)
    outcomes["train-custom-skip"] = works("train-custom-skip", left, words[-1])
    return Fault(name, spoil, outcomes | by_way(other))


def tolerable(name: str, spoil: Spoil, *words: str, number: int = 2, **other: Outcome) -> Fault:
    """Published datasets have such objects: training leaves them out, and says so."""
    left = EVERYTHING - {number}
    other.setdefault("evaluate", Works(said=words[0]))
    outcomes: dict[str, Outcome] = {
        "train": works("train", left, words[0]),
        "train-custom": Refused((FILE, f"annotation {number} ", *words), lines=20),
        "train-custom-skip": works("train-custom-skip", left, words[0]),
    }
    return Fault(name, spoil, outcomes | by_way(other))


def _refused(words: tuple[str, ...]) -> dict[str, Outcome]:
    one_line, listed = Refused((FILE, *words)), Refused((FILE, *words), lines=20)
    return {way: listed if "custom" in way else one_line for way in WAYS}


def edit(kind: str, index: int = 1, **values: object) -> Spoil:
    """Changes an entry of one of the lists."""
    return lambda data: data[kind][index].update(values)


def drop(kind: str, key: str, index: int = 1) -> Spoil:
    """Removes a key of an entry."""
    return lambda data: data[kind][index].pop(key)


def lists(**values: object) -> Spoil:
    """Replaces whole lists."""
    return lambda data: data.update(values)


def rle(**values: object) -> Spoil:
    """Changes the run lengths of the third object, which are a list."""
    return lambda data: data["annotations"][2]["segmentation"].update(values)
