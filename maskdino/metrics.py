"""Names of what evaluations measure: "segm/AP", "my-data/segm/AP-person"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PER_CLASS = ("AP-", "PQ-", "IoU-", "ACC-")  # how the values of single classes begin
_OF_CLASS = re.compile(rf"(?:^|/)(?:{'|'.join(PER_CLASS)})")


def before_class(name: str) -> str | None:
    """What stands before the value of a class, whose own name may have slashes; None: of no class.

    That is "segm" of "segm/AP-car/van", and "" of "AP-car".
    """
    found = _OF_CLASS.search(name)
    return None if found is None else name[: found.start()]


def of_classes_together(names: Mapping[str, float]) -> dict[str, float]:
    """The values that are not of a single class."""
    return {name: value for name, value in names.items() if before_class(name) is None}


def flatten(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Results, nested by task or dataset, by their whole names.

    Raises:
        ValueError: something in them is no number.
    """
    flat: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
            continue
        try:  # texts have none, and arrays one that refuses several numbers
            flat[prefix + name] = value.__float__()
        except (AttributeError, TypeError, RuntimeError):
            message = f"the metric {prefix}{name} is {value!r}, which is no number"
            raise ValueError(message) from None
    return flat
