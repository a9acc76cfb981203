"""The images of an evaluation: each is scored by itself, and the chosen ones are drawn.

Of an image that was scored, only the score is kept: evaluations may have many images.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_utils

from maskdino.categories import Categories
from maskdino.data.checks import check_known
from maskdino.data.folders import inside
from maskdino.data.reading import read_label_map, read_map
from maskdino.evaluation import files
from maskdino.evaluation.coco import read_annotations
from maskdino.evaluation.panoptic import panoptic_metrics
from maskdino.evaluation.semantic import count_pixels, semantic_metrics
from maskdino.system.progress import Bar
from maskdino.system.words import counted
from maskdino.visualization.drawing import beside, draw_regions
from maskdino.visualization.ground_truth import ground_truth_of
from maskdino.visualization.results import ImageResult

MIN_PIXELS = 420  # of the longer side of a drawn image, as far as whole factors allow
MAX_PIXELS = 720
NOUNS = {"instance": "object", "panoptic": "segment", "semantic": "class"}
IMAGE_KEYS = ("file_name", "height", "width")


class EvaluatedImages(ABC):
    """Images of a dataset, and what was predicted for a task.

    Attributes:
        task: one of `maskdino.visualization.results.TASKS`.
        measure: what `score` computes, for readers.
    """

    task: ClassVar[str]
    file: ClassVar[str]  # what the evaluator of the task leaves
    results_of: ClassVar[frozenset[str]]  # names of its results
    measure: str

    def __init__(
        self, metadata: Metadata, records: list[dict], folder: Path, threshold: float
    ) -> None:
        names = metadata.get("thing_classes") or metadata.stuff_classes
        self.metadata, self.records, self.folder = metadata, records, folder
        self.threshold = threshold
        self.categories = Categories.from_metadata(metadata, len(names))
        self.labels = {number: label for label, number in enumerate(self.categories.dataset_ids)}
        self.read()

    @abstractmethod
    def read(self) -> None:
        """Reads what the evaluator of the task left."""

    @abstractmethod
    def score(self, record: dict) -> float:
        """How well an image was done, in [0, 1]; NaN where there was nothing to do."""

    @abstractmethod
    def results(self, record: dict) -> tuple[ImageResult, ImageResult]:
        """Ground truth and prediction of an image."""

    def _result_of(self, part: dict, record: dict) -> ImageResult:
        image = {key: record[key] for key in IMAGE_KEYS if key in record}
        return ground_truth_of(image | part, self.categories)

    def _of_files(
        self, record: dict, true: dict, predicted: dict
    ) -> tuple[ImageResult, ImageResult]:
        return self._result_of(true, record), self._result_of(predicted, record)

    def ranked(self) -> list[tuple[float, dict]]:
        """Score and record of all images that have a score, best first."""
        images = Bar(self.records, desc=f"{self.task}: scores", unit="image")
        scored = [(self.score(record), record) for record in images]
        known = [entry for entry in scored if not math.isnan(entry[0])]
        return sorted(known, key=lambda entry: -entry[0])

    def draw(self, record: dict) -> np.ndarray:
        """(H, W, 3) uint8: ground truth beside the prediction, colored alike where they agree."""
        truth, predicted = self.results(record)
        colors = None
        if self.task != "semantic":
            colors = _colors_of_best(overlaps(predicted, truth, self.task))
        panels = []
        for kind, result, own in (("ground truth", truth, None), ("predicted", predicted, colors)):
            scale = max(1, round(MIN_PIXELS / max(result.size)))
            regions = result.regions(self.task, own)
            image = Image.fromarray(draw_regions(result.image, regions, scale=scale))
            image.thumbnail((MAX_PIXELS, MAX_PIXELS))
            panels.append((f"{kind}: {counted(len(regions), NOUNS[self.task])}", np.array(image)))
        return beside(panels)

    def check_complete(self, predicted: Iterable, key: str) -> None:
        """Raises a ValueError unless the `key` of every record was predicted."""
        missing = [r[key] for r in self.records if r[key] not in predicted]
        if missing:
            raise ValueError(
                f"{self.folder} has no {self.task} prediction for "
                f"{counted(len(missing), 'image')}, for example {missing[:3]}: evaluate again"
            )


class InstanceImages(EvaluatedImages):
    """Objects."""

    task, file = "instance", files.INSTANCES_FILE
    results_of = frozenset({"bbox", "segm"})

    def read(self) -> None:
        """See `EvaluatedImages.read`."""
        self.measure = f"F1 of each image (IoU from 0.5, scores from {self.threshold:g})"
        converted = self.folder / files.CONVERTED_FILE.format(self.metadata.name)
        path = str(self.metadata.get("json_file") or converted)
        self.ground_truth = read_annotations(path, self.metadata)
        self.predictions = json.loads((self.folder / self.file).read_text())
        self._true, self._found = defaultdict(list), defaultdict(list)
        for annotation in self.ground_truth.get("annotations", ()):
            self._true[annotation["image_id"]].append(annotation)
        for prediction in self.predictions:
            if prediction["score"] >= self.threshold:
                self._found[prediction["image_id"]].append(prediction)

    def score(self, record: dict) -> float:
        """F1, see `f1_score`."""
        return f1_score(*self.results(record))

    def results(self, record: dict) -> tuple[ImageResult, ImageResult]:
        """Objects of the annotation file: the records of panoptic datasets have none."""
        annotations = [
            {**a, "category_id": self.labels[a["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
            for a in self._true.get(record["image_id"], ())
        ]
        truth = self._result_of({"annotations": annotations}, record)
        return truth, self._predicted(truth, self._found.get(record["image_id"], []))

    def _predicted(self, truth: ImageResult, predictions: list[dict]) -> ImageResult:
        predictions = sorted(predictions, key=lambda prediction: -prediction["score"])
        boxes = np.array([p["bbox"] for p in predictions], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [p["segmentation"] for p in predictions if "segmentation" in p]
        rles = tuple({**mask, "counts": mask["counts"].encode()} for mask in masks)
        return ImageResult(
            truth.name,
            truth.size,
            truth.categories,
            boxes=boxes,
            scores=np.array([p["score"] for p in predictions], np.float32),
            class_ids=np.array([self.labels[p["category_id"]] for p in predictions], np.int64),
            rles=rles if len(rles) == len(predictions) else None,
            source=truth.source,
        )


class PanopticImages(EvaluatedImages):
    """Segments of all pixels."""

    task, file, measure = "panoptic", files.PANOPTIC_FILE, "PQ of each image"
    results_of = frozenset({"panoptic_seg"})

    def read(self) -> None:
        """See `EvaluatedImages.read`."""
        content = json.loads(Path(self.metadata.panoptic_json).read_text())
        predictions = json.loads((self.folder / self.file).read_text())
        self._dataset_categories = {c["id"]: c for c in content["categories"]}
        self._true = {a["image_id"]: a for a in content["annotations"]}
        self._found = {a["image_id"]: a for a in predictions["annotations"]}
        self.check_complete(self._found, "image_id")
        maps = self.folder / files.PANOPTIC_FOLDER
        # All of them now: panopticapi, which `score` calls, opens whatever a file name says.
        self._maps = {i: inside(maps, a["file_name"], maps) for i, a in self._found.items()}

    def score(self, record: dict) -> float:
        """The mean over the classes of the image, as panopticapi computes it."""
        from panopticapi.evaluation import pq_compute_single_core

        pair = (self._true[record["image_id"]], self._found[record["image_id"]])
        with contextlib.redirect_stdout(io.StringIO()):
            quality = pq_compute_single_core(
                0,
                [pair],
                self.metadata.panoptic_root,
                str(self.folder / files.PANOPTIC_FOLDER),
                self._dataset_categories,
            )
        return panoptic_metrics(quality, self._dataset_categories)["PQ"] / 100

    def results(self, record: dict) -> tuple[ImageResult, ImageResult]:
        """Annotated and predicted segments: files of the same format."""
        found = self._found[record["image_id"]]
        keys = ("pan_seg_file_name", "segments_info")
        true = {key: record[key] for key in keys}
        predicted = {
            "pan_seg_file_name": self._maps[record["image_id"]],
            "segments_info": [
                {**segment, "category_id": self.labels[segment["category_id"]]}
                for segment in found["segments_info"]
            ],
        }
        return self._of_files(record, true, predicted)


class SemanticImages(EvaluatedImages):
    """Classes of all pixels."""

    task, file, measure = "semantic", files.SEMANTIC_FILE, "mIoU of each image"
    results_of = frozenset({"sem_seg"})

    def read(self) -> None:
        """See `EvaluatedImages.read`."""
        self._found = json.loads((self.folder / self.file).read_text())
        self.check_complete(self._found, "file_name")

    def score(self, record: dict) -> float:
        """The mean over the classes that the image has in truth, or in the prediction."""
        number = len(self.categories)
        ignored = self.metadata.get("ignore_label", 255)
        labels = read_label_map(record["sem_seg_file_name"], number, ignored)
        counts = count_pixels(labels, read_map(self._file(record), None), number)
        return semantic_metrics(counts, list(self.categories.names))["mIoU"] / 100

    def results(self, record: dict) -> tuple[ImageResult, ImageResult]:
        """Annotated and predicted label map: files of the same format."""
        names = (record["sem_seg_file_name"], self._file(record))
        return self._of_files(record, *({"sem_seg_file_name": name} for name in names))

    def _file(self, record: dict) -> str:
        maps = self.folder / files.SEMANTIC_FOLDER
        return inside(maps, self._found[record["file_name"]], maps)


def find_images(
    dataset: str, folder: Path, results: Iterable[str], threshold: float
) -> list[EvaluatedImages]:
    """The images of each task of the last evaluation's `results`, as far as predictions were left.

    Predicted objects count from a score of `threshold` on.
    """
    kinds = [
        kind
        for kind in (PanopticImages, InstanceImages, SemanticImages)
        if kind.results_of.intersection(results) and (folder / kind.file).is_file()
    ]
    if not kinds:
        return []
    check_known(dataset)
    records = DatasetCatalog.get(dataset)  # completes the metadata of some datasets
    metadata = MetadataCatalog.get(dataset)
    return [kind(metadata, records, folder, threshold) for kind in kinds]


def f1_score(truth: ImageResult, predicted: ImageResult) -> float:
    """Harmonic mean of precision and recall, in [0, 1]; NaN without objects on either side.

    Objects of one class are paired from an IoU of 0.5 on, predictions with the best score first.
    """
    total = len(truth) + len(predicted)
    if not len(truth) or not len(predicted):
        return 0.0 if total else math.nan
    same = np.asarray(predicted.class_ids)[:, None] == truth.class_ids
    overlap = np.where(same, overlaps(predicted, truth, "instance"), 0)
    found = 0
    for i in np.argsort(-np.asarray(predicted.scores), kind="stable"):
        best = overlap[i].argmax()
        if overlap[i, best] >= 0.5:
            found += 1
            overlap[:, best] = 0  # each object is found once
    return 2 * found / total


def overlaps(predicted: ImageResult, truth: ImageResult, task: str) -> np.ndarray:
    """IoU, one row for each predicted object or segment, one column for each true one.

    Of masks where both sides have them, else of boxes.
    """
    results = (predicted, truth)
    shapes: list[Any]
    if task == "panoptic":
        shapes = [result.segment_rles() for result in results]
    elif predicted.rles is not None and truth.rles is not None:
        shapes = [list(result.rles or ()) for result in results]
    else:
        boxes = [BoxMode.convert(x.boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) for x in results]
        shapes = [x.astype(np.float64) for x in boxes]
    size = [len(shape) for shape in shapes]
    return np.asarray(mask_utils.iou(*shapes, [0] * size[1])) if all(size) else np.zeros(size)


def _colors_of_best(overlap: np.ndarray) -> list[int]:
    """For each prediction the number of the object that it covers, else a number of its own."""
    number = overlap.shape[1]
    covers = overlap.max(1, initial=0) >= 0.5
    return [int(row.argmax()) if covers[i] else number + i for i, row in enumerate(overlap)]
