"""Draws the curves of a training: losses, learning rate, average precision, throughput, memory.

    maskdino plot output/nuclei            # writes output/nuclei/metrics.png

It reads the folder's metrics.json, also while the training runs.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.evaluation.charts import draw_lines
from maskdino.system.files import write_errors
from maskdino.system.words import counted

Curves = dict[str, tuple[list[int], list[float]]]  # name -> iterations, values

# Title of a panel -> how its curves are chosen by name.
LOSSES = ("loss_class", "loss_l1", "loss_giou", "loss_mask_bce", "loss_mask_dice")
METRICS = ("AP", "AP50", "PQ", "mIoU")


def read_metrics(path: Path) -> Curves:
    """Reads the curves of metrics.json, one JSON object a line.

    A run that was resumed, or started anew, in the same folder repeats iterations: what came
    later replaces what lay at or after its iteration.
    """
    lines = path.read_text().splitlines()
    records: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is no JSON: {line[:80]!r}") from error
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise ValueError(f"{path}, line {number}, names no iteration: {line[:80]!r}")
        while records and records[-1]["iteration"] > record["iteration"]:
            records.pop()
        records.append(record)
    curves: Curves = {}
    for record in records:
        for name, value in record.items():
            if not isinstance(value, int | float):  # a writer of the user's own may add texts
                continue
            iterations, values = curves.setdefault(name, ([], []))
            if iterations and iterations[-1] == record["iteration"]:
                values[-1] = value
            else:
                iterations.append(record["iteration"])
                values.append(value)
    curves.pop("iteration", None)
    return curves


def choose_panels(curves: Curves) -> dict[str, list[str]]:
    """Returns the panels that have curves, with the names of these."""
    metrics = [name for name in curves if name.rpartition("/")[2] in METRICS]
    panels = {
        "total loss": ["total_loss"],
        "losses of the last layer": list(LOSSES),
        "AP, PQ, mIoU (%)": sorted(metrics),
        "learning rate": ["lr"],
        "norm of the gradient": ["gradient_norm"],
        "images per second": ["images_per_second"],
        "seconds per iteration": ["time", "data_time"],
        "peak memory (MB)": ["max_memory_mb"],
    }
    found = {title: [n for n in names if n in curves] for title, names in panels.items()}
    return {title: names for title, names in found.items() if names}


def plot(curves: Curves, title: str, target: Path) -> None:
    """Draws all panels into a file, PNG or what its name says."""
    panels = choose_panels(curves)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    for number, (name, chosen) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        draw_lines(axes, {key: curves[key] for key in chosen})
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        drawn = [value for key in chosen for value in curves[key][1] if value > 0]
        if ("loss" in name or "norm" in name) and drawn and max(drawn) > 10 * min(drawn):
            axes.set_yscale("log")
        if number > len(panels) - columns:
            axes.set_xlabel("iteration", fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(target, dpi=110)


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("output_dir", type=Path, help="the OUTPUT_DIR of a training")
    parser.add_argument("--output", type=Path, help="default: metrics.png in that folder")
    args = parser.parse_args(words)
    source = args.output_dir / "metrics.json"
    if not source.is_file():
        raise CommandError(
            f"{source} does not exist; is {args.output_dir} the folder of a training?"
        )
    curves = read_metrics(source)
    if not choose_panels(curves):
        raise CommandError(f"{source} holds no metrics yet")
    target = args.output or args.output_dir / "metrics.png"
    if target.is_dir():
        raise CommandError(f"--output {target} is a folder: give a file, as metrics.png")
    if not target.suffix:
        target = target.with_name(f"{target.name}.png")  # as it would be called
    with write_errors(target):
        plot(curves, str(args.output_dir), target)
    print(f"{counted(len(curves), 'curve')} read, image written to {target}")
