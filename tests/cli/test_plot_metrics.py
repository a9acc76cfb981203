"""Tests of tools/plot_metrics.py."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib import image as mpl_image
from matplotlib.figure import Figure

from maskdino.cli import plot_metrics


def write(folder: Path, records: list[dict], tail: str = "") -> Path:
    path = folder / "metrics.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_later_runs_replace_what_they_repeat(tmp_path: Path) -> None:
    iterations = [19, 39, 59, 39, 59, 59]
    records = [{"iteration": it, "total_loss": float(i)} for i, it in enumerate(iterations)]
    records[5]["segm/AP"] = 12.5
    curves = plot_metrics.read_metrics(write(tmp_path, records, tail='{"iteration": 79, "tot'))
    assert curves == {"total_loss": ([19, 39, 59], [0.0, 3.0, 5.0]), "segm/AP": ([59], [12.5])}


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [], tail='oops\n{"iteration": 1}\n')
    with pytest.raises(ValueError, match="line 1, is no JSON: 'oops'"):
        plot_metrics.read_metrics(path)


@pytest.mark.parametrize("line", ["[1]", "3", '{"lr": 1}', '{"iteration": "x", "lr": 1}'])
def test_lines_without_an_iteration_are_named(line: str, tmp_path: Path) -> None:
    path = write(tmp_path, [{"iteration": 1, "lr": 1.0}], tail=f"{line}\n")
    with pytest.raises(ValueError, match="line 2, names no iteration: "):
        plot_metrics.read_metrics(path)


def test_texts_are_no_curves(tmp_path: Path) -> None:
    path = write(tmp_path, [{"iteration": 1, "lr": 1.0, "note": "mine"}])
    assert plot_metrics.read_metrics(path) == {"lr": ([1], [1.0])}


def test_the_image_is_where_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [{"iteration": it, "lr": 1.0 / it} for it in (20, 40)])
    plot_metrics.main([str(tmp_path), "--output", str(tmp_path / "curves")])
    assert (tmp_path / "curves.png").is_file() and "curves.png" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a folder: give a file, as metrics.png"):
        plot_metrics.main([str(tmp_path), "--output", str(tmp_path)])


def test_draws_each_curve_in_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("total_loss", "loss_class", "loss_giou", "lr", "images_per_second", "segm/AP")
    losses = [{"iteration": it, **dict.fromkeys(names, 1.0 / it)} for it in (1, 20, 40)]
    write(tmp_path, losses)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_metrics.main([str(tmp_path)])
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels) == [
        "total loss",
        "losses of the last layer",
        "AP, PQ, mIoU (%)",
        "learning rate",
        "images per second",
    ]
    drawn = {line.get_label(): line for line in panels["losses of the last layer"].lines}
    assert drawn.keys() == {"loss_class", "loss_giou"}
    assert drawn["loss_giou"].get_xydata().tolist() == [[1, 1], [20, 1 / 20], [40, 1 / 40]]
    scales = {title: axes.get_yscale() for title, axes in panels.items()}
    assert scales["total loss"] == "log" and scales["learning rate"] == "linear"


def test_writes_an_image(tmp_path: Path) -> None:
    write(tmp_path, [{"iteration": it, "lr": 1.0 / it} for it in (20, 40)])
    plot_metrics.main([str(tmp_path)])
    image = mpl_image.imread(tmp_path / "metrics.png")
    assert image.shape[0] > 300
    assert (image[..., :3].min(2) < 0.5).any()  # not blank


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("", "no metrics yet")])
def test_nothing_to_plot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["plot_metrics.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=message):
        plot_metrics.main()
