"""The lines of a run as Markdown tables for csrc/BENCHMARKS.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import table

# Columns of each step's table; a line that has none of a step's is told of below the table.
COLUMNS = {
    "operator_is_right": "backend dtype queries batch channels spread errors ok",
    "training_is_sound": "task precision objects loss ok waits where",
    "training_speed": "precision batch size objects recompute graphs first_loss ms peak_mib "
    "waits where launches copies gpu_ms",
    "training_compiled": "precision batch size objects first_loss first_s ms peak_mib "
    "launches gpu_ms",
    "commands": "command status seconds",
    "inference_speed": "task precision part ms peak_mib waits where launches copies gpu_ms",
    "operator_speed": "contender dtype queries batch errors forward_us both_us",
    "peer": "what side anchors queries relative moved precision first_loss ms peak_mib waits "
    "launches copies gpu_ms",
    "parity": "precision of same_queries moved",
    "graph_and_compile": "what ms error first_s",
    "sanitizer": "tool status tail",
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
    columns = COLUMNS.get(step, "").split()
    rows = [line for line in lines if columns and columns[0] in line and "FAILED" not in line]
    parts = []
    if rows:
        used = [column for column in columns if any(column in row for row in rows)]
        parts.append(table(used, [[_text(row.get(column)) for column in used] for row in rows]))
    others = [line for line in lines if line not in rows]
    if others:
        parts.append("\n".join(_bullet(line) for line in others))
    kernels = max((row.get("top", []) for row in rows), key=len, default=[])
    if kernels and step == "training_speed":
        cells = [[name.replace("|", "/"), str(count), str(ms)] for name, count, ms in kernels]
        parts.append(table(["kernel", "calls", "ms"], cells))
    return "\n\n".join(parts)


def _bullet(line: dict) -> str:
    return "- " + "; ".join(f"{k}: {_text(value)}" for k, value in line.items() if k not in HIDDEN)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value)
    return str(value).replace("|", "/").replace("\n", " ")
