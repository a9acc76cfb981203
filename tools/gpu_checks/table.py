"""The lines of a run as Markdown tables for csrc/BENCHMARKS.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.timing import table

# Columns of each step's table; a line that has none of a step's is told of below the table.
COLUMNS = {
    "operator_is_right": (
        "backend",
        "dtype",
        "queries",
        "channels",
        "spread",
        "errors",
        "ok",
    ),
    "training_is_sound": ("task", "precision", "objects", "loss", "ok", "waits", "where"),
    "training_speed": (
        "precision",
        "batch",
        "size",
        "objects",
        "ms",
        "peak_mib",
        "waits",
        "where",
        "launches",
        "copies",
        "gpu_ms",
    ),
    "inference_speed": (
        "task",
        "precision",
        "part",
        "network_ms",
        "results_ms",
        "peak_mib",
        "waits",
        "where",
        "launches",
        "copies",
        "gpu_ms",
    ),
    "operator_speed": ("contender", "dtype", "queries", "batch", "forward_us", "both_us"),
    "peer": (
        "what",
        "side",
        "contender",
        "precision",
        "dtype",
        "batch",
        "forward_us",
        "both_us",
        "errors",
        "first_loss",
        "ms",
        "peak_mib",
        "waits",
        "launches",
        "copies",
        "gpu_ms",
    ),
    "parity": ("precision", "of", "same_queries"),
    "graph_and_compile": ("what", "ms", "error", "first_s"),
    "sanitizer": ("tool", "status", "tail"),
}
HIDDEN = ("step", "top")


def tables(folder: Path) -> str:
    """Everything that a run left, as Markdown.

    Raises:
        SystemExit: the folder has no results.
    """
    path = folder / "results.jsonl"
    if not path.is_file():
        raise SystemExit(f"error: {folder} has no results.jsonl; was anything run there?")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    parts = []
    for step in dict.fromkeys(line["step"] for line in lines if line.get("step")):
        of_step = [line for line in lines if line["step"] == step]
        parts.append(f"### {step.replace('_', ' ')}\n\n{_section(step, of_step)}")
    return "\n\n".join(parts)


def _section(step: str, lines: Sequence[dict]) -> str:
    columns = COLUMNS.get(step)
    rows = [line for line in lines if columns and columns[0] in line and "FAILED" not in line]
    parts = []
    if rows:
        used = [column for column in columns if any(column in row for row in rows)]
        parts.append(table(used, [[_text(row.get(column)) for column in used] for row in rows]))
    others = [line for line in lines if line not in rows]
    parts += ["\n".join(_bullets(others))] if others else []
    kernels = max((row.get("top", []) for row in rows), key=len, default=[])
    if kernels and step == "training_speed":
        cells = [[name.replace("|", "/"), str(count), str(ms)] for name, count, ms in kernels]
        parts.append(table(["kernel", "calls", "ms"], cells))
    return "\n\n".join(parts)


def _bullets(lines: Iterable[dict]) -> list[str]:
    return [
        "- "
        + "; ".join(f"{key}: {_text(value)}" for key, value in line.items() if key not in HIDDEN)
        for line in lines
    ]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value)
    return str(value).replace("|", "/").replace("\n", " ")
