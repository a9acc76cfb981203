"""What goes wrong in an evaluation of boxes or masks: which errors, among which classes, and where.

Computed by hotcoco, which is optional (``pip install "maskdino[analysis]"``).

Shape key: K classes of the dataset.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from maskdino.evaluation.coco import numbered

hotcoco: Any
try:
    hotcoco = import_module("hotcoco")
except ImportError:  # a report says what is missing
    hotcoco = None

# Error of hotcoco -> its name for readers, in the order in which TIDE gives one to a prediction.
ERRORS = {
    "Loc": "localization",
    "Cls": "class",
    "Dupe": "duplicate",
    "Both": "class and localization",
    "Bkg": "background",
    "Miss": "missed",
}
CROWDING = (1, 5, 20, 100)  # the most objects of an image of each group
GROUP_METRICS = ("AP", "AP50", "APs", "APm", "APl")
MATCHED, NEAR = 0.5, 0.1  # IoU from which a prediction finds an object, and from which it is near


@dataclass(frozen=True)
class Doubt:
    """A sure prediction that no annotation agrees with.

    The box is x, y, width and height in pixels; `annotated` is the class in its place, if any.
    """

    file_name: str
    box: list[float]
    predicted: str
    annotated: str | None
    score: float


@dataclass(frozen=True)
class Analysis:
    """Errors of an evaluation.

    A prediction is right that is matched with an object of its class at an IoU of 0.5, the best
    scores first, as for AP50. Each other one has one error, the first that fits, as TIDE defines
    them (Bolya, Foley, Hays and Hoffman, ECCV 2020, https://arxiv.org/abs/2008.08115), by the
    largest IoU that it has with an object:

    - localization: from 0.1 to 0.5 with one of its own class (crowds of its class are such, too).
    - class: at least 0.5 with one of another class.
    - duplicate: at least 0.5 with one of its class that a better score has found.
    - class and localization: from 0.1 to 0.5 with one of another class.
    - background: below 0.1 with all.
    - missed, of objects: no prediction finds it, and none of the first two errors is about it.

    What an error costs is the AP50 that there would be without it, less the AP50 that there is: of
    the predictions with a wrong place or class, the best about an object that is not found gets
    the right one, and all else are taken away, as are the predictions of the other errors and the
    objects missed. Costs do not add up to what is missing to 100.
    """

    counts: dict[str, int]  # of each error, by the names in `ERRORS`
    costs: dict[str, float]  # of each error, in percent of AP50
    classes: list[str]  # names (K) of the classes
    # (K + 1, K + 1) int64; objects of class i that were taken for class j. The last row are
    # predictions without an object, the last column objects without a prediction. Pairs have an
    # IoU of at least 0.5, of whatever class, the best scores first. Crowds are no objects here.
    confusion: np.ndarray
    # Images by the number of their objects: name -> number of images, objects, and the metrics
    # of `GROUP_METRICS` in percent; NaN where there is nothing to measure.
    groups: dict[str, dict[str, float]]
    doubts: list[Doubt]  # annotations that may be wrong, the surest first

    def most_confused(self, number: int) -> tuple[list[int], np.ndarray]:
        """At most `number` classes that are taken for others, and others for them, most often.

        Returns:
            Them in their order, and the confusion (number + 1, number + 1) among them and nothing.
        """
        among = self.confusion[:-1, :-1]
        mistakes = among.sum(0) + among.sum(1) - 2 * among.diagonal()
        chosen = sorted(np.argsort(-mistakes, kind="stable")[:number].tolist())
        kept = [*chosen, len(self.classes)]
        return chosen, self.confusion[np.ix_(kept, kept)]


def analyze(
    ground_truth: dict, records: list[dict], task: str, *, threshold: float, detections: int
) -> Analysis:
    """Analyzes predictions; see `average_precision` for all but the threshold.

    That is the score from which predictions count in the confusion matrix and for doubts; errors
    and groups count all, as AP does.

    Raises:
        ImportError: hotcoco is not installed.
    """
    if hotcoco is None:
        raise ImportError('hotcoco is missing: pip install "maskdino[analysis]"')
    content, predictions, _ = numbered(ground_truth, records, task)
    annotations = hotcoco.COCO(content)
    evaluation = hotcoco.COCOeval(annotations, annotations.loadRes(predictions), task)
    evaluation.params.maxDets = [detections]
    evaluation.evaluate()
    pairs = zip(content["images"], ground_truth["images"], strict=True)
    names = {image["id"]: str(known.get("file_name", "")) for image, known in pairs}
    errors = evaluation.tide_errors(pos_thr=MATCHED, bg_thr=NEAR)
    confusion = evaluation.confusion_matrix(
        iou_thr=MATCHED, max_det=detections, min_score=threshold
    )
    return Analysis(
        counts={name: errors["counts"][key] for key, name in ERRORS.items()},
        costs={name: 100 * errors["delta_ap"][key] for key, name in ERRORS.items()},
        classes=confusion["cat_names"],
        confusion=confusion["matrix"].astype(np.int64),
        groups=_groups(evaluation, content),
        doubts=_doubts(evaluation, threshold, names),
    )


def _groups(evaluation: Any, ground_truth: dict) -> dict[str, dict[str, float]]:
    numbers = Counter(a["image_id"] for a in ground_truth["annotations"] if not a["iscrowd"])
    lows = (1, *(most + 1 for most in CROWDING))
    images: dict[str, list[int]] = {}
    for low, high in zip(lows, (*CROWDING, math.inf), strict=True):
        name = str(low) if low == high else f"{low} to {high}" if high < math.inf else f"{low} on"
        members = [image for image, number in numbers.items() if low <= number <= high]
        if members:
            images[name] = members
    found = evaluation.slice_by(images) if images else {}
    return {
        name: {
            "images": len(members),
            "objects": sum(numbers[image] for image in members),
            **{key: _percent(found[name][key]) for key in GROUP_METRICS},
        }
        for name, members in images.items()
    }


def _doubts(evaluation: Any, threshold: float, names: dict[int, str]) -> list[Doubt]:
    found = evaluation.image_diagnostics(iou_thr=MATCHED, score_thr=threshold)["label_errors"]
    predictions = evaluation.cocoDt.anns
    return [
        Doubt(
            names[entry["image_id"]],
            predictions[entry["dt_id"]]["bbox"],
            entry["dt_category"],
            entry["gt_category"],
            entry["dt_score"],
        )
        for entry in sorted(found, key=lambda entry: -entry["dt_score"])
    ]


def _percent(value: float) -> float:
    return 100 * value if value >= 0 else math.nan  # -1: there is nothing to find
