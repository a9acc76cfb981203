"""Charts by matplotlib, without a display: lines and bars, as SVG that stands in a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Values = Sequence[float] | np.ndarray
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def draw_lines(axes: Axes, lines: Mapping[str, tuple[Values, Values]]) -> None:
    """Draws lines, name -> (x, y), with a grid and, for several of them, a legend."""
    for name, (x, y) in lines.items():
        marker = "o" if len(y) < 30 else None
        axes.plot(x, y, label=name, marker=marker, markersize=3, linewidth=1.2)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="x-small")


def curves(lines: Mapping[str, np.ndarray]) -> str:
    """SVG of precisions (N,) at equal steps of recall from 0 to 1, their means in the legend."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    draw_lines(
        axes,
        {
            f"{name}: {100 * values.mean():.1f}": (np.linspace(0, 1, len(values)), values)
            for name, values in lines.items()
        },
    )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    return _to_svg(figure)


def bars(values: Mapping[str, float]) -> str:
    """SVG of one bar in [0, 100] for each name, the longest first."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    names, lengths = [name for name, _ in ordered], [value for _, value in ordered]
    figure = Figure(figsize=(7, 0.25 * len(ordered) + 0.2))
    axes = figure.subplots()
    drawn = axes.barh(range(len(ordered)), lengths)
    axes.bar_label(drawn, [f"{value:.1f}" for value in lengths], padding=3, fontsize="small")
    # "$" is a character like others.
    axes.set_yticks(range(len(ordered)), names, fontsize="small", parse_math=False)
    axes.set(xlim=(0, 100), ylim=(len(ordered) - 0.5, -0.5))
    axes.set_frame_on(False)
    axes.tick_params(length=0, labelbottom=False)
    return _to_svg(figure)


def matrix(numbers: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> str:
    """SVG of a table of counts (R, C), each field as dark as its share of the row."""
    figure = Figure(figsize=(0.5 * len(columns) + 1, 0.32 * len(rows) + 1))
    axes = figure.subplots()
    shares = numbers / np.maximum(numbers.sum(1, keepdims=True), 1)
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="#ddd", linewidth=0.5)
    for (i, j), number in np.ndenumerate(numbers):
        color = "white" if shares[i, j] > 0.6 else "black" if number else "#bbb"
        axes.text(
            j + 0.5, i + 0.5, str(number), ha="center", va="center", fontsize="small", color=color
        )
    centers = [np.arange(len(names)) + 0.5 for names in (columns, rows)]
    axes.set_xticks(
        centers[0], columns, fontsize="small", parse_math=False, rotation=40, ha="right"
    )
    axes.set_yticks(centers[1], rows, fontsize="small", parse_math=False)
    axes.set(xlabel="predicted", ylabel="annotated", ylim=(len(rows), 0))
    axes.tick_params(length=0)
    return _to_svg(figure)


def _to_svg(figure: Figure) -> str:
    """The element <svg>, with text as text, the same each time."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "maskdino"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
