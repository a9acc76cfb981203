"""One HTML file that shows an evaluation: tables, curves, bars, and the best and worst images.

It needs nothing but itself: curves are SVG, images are embedded.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_utils

from maskdino.coco_evaluation import average_precision, faster_coco_eval
from maskdino.drawing import beside
from maskdino.ground_truth import ground_truth_of
from maskdino.results import Categories, ImageResult

PANEL_PIXELS = 420
CURVE_THRESHOLDS = {0.5: 0, 0.75: 5, 0.9: 8}  # IoU and its place among COCO's ten
COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
RECALLS = np.linspace(0, 1, 101)
PER_CLASS = ("AP-", "IoU-", "PQ-")  # how per-class results of the evaluators begin
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222;
  padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .9em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0; } figcaption { color: #555; } img, svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class ScoredImage:
    """An image, and how well its objects were found.

    Attributes:
        truth, predicted: annotations, and predictions above the threshold.
        f1: harmonic mean of precision and recall at an IoU of 0.5, in [0, 1].
    """

    truth: ImageResult
    predicted: ImageResult
    f1: float


def write_report(
    path: Path, dataset: str, folder: Path, *, threshold: float = 0.5, num_images: int = 3
) -> Path:
    """Writes the report of an evaluation that has been run.

    Args:
        path: of the HTML file.
        dataset: name of the evaluated dataset.
        folder: OUTPUT_DIR of the evaluation, which holds `inference/results.json`.
        threshold: score from which on predictions are drawn and counted as found.
        num_images: so many best, and so many worst images are shown.

    Raises:
        FileNotFoundError: nothing has been evaluated there.
    """
    source = folder / "inference" / "results.json"
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} does not exist: evaluate first (train_net.py --eval-only)"
        )
    results = json.loads(source.read_text())
    results = results.get(dataset, results)  # one level more where several datasets were evaluated
    parts = [f"<h1>Evaluation on {html.escape(dataset)}</h1>", _tables(results)]
    predictions = folder / "inference" / dataset / "coco_instances_results.json"
    if predictions.is_file():
        records = json.loads(predictions.read_text())
        parts += _instance_parts(dataset, records, threshold, num_images)
    body = "\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(dataset)}'
        f"</title><style>{STYLE}</style></head><body>{body}</body></html>",
        encoding="utf-8",
    )
    return path


def _tables(results: dict) -> str:
    """A table of each task's numbers, and bars of its classes."""
    parts = []
    for task, metrics in results.items():
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        classes = {k: v for k, v in numbers.items() if k.startswith(PER_CLASS)}
        whole = {k: v for k, v in numbers.items() if k not in classes}
        head = "".join(f"<th>{html.escape(name)}</th>" for name in whole)
        row = "".join(f"<td>{_number(value)}</td>" for value in whole.values())
        parts.append(f"<h2>{html.escape(task)}</h2><table><tr><th>metric</th>{head}</tr>")
        parts.append(f"<tr><td>percent</td>{row}</tr></table>")
        if classes:
            parts.append(_figure(bars(classes), f"{task}: each class, in percent"))
    return "\n".join(parts)


def _instance_parts(
    dataset: str, records: list[dict], threshold: float, num_images: int
) -> list[str]:
    metadata = MetadataCatalog.get(dataset)
    ground_truth = json.loads(Path(metadata.json_file).read_text())
    for annotation in ground_truth["annotations"]:
        annotation.setdefault("iscrowd", 0)
    ground_truth.setdefault("info", {})
    parts = []
    for task, key in (("bbox", "bbox"), ("segm", "segmentation")):
        if records and key in records[0] and ground_truth["annotations"]:
            fast = faster_coco_eval is not None
            _, precision, _ = average_precision(ground_truth, records, task, fast=fast)
            curve = curves(precision_recall(precision), "recall", "precision")
            parts.append(_figure(curve, f"{task}: precision over recall, mean over the classes"))
    images = sorted(score_images(dataset, records, threshold), key=lambda image: -image.f1)
    shown = min(num_images, (len(images) + 1) // 2)
    worst = images[max(shown, len(images) - shown) :][::-1]
    for heading, chosen in (("Best images", images[:shown]), ("Worst images", worst)):
        parts.append(f"<h2>{heading}</h2>")
        parts += [_image_figure(image, threshold) for image in chosen]
    return parts


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


def score_images(dataset: str, records: list[dict], threshold: float) -> list[ScoredImage]:
    """How well each annotated image was done; images without objects and predictions have F1 1."""
    by_image = defaultdict(list)
    for record in records:
        if record["score"] >= threshold:
            by_image[record["image_id"]].append(record)
    dicts = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    categories = Categories.from_metadata(metadata, len(metadata.thing_classes))
    images = []
    for entry in dicts:
        truth = ground_truth_of(entry, categories)
        predicted = _from_records(truth, by_image[entry["image_id"]])
        images.append(ScoredImage(truth, predicted, f1_score(truth, predicted)))
    return images


def f1_score(truth: ImageResult, predicted: ImageResult) -> float:
    """Pairs objects of one class from an IoU of 0.5 on, predictions with the best score first."""
    total = len(truth) + len(predicted)
    if total == 0:
        return 1.0
    if not len(truth) or not len(predicted):
        return 0.0
    with_masks = truth.rles is not None and predicted.rles is not None
    shapes = [list(r.rles) if with_masks else _xywh(r.boxes) for r in (predicted, truth)]
    overlap = np.asarray(mask_utils.iou(*shapes, [0] * len(truth)))
    overlap = np.where(predicted.class_ids[:, None] == truth.class_ids, overlap, 0)
    found = 0
    for i in np.argsort(-predicted.scores, kind="stable"):
        best = overlap[i].argmax()
        if overlap[i, best] >= 0.5:
            found += 1
            overlap[:, best] = 0  # each object is found once
    return 2 * found / total


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)


def _from_records(truth: ImageResult, records: list[dict]) -> ImageResult:
    """COCO's result records as a result of the same picture."""
    numbers = {i: label for label, i in enumerate(truth.categories.dataset_ids)}
    records = sorted(records, key=lambda record: -record["score"])
    boxes = np.array([r["bbox"] for r in records], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    rles = None
    if all("segmentation" in r for r in records):
        rles = tuple(
            {**r["segmentation"], "counts": r["segmentation"]["counts"].encode()} for r in records
        )
    return ImageResult(
        truth.name,
        truth.size,
        truth.categories,
        boxes=boxes,
        scores=np.array([r["score"] for r in records], np.float32),
        class_ids=np.array([numbers[r["category_id"]] for r in records], np.int64),
        rles=rles,
        source=truth.source,
    )


def _image_figure(image: ScoredImage, threshold: float) -> str:
    scale = max(1, round(PANEL_PIXELS / max(image.truth.size)))
    panels = [
        (f"ground truth: {len(image.truth)}", image.truth.draw("instance", scale=scale)),
        (f"predicted: {len(image.predicted)}", image.predicted.draw("instance", scale=scale)),
    ]
    buffer = io.BytesIO()
    Image.fromarray(beside(panels)).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    name = html.escape(Path(image.truth.name).name)
    caption = f"{name}: F1 {100 * image.f1:.0f} % at IoU 0.5 and a score of {threshold:g}"
    return _figure(f'<img alt="{name}" src="data:image/jpeg;base64,{data}">', caption)


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
    """SVG of one bar in [0, 100] for each name, the longest first; those not measured last."""
    ordered = sorted(values.items(), key=lambda item: -item[1] if item[1] == item[1] else math.inf)
    left, width, step = 190, 420, 20
    parts = [f'<svg width="{left + width + 60}" height="{step * len(ordered) + 6}" font-size="12">']
    for i, (name, value) in enumerate(ordered):
        y, length = step * i, width * (value if math.isfinite(value) else 0) / 100
        text = html.escape(name.partition("-")[2])
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{text}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="14" fill="{COLORS[0]}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 14}">{_number(value)}</text>'
        )
    return "".join([*parts, "</svg>"])
