"""One HTML file that shows an evaluation: tables, curves, bars, and the best and worst images.

It needs nothing but itself: curves are SVG, images are embedded.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from maskdino.evaluation.coco import average_precision, faster_coco_eval
from maskdino.evaluation.report_images import EvaluatedImages, InstanceImages, find_images

CURVE_THRESHOLDS = {0.5: 0, 0.75: 5, 0.9: 8}  # IoU and its place among COCO's ten
COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
PER_CLASS = ("AP-", "PQ-", "IoU-", "ACC-")  # how per-class results of the evaluators begin
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222;
  padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .9em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0; } figcaption { color: #555; } img, svg { max-width: 100%; height: auto; }
.bars { max-height: 640px; overflow: auto; } .bars svg { max-width: none; }
"""


def report_paths(datasets: Sequence[str], folder: Path) -> dict[str, Path]:
    """Where the report of each dataset belongs in the folder of an evaluation."""
    single = len(datasets) == 1
    return {d: folder / ("report.html" if single else f"report_{d}.html") for d in datasets}


def write_report(
    path: Path, dataset: str, folder: Path, *, threshold: float = 0.5, num_images: int = 3
) -> Path:
    """Writes the report of an evaluation that has been run.

    Args:
        path: of the HTML file.
        dataset: name of the evaluated dataset.
        folder: OUTPUT_DIR of the evaluation, which holds `inference/results.json`.
        threshold: score from which on predicted objects are drawn and counted as found.
        num_images: so many best, and so many worst images are shown for each task.

    Raises:
        FileNotFoundError: nothing has been evaluated there.
        ValueError: other datasets have been evaluated there, or not all images.
    """
    results = _read_results(dataset, folder)
    evaluated = find_images(dataset, folder / "inference" / dataset, results, threshold)
    figures = {}
    for images in evaluated:
        if isinstance(images, InstanceImages):
            figures = _curve_figures(images.ground_truth, images.predictions)
    parts = [f"<h1>Evaluation on {html.escape(dataset)}</h1>"]
    for task, metrics in results.items():
        parts += [*_table(task, metrics), figures.get(task, "")]
    for images in evaluated:
        parts += _image_parts(images, num_images)
    body = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(dataset)}'
        f"</title><style>{STYLE}</style></head><body>{body}</body></html>",
        encoding="utf-8",
    )
    return path


def _read_results(dataset: str, folder: Path) -> dict[str, dict]:
    source = folder / "inference" / "results.json"
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} does not exist: evaluate first (train_net.py --eval-only)"
        )
    results = json.loads(source.read_text())
    # One level more where several datasets were evaluated.
    if any(isinstance(value, dict) for metrics in results.values() for value in metrics.values()):
        if dataset not in results:
            raise ValueError(f"{source} holds results of {', '.join(results)}, not of {dataset}")
        return results[dataset]
    return results


def _table(task: str, metrics: dict[str, float]) -> list[str]:
    """A table of a task's numbers, and bars of its classes."""
    whole = {k: v for k, v in metrics.items() if not k.startswith(PER_CLASS)}
    head = "".join(f"<th>{html.escape(name)}</th>" for name in whole)
    row = "".join(f"<td>{_number(value)}</td>" for value in whole.values())
    parts = [
        f"<h2>Results: {html.escape(task)}</h2><table><tr><th>metric</th>{head}</tr>",
        f"<tr><td>percent</td>{row}</tr></table>",
    ]
    for prefix in PER_CLASS:
        classes = {k: v for k, v in metrics.items() if k.startswith(prefix)}
        measured = {k: v for k, v in classes.items() if math.isfinite(v)}
        if classes:
            caption = f"{task}: {prefix[:-1]} of each class in percent"
            if len(measured) < len(classes):
                caption += f" ({len(classes) - len(measured)} could not be measured)"
            parts.append(_figure(f'<div class="bars">{bars(measured)}</div>', caption))
    return parts


def _curve_figures(ground_truth: dict, predictions: list[dict]) -> dict[str, str]:
    """Curves of "bbox" and "segm", as far as there are predictions and annotations."""
    figures = {}
    for task, key in (("bbox", "bbox"), ("segm", "segmentation")):
        if predictions and key in predictions[0] and ground_truth.get("annotations"):
            fast = faster_coco_eval is not None
            _, precision, _ = average_precision(ground_truth, predictions, task, fast=fast)
            curve = curves(precision_recall(precision), "recall", "precision")
            figures[task] = _figure(curve, f"{task}: precision over recall, mean over the classes")
    return figures


def precision_recall(precision: np.ndarray) -> dict[str, np.ndarray]:
    """Curves (101,) of precision at recall 0, 0.01, ..., 1.

    Args:
        precision: COCO's, (IoU thresholds, recalls, classes, sizes, detections); -1 where a class
            has no objects.
    """
    result = {}
    for iou, index in CURVE_THRESHOLDS.items():
        of_classes = precision[index, :, :, 0, -1]
        measured = of_classes[:, (of_classes >= 0).any(0)]
        if measured.size:
            result[f"IoU {iou}"] = measured.mean(1)
    return result


def _image_parts(images: EvaluatedImages, num_images: int) -> list[str]:
    ranked = images.ranked()
    if not ranked:
        return []
    mean = np.mean([score for score, _ in ranked])
    parts = [
        f"<h2>Images: {images.task}</h2><p>Ranked by {html.escape(images.measure)}: "
        f"{100 * mean:.1f} % on average over {len(ranked)} of {len(images.records)} images.</p>"
    ]
    shown = min(num_images, (len(ranked) + 1) // 2)
    worst = ranked[max(shown, len(ranked) - shown) :][::-1]
    for heading, chosen in (("Best", ranked[:shown]), ("Worst", worst)):
        if chosen:
            parts.append(f"<h3>{heading}</h3>")
        for score, record in chosen:
            name = html.escape(Path(record["file_name"]).name)
            source = f"data:image/jpeg;base64,{_jpeg(images.draw(record))}"
            caption = f"{name}: {100 * score:.1f} %"
            parts.append(_figure(f'<img alt="{name}" src="{source}">', caption))
    return parts


def _jpeg(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def curves(series: dict[str, Sequence[float]], x_name: str, y_name: str) -> str:
    """SVG of values in [0, 1] over 0, ..., 1."""
    width, height, left, top = 460, 300, 50, 12
    parts = [f'<svg width="{width + 180}" height="{height + 60}" font-size="13">']
    for tick in range(6):
        x, y = left + width * tick / 5, top + height * (1 - tick / 5)
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick / 5:g}</text>')
        parts.append(
            f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{tick / 5:g}</text>'
        )
    for i, (name, values) in enumerate(series.items()):
        xs = np.linspace(left, left + width, len(values))
        points = " ".join(
            f"{x:.1f},{top + height * (1 - y):.1f}" for x, y in zip(xs, values, strict=True)
        )
        color = COLORS[i % len(COLORS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        label = f"{html.escape(name)}: {100 * float(np.mean(values)):.1f}"
        parts.append(
            f'<text x="{left + width + 14}" y="{30 + 20 * i}" fill="{color}">{label}</text>'
        )
    middle = left + width / 2
    parts.append(
        f'<text x="{middle}" y="{top + height + 38}" text-anchor="middle">{x_name}</text>'
        f'<text x="14" y="{top + height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {top + height / 2})">{y_name}</text></svg>'
    )
    return "".join(parts)


def bars(values: dict[str, float]) -> str:
    """SVG of one bar in [0, 100] for each name, the longest first."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    left, width, step = 190, 420, 20
    parts = [f'<svg width="{left + width + 60}" height="{step * len(ordered) + 6}" font-size="12">']
    for i, (name, value) in enumerate(ordered):
        y, length = step * i, width * value / 100
        text = html.escape(name.partition("-")[2])
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{text}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="14" fill="{COLORS[0]}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 14}">{_number(value)}</text>'
        )
    return "".join([*parts, "</svg>"])
