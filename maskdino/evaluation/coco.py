"""Box and mask average precision of COCO, with hotcoco, faster-coco-eval or pycocotools.

Shape key: N instances of an image, H, W pixels of the image.
"""

import contextlib
import io
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from torch import Tensor

from maskdino.data.numbering import renumber_things
from maskdino.data.reading import read_json
from maskdino.evaluation.files import CONVERTED_FILE, INSTANCES_FILE
from maskdino.ops.host import pack_masks, to_host
from maskdino.ops.rle import box_and_area, encode_mask, encode_packed, to_json
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

MASK_BYTES_AT_ONCE = 1 << 27  # packed masks of one image that are on their way at one time
RECORDS_AT_ONCE = 10_000  # that become text at one time
# Optional libraries that compute pycocotools' numbers in less time, the fastest first.
FAST = ("hotcoco", "faster_coco_eval")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
# What libraries are given: hotcoco refuses values that it does not expect in any key that it knows.
READ = {
    "images": ("id", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}
GEOMETRY = {"bbox": "bbox", "segm": "segmentation"}  # of a task -> its key in records
LARGEST_ID = 1 << 62  # of numbers that the libraries take for ids
COCO_DETECTIONS = 100  # of an image that published numbers count
ALL_DETECTIONS = 1 << 20  # of an image: as many as there are
AREAS = ("all", "small", "medium", "large")


def instances_to_records(instances: Instances, image_id: int) -> list[dict]:
    """Turns predictions into COCO's result records, masks as compressed RLE.

    Args:
        instances: ``scores`` (N,), ``pred_classes`` (N,), and as far as the model predicts them
            ``pred_boxes`` and ``pred_masks`` (N, H, W) bool, or in their place ``pred_rles``, N in
            COCO's compressed form.
        image_id: of the dataset.

    Returns:
        N records; ``category_id`` is the contiguous class index.
    """
    boxes = [instances.pred_boxes.tensor.float()] if instances.has("pred_boxes") else []
    masks = instances.pred_masks if instances.has("pred_masks") else None
    parts: tuple[Tensor, ...] = ()  # each is packed and copied at one time
    if masks is not None and masks.device.type != "cpu":
        parts = masks.split(max(1, 8 * MASK_BYTES_AT_ONCE // max(1, masks.shape[1:].numel())))
    first = [pack_masks(part) for part in parts[:1]]
    scores, classes, *found = to_host([instances.scores, instances.pred_classes, *boxes, *first])
    records = [
        {"image_id": image_id, "category_id": category, "score": score}
        for category, score in zip(classes.tolist(), scores.tolist(), strict=True)
    ]
    if boxes:
        corners = BoxMode.convert(found.pop(0), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        for record, box in zip(records, corners.tolist(), strict=True):
            record["bbox"] = box
    rles: Iterable[dict] = ()
    if parts:
        later = (to_host([pack_masks(part)]) for part in parts[1:])
        packed = itertools.chain.from_iterable(itertools.chain([found], later))
        size = instances.image_size
        rles = itertools.chain.from_iterable(encode_packed(x.numpy(), size) for x in packed)
    elif masks is not None:
        rles = map(encode_mask, masks.numpy())
    elif instances.has("pred_rles"):
        rles = instances.pred_rles
    for record, rle in zip(records if rles else (), rles, strict=True):
        record["segmentation"] = to_json(rle)
    return records


class COCOInstanceEvaluator(DatasetEvaluator):
    """AP of boxes ("bbox") and, where model and data have masks, of masks ("segm"), in percent.

    Category ids may be any integers: the dataset's metadata map them to class indices.

    Args:
        dataset_name: a dataset with COCO annotations, or of detectron2's standard format.
        output_folder: predictions go to ``coco_instances_results.json`` there; None: nowhere.
        with_masks: whether the model predicts masks.
        fast: whether to compute with the first of FAST that is installed (equal numbers, sooner);
            else with pycocotools.
        detections: of an image that count, those with the highest scores.

    Raises:
        ImportError: if ``fast`` is asked for and none of FAST is installed.
    """

    reads_run_lengths = True

    def __init__(
        self,
        dataset_name: str,
        output_folder: str | None,
        *,
        with_masks: bool,
        fast: bool,
        detections: int = COCO_DETECTIONS,
    ) -> None:
        if fast and fast_library() is None:
            raise ImportError(
                "no fast evaluator is installed: pip install hotcoco, or pip install "
                "faster-coco-eval, or set TEST.COCO_EVALUATOR pycocotools"
            )
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_folder = output_folder
        self._fast = fast
        self._detections = detections
        self._ground_truth = _ground_truth_of(dataset_name, output_folder)
        annotations = self._ground_truth.get("annotations")
        if annotations is None:
            logger.info("%s has no annotations: predictions are only written.", dataset_name)
        self._tasks = ["bbox"]
        bare = [a for a in annotations or () if not a.get("segmentation")]
        if with_masks and annotations and len(bare) < len(annotations):
            self._tasks.append("segm")
            if bare:
                logger.warning(
                    "Mask AP of '%s' is that of the objects with masks: %d have none, such as "
                    "annotation %s of image %s; masks predicted in their boxes do not count.",
                    dataset_name,
                    len(bare),
                    bare[0]["id"],
                    bare[0]["image_id"],
                )
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id") or {
            category["id"]: category["id"] for category in self._ground_truth["categories"]
        }
        self._category_of_class = {index: category for category, index in mapping.items()}
        self._records: list[dict] = []

    def reset(self) -> None:
        """Forgets all predictions."""
        self._records = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in the ``instances`` that the model predicts for a batch of images.

        Raises:
            ValueError: if a predicted class is none of the dataset's.
        """
        for image, output in zip(inputs, outputs, strict=True):
            for record in instances_to_records(output["instances"], image["image_id"]):
                category = self._category_of_class.get(record["category_id"])
                if category is None:
                    number = counted(len(self._category_of_class), "class")
                    raise ValueError(
                        f"The model predicts class {record['category_id']}, but the dataset "
                        f"'{self._metadata.name}' has {number}; "
                        "MODEL.MASK_DINO.NUM_CLASSES must fit."
                    )
                record["category_id"] = category
                self._records.append(record)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns the metrics of each task on the main process; None on the others."""
        gathered = comm.gather(self._records)
        if not comm.is_main_process():
            return None
        records = list(itertools.chain.from_iterable(gathered))
        if self._output_folder:
            PathManager.mkdirs(self._output_folder)
            path = os.path.join(self._output_folder, INSTANCES_FILE)
            with PathManager.open(path, "w") as file:
                file.writelines(_json_of(records))
        if "annotations" not in self._ground_truth:
            return {}
        if not records:
            logger.warning("No instance was predicted in '%s': AP is 0.", self._metadata.name)
        if self._detections != COCO_DETECTIONS:
            which = f"up to {self._detections} detections of an image (TEST.DETECTIONS_PER_IMAGE)"
            if self._detections == ALL_DETECTIONS:
                which = "all detections of an image"
            logger.warning(
                "AP and AR count %s; published numbers on COCO count %d.", which, COCO_DETECTIONS
            )
        return {task: self._evaluate_task(task, records) for task in self._tasks}

    def _evaluate_task(self, task: str, records: list[dict]) -> dict[str, float]:
        if not records:
            return dict.fromkeys(METRICS, 0.0)
        stats, precisions, categories = average_precision(
            self._ground_truth, records, task, fast=self._fast, detections=self._detections
        )
        results = dict(zip(METRICS, stats, strict=True))
        logger.info("Evaluation results for %s:\n%s", task, create_small_table(results))
        if len(categories) > 1:
            names = {c["id"]: c["name"] for c in self._ground_truth["categories"]}
            per_class = {
                f"AP-{names[category]}": _mean(precisions[:, :, index, 0, -1])
                for index, category in enumerate(categories)
            }
            logger.info("Per class, %s:\n%s", task, _columns(per_class))
            results.update(per_class)
        return results


def average_precision(
    ground_truth: dict,
    records: list[dict],
    task: str,
    *,
    fast: bool,
    detections: int = COCO_DETECTIONS,
) -> tuple[list[float], np.ndarray, list[int]]:
    """Compares predictions with the content of COCO's annotation file.

    Args:
        ground_truth: that content.
        records: predictions, at least one, with ``bbox`` or ``segmentation``, as the task needs.
        task: "bbox" or "segm".
        fast: see `COCOInstanceEvaluator`.
        detections: likewise.

    Returns:
        The values of `METRICS` in percent (NaN where nothing could be measured), the precisions
        (thresholds, recalls, categories, areas, detections), and the category ids.
    """
    ground_truth, predictions, categories = numbered(ground_truth, records, task)
    name = fast_library() if fast else None
    library = import_module(name or "pycocotools.cocoeval")
    logger.info("%s of COCO by %s.", task, name or "pycocotools")
    kind = library.COCOeval_faster if name == "faster_coco_eval" else library.COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        if name:
            api = library.COCO(ground_truth)
        else:
            api = import_module("pycocotools.coco").COCO()
            api.dataset = ground_truth
            api.createIndex()
        evaluation = kind(api, api.loadRes(predictions), task)
        evaluation.params.maxDets = [detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precisions, recalls = evaluation.eval["precision"], evaluation.eval["recall"]
    whole = precisions[..., 0, -1]  # of all sizes
    thresholds = np.asarray(evaluation.params.iouThrs)
    single = [whole[np.isclose(thresholds, threshold)] for threshold in (0.5, 0.75)]
    sizes = [precisions[..., area, -1] for area in range(1, len(AREAS))]
    parts = [whole, *single, *sizes, recalls[..., 0, -1]]
    ids = [categories[number] for number in evaluation.params.catIds]
    return [_mean(part) for part in parts], precisions, ids


def fast_library() -> str | None:
    """The fastest library that can be imported and computes pycocotools' numbers."""
    for name in FAST:
        with contextlib.suppress(ImportError):  # also of one that is installed, but broken
            import_module(name)
            return name
    return None


def numbered(
    ground_truth: dict, records: list[dict], task: str
) -> tuple[dict, list[dict], dict[int, Any]]:
    """Copies of annotations and predictions of a task, with ids that evaluating libraries take.

    Returns:
        Both, and the ids that the categories had, by those that they have now.
    """
    kept = ("image_id", "category_id", "score", GEOMETRY[task])
    # Size classes (small, medium, large) come from the box in one task, the mask in the other.
    predictions = [{key: record[key] for key in kept} for record in records]
    # The libraries add to entries, but change no value of theirs.
    ground_truth = {"info": {}} | {
        name: [{key: entry[key] for key in keys if key in entry} for entry in ground_truth[name]]
        for name, keys in READ.items()
    }
    _number(ground_truth, predictions, "images", "image_id")
    categories = _number(ground_truth, predictions, "categories", "category_id")
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        annotation["id"] = number  # an object of id 0, or of a text, would count as found never
        if task == "bbox":
            annotation.pop("segmentation", None)  # hotcoco reads it, and refuses an empty one
        elif not annotation.get("segmentation"):  # neither found nor missed
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotation["iscrowd"] = 1
    return ground_truth, predictions, categories


def _number(ground_truth: dict, predictions: list[dict], name: str, key: str) -> dict[int, Any]:
    """Renumbers entries in place, unless faster-coco-eval takes all of their ids.

    Returns:
        The ids before, by those afterwards.
    """
    ids = [entry["id"] for entry in ground_truth[name]]
    if all(isinstance(x, int) and 0 <= x < LARGEST_ID for x in ids):
        return {x: x for x in ids}
    numbers = {x: number for number, x in enumerate(ids, start=1)}
    for entry in ground_truth[name]:
        entry["id"] = numbers[entry["id"]]
    for entry in (*ground_truth["annotations"], *predictions):
        entry[key] = numbers[entry[key]]
    return {number: x for x, number in numbers.items()}


def _json_of(records: list[dict]) -> Iterator[str]:
    """A list as JSON in parts: `json.dump` takes twice as long, one text much memory."""
    yield "["
    for begin in range(0, len(records), RECORDS_AT_ONCE):
        yield ", " * bool(begin) + json.dumps(records[begin : begin + RECORDS_AT_ONCE])[1:-1]
    yield "]"


def _ground_truth_of(dataset_name: str, output_folder: str | None) -> dict:
    metadata = MetadataCatalog.get(dataset_name)
    path = metadata.get("json_file")
    if path is None:
        if output_folder is None:
            raise ValueError(f"'{dataset_name}' has no COCO annotations: give an output folder.")
        path = os.path.join(output_folder, CONVERTED_FILE.format(dataset_name))
        PathManager.mkdirs(output_folder)
        if comm.is_main_process():
            convert_to_coco_json(dataset_name, path, allow_cached=False)
        comm.synchronize()
    return read_annotations(path, metadata)


def read_annotations(path: str, metadata: Metadata) -> dict:
    """Reads a file in COCO's format, and fills in what pycocotools wants of it.

    Of a panoptic dataset, categories get the numbers of the metadata.
    """
    ground_truth = read_json(path)
    if metadata.get("panoptic_json") and metadata.get("json_file"):
        renumber_things(ground_truth, metadata)
    ground_truth.setdefault("info", {})  # which pycocotools 2.0.9 and 2.0.10 take for granted
    for image in ground_truth["images"]:
        image |= {side: int(image[side]) for side in ("height", "width") if side in image}
    sizes = {x["id"]: (x.get("height"), x.get("width")) for x in ground_truth["images"]}
    for annotation in ground_truth.get("annotations", ()):
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        segmentation = annotation.get("segmentation")
        if not annotation.get("bbox"):
            box, area = box_and_area(segmentation, sizes[annotation["image_id"]])
            annotation["bbox"] = box
            annotation["area"] = area if annotation.get("area") is None else annotation["area"]
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return ground_truth


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]  # -1: there is nothing to find
    return float(valid.mean() * 100) if valid.size else float("nan")


def _columns(values: dict[str, float]) -> str:
    cells = [f"{name[3:]:<20.20}{value:7.2f}" for name, value in values.items()]
    lines = [cells[start : start + 4] for start in range(0, len(cells), 4)]
    return "\n".join("   ".join(line) for line in lines)
