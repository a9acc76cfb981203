"""Panoptic quality (PQ), computed by panopticapi."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import tempfile
from typing import TYPE_CHECKING

from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from maskdino.data.panoptic_checks import read_segments
from maskdino.evaluation.files import PANOPTIC_FILE, PANOPTIC_FOLDER, unique_pngs
from maskdino.metrics import of_classes_together
from maskdino.system.words import counted

if TYPE_CHECKING:
    from panopticapi.evaluation import PQStat

logger = logging.getLogger(__name__)

GROUPS = {"": None, "_th": True, "_st": False}  # all classes, things, stuff


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's evaluator, but datasets may lack things, or stuff.

    What is evaluated stays in the output folder, if one is given: `predictions.json` in COCO's
    format of panoptic results, and its PNG files in `panoptic/`.
    """

    reads_run_lengths = True  # as it reads no objects

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in predictions; DataError if PQ cannot be measured on a map of the annotations."""
        for image, output in zip(inputs, outputs, strict=True):
            if "segments_info" in image:
                height, width = output["panoptic_seg"][0].shape
                read_segments(image, (height, width), measured=True)
        super().process(inputs, outputs)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns the metrics under "panoptic_seg" on the main process; None on the others.

        "PQ", "SQ" and "RQ" in percent, of things with "_th", of stuff with "_st"; "PQ-NAME" of each
        class; NaN where neither the annotations nor the predictions have such a class.

        Raises:
            ValueError: if images of the annotations were not predicted.
        """
        from panopticapi.evaluation import pq_compute_multi_core

        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = {p["image_id"]: p for p in itertools.chain.from_iterable(gathered)}
        with PathManager.open(self._metadata.panoptic_json) as file:
            content = json.load(file)
        absent = [a["image_id"] for a in content["annotations"] if a["image_id"] not in predictions]
        if absent:
            raise ValueError(
                f"no prediction for {counted(len(absent), 'image')} of "
                f"{self._metadata.panoptic_json}, for example {absent[:3]}"
            )
        categories = {category["id"]: category for category in content["categories"]}
        own = self._output_dir
        place = contextlib.nullcontext(own) if own else tempfile.TemporaryDirectory()
        with place as folder:
            written = {a["image_id"]: a for a in _write(folder, list(predictions.values()))}
            pairs = [(_with_crowds(a), written[a["image_id"]]) for a in content["annotations"]]
            truth = PathManager.get_local_path(self._metadata.panoptic_root)
            maps = PathManager.get_local_path(os.path.join(folder, PANOPTIC_FOLDER))
            with contextlib.redirect_stdout(io.StringIO()):
                quality = pq_compute_multi_core(pairs, truth, maps, categories)
        results = panoptic_metrics(quality, categories)
        table = create_small_table(of_classes_together(results))
        logger.info("Evaluation results for panoptic_seg:\n%s", table)
        return {"panoptic_seg": results}


def _with_crowds(annotation: dict) -> dict:
    """The annotation, in which segments that do not say so are no crowds."""
    segments = [{"iscrowd": 0, **segment} for segment in annotation["segments_info"]]
    return {**annotation, "segments_info": segments}


def _write(folder: str, predictions: list[dict]) -> list[dict]:
    """Writes the PNG files and `predictions.json`; returns the annotations of the latter."""
    maps = os.path.join(folder, PANOPTIC_FOLDER)
    PathManager.mkdirs(maps)
    names = unique_pngs([prediction["file_name"] for prediction in predictions])
    annotations = []
    for name, prediction in zip(names, predictions, strict=True):
        with PathManager.open(os.path.join(maps, name), "wb") as file:
            file.write(prediction["png_string"])
        parts = {key: prediction[key] for key in ("image_id", "segments_info")}
        annotations.append({**parts, "file_name": name})
    with PathManager.open(os.path.join(folder, PANOPTIC_FILE), "w") as file:
        json.dump({"annotations": annotations}, file)
    return annotations


def panoptic_metrics(quality: PQStat, categories: dict[int, dict]) -> dict[str, float]:
    """Averages the quality over classes; see `PanopticEvaluator.evaluate`."""
    results: dict[str, float] = {}
    measured: dict[int, dict] = {}
    for suffix, is_thing in GROUPS.items():
        known = {}
        for label, category in categories.items():
            counts = quality.pq_per_cat[label]
            in_group = is_thing is None or bool(category["isthing"]) == is_thing
            if in_group and counts.tp + counts.fp + counts.fn:
                known[label] = category
        means, classes = quality.pq_average(known, is_thing) if known else ({}, {})
        measured |= classes
        for name in ("PQ", "SQ", "RQ"):
            results[name + suffix] = 100 * means.get(name.lower(), float("nan"))
    for label, category in categories.items():
        value = measured[label]["pq"] if label in measured else float("nan")
        results[f"PQ-{category['name']}"] = 100 * value
    return results
