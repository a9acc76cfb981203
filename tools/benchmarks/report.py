"""What a family of benchmarks has found, as Markdown and as JSON."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """A table and what it is of.

    Attributes:
        about: the conditions, in Markdown.
        headings: of the columns.
        rows: as many cells each as there are headings.
    """

    about: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The conditions above the table."""
        return f"{self.about}\n\n{table(self.headings, self.rows)}"

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        rows = [dict(zip(self.headings, row, strict=True)) for row in self.rows]
        return {"about": self.about, "rows": rows}


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load_peer(name: str) -> Callable[..., Any]:
    """Imports a function of a peer, "package.module:function".

    Raises:
        SystemExit: it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--peer {name}: {error}; give package.module:function") from None
