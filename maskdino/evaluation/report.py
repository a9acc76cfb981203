"""One HTML file that shows an evaluation: tables, curves, bars, errors, the best and worst images.

It needs nothing but itself: charts are SVG, images are embedded. What it looks like is in
``report.html`` beside this file.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from maskdino.evaluation import errors
from maskdino.evaluation.charts import bars, curves, matrix
from maskdino.evaluation.coco import (
    COCO_DETECTIONS,
    GEOMETRY,
    average_precision,
    fast_library,
)
from maskdino.evaluation.files import LOSSES_FILE
from maskdino.evaluation.image_losses import ImageLoss, write_losses
from maskdino.evaluation.report_images import EvaluatedImages, InstanceImages, find_images
from maskdino.metrics import PER_CLASS, of_classes_together
from maskdino.system.files import write_text

CURVE_THRESHOLDS = {0.5: 0, 0.75: 5, 0.9: 8}  # IoU and its place among COCO's ten
MAX_CLASSES = 20  # of a drawn confusion matrix
MAX_DOUBTS = 20
MAX_LOSSES = 20  # of images that are listed, those that are drawn included


def report_paths(datasets: Sequence[str], folder: Path) -> dict[str, Path]:
    """Where the report of each dataset belongs in the folder of an evaluation."""
    single = len(datasets) == 1
    return {d: folder / ("report.html" if single else f"report_{d}.html") for d in datasets}


def write_report(
    path: Path,
    dataset: str,
    folder: Path,
    *,
    threshold: float = 0.5,
    num_images: int = 3,
    losses_of: Callable[[str], Sequence[ImageLoss]] | None = None,
) -> Path:
    """Writes the report of an evaluation that has been run.

    Args:
        path: of the HTML file.
        dataset: name of the evaluated dataset.
        folder: OUTPUT_DIR of the evaluation, which holds `inference/results.json`.
        threshold: score from which on predicted objects are drawn and counted as found.
        num_images: so many best, and so many worst images are shown for each task, and so many of
            the largest losses.
        losses_of: gives the losses of a dataset's images, the largest first; they are written to a
            file beside the predictions, too. None: nothing is said of losses.

    Raises:
        FileNotFoundError: nothing has been evaluated there.
        ValueError: other datasets have been evaluated there, or not all images.
    """
    results = _read_results(dataset, folder)
    evaluated = find_images(dataset, folder / "inference" / dataset, results, threshold)
    details = {}
    for images in evaluated:
        if isinstance(images, InstanceImages):
            details = _details(images, results)
    losses = [] if losses_of is None else losses_of(dataset)
    if losses:
        write_losses(folder / "inference" / dataset / LOSSES_FILE, losses)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda value: f"{value:.1f}" if math.isfinite(value) else "-"
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        dataset=dataset,
        tasks=[_task(name, metrics) for name, metrics in results.items()],
        details=details,
        threshold=threshold,
        galleries=[_gallery(images, num_images) for images in evaluated],
        losses=_losses(losses, evaluated, num_images) if losses else None,
    )
    write_text(path, page)
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
        evaluated, results = list(results), results.get(dataset, {})
    else:  # of one dataset, whose name is that of the folder of its predictions
        evaluated = sorted(path.name for path in source.parent.iterdir() if path.is_dir())
    if evaluated and dataset not in evaluated:
        raise ValueError(
            f"{source} holds results of {', '.join(evaluated)}, not of {dataset}: evaluate that "
            f"first, with DATASETS.TEST \"('{dataset}',)\""
        )
    return results


def _task(name: str, metrics: dict[str, float]) -> dict:
    """What the page shows of a task's numbers: a table, and bars of its classes."""
    classes = []
    for prefix in PER_CLASS:
        found = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
        measured = {k: v for k, v in found.items() if math.isfinite(v)}
        if found:
            svg, unmeasured = bars(measured) if measured else "", len(found) - len(measured)
            classes.append({"metric": prefix[:-1], "svg": svg, "unmeasured": unmeasured})
    return {"name": name, "metrics": of_classes_together(metrics), "classes": classes}


def _details(images: InstanceImages, results: Collection[str]) -> dict[str, dict]:
    """Curves and errors of "bbox" and "segm", as far as they were measured."""
    details: dict[str, dict] = {}
    ground_truth, predictions = images.ground_truth, images.predictions
    if not predictions or not ground_truth.get("annotations"):
        return details
    for task, key in GEOMETRY.items():
        if task in results and key in predictions[0]:
            fast = fast_library() is not None
            # All that was predicted, so the curves are those of the AP beside them.
            counts = Counter(prediction["image_id"] for prediction in predictions)
            detections = max(COCO_DETECTIONS, *counts.values())
            _, precision, _ = average_precision(
                ground_truth, predictions, task, fast=fast, detections=detections
            )
            chart = curves(precision_recall(precision))
            details[task] = {"curves": chart, "errors": None}
            if errors.hotcoco is not None:
                analysis = errors.analyze(
                    ground_truth,
                    predictions,
                    task,
                    threshold=images.threshold,
                    detections=detections,
                )
                details[task]["errors"] = _errors(analysis)
    return details


def _errors(analysis: errors.Analysis) -> dict:
    """What the page shows of an analysis: all but the classes that are confused least."""
    shown, confusion = analysis.most_confused(MAX_CLASSES)
    names = [analysis.classes[i] for i in shown]
    return {
        "confusion": matrix(confusion, [*names, "nothing"], [*names, "nothing"]),
        "classes": len(names),
        "all_classes": len(analysis.classes),
        "kinds": [(k, n, analysis.costs[k]) for k, n in analysis.counts.items()],
        "groups": analysis.groups,
        "group_metrics": errors.GROUP_METRICS,
        "doubts": analysis.doubts[:MAX_DOUBTS],
        "all_doubts": len(analysis.doubts),
    }


def precision_recall(precision: np.ndarray) -> dict[str, np.ndarray]:
    """Curves (101,) of precision at recall 0, 0.01, ..., 1, of COCO's precision.

    That is (IoU thresholds, recalls, classes, sizes, detections); -1 where a class has no objects.
    """
    result = {}
    for iou, index in CURVE_THRESHOLDS.items():
        of_classes = precision[index, :, :, 0, -1]
        measured = of_classes[:, (of_classes >= 0).any(0)]
        if measured.size:
            result[f"IoU {iou}"] = measured.mean(1)
    return result


def _gallery(images: EvaluatedImages, num_images: int) -> dict:
    """What the page shows of a task's images."""
    ranked = images.ranked()
    shown = min(num_images, (len(ranked) + 1) // 2)
    worst = ranked[max(shown, len(ranked) - shown) :][::-1]
    return {
        "task": images.task,
        "measure": images.measure,
        "mean": 100 * float(np.mean([score for score, _ in ranked])) if ranked else math.nan,
        "ranked": len(ranked),
        "total": len(images.records),
        "chosen": {"Best": _drawn(images, ranked[:shown]), "Worst": _drawn(images, worst)},
    }


def _losses(
    losses: Sequence[ImageLoss], evaluated: Sequence[EvaluatedImages], num_images: int
) -> dict:
    """What the page shows of the losses: the largest as a table, the first of them drawn."""
    chosen = [(loss.total, loss.record) for loss in losses[:num_images]]
    return {
        "largest": losses[: max(MAX_LOSSES, num_images)],
        "terms": {name: name.replace("_", " ") for name in losses[0].terms},
        "total": len(losses),
        "median": float(np.median([loss.total for loss in losses])),
        "file": LOSSES_FILE,
        "drawn": _drawn(evaluated[0], chosen) if evaluated else [],
    }


def _drawn(images: EvaluatedImages, chosen: Iterable[tuple[float, dict]]) -> list[dict]:
    drawn = []
    for score, record in chosen:
        buffer = io.BytesIO()
        Image.fromarray(images.draw(record)).save(buffer, "JPEG", quality=85)
        jpeg = base64.b64encode(buffer.getvalue()).decode("ascii")
        name = Path(record["file_name"]).name
        drawn.append({"name": name, "jpeg": jpeg, "score": score})
    return drawn
