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

if TYPE_CHECKING:
    from panopticapi.evaluation import PQStat

logger = logging.getLogger(__name__)

GROUPS = {"": None, "_th": True, "_st": False}  # all classes, things, stuff


class PanopticEvaluator(COCOPanopticEvaluator):
    """Detectron2's evaluator, but datasets may lack things, or stuff."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns the metrics under "panoptic_seg" on the main process; None on the others.

        "PQ", "SQ" and "RQ" in percent, of things with "_th", of stuff with "_st"; NaN where neither
        the annotations nor the predictions have such a class.

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
                f"{len(absent)} images of {self._metadata.panoptic_json} were not predicted, for "
                f"example {absent[:3]}"
            )
        categories = {category["id"]: category for category in content["categories"]}
        pairs = [(a, predictions[a["image_id"]]) for a in content["annotations"]]
        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            for prediction in predictions.values():
                with open(os.path.join(folder, prediction["file_name"]), "wb") as file:
                    file.write(prediction["png_string"])
            truth = PathManager.get_local_path(self._metadata.panoptic_root)
            with contextlib.redirect_stdout(io.StringIO()):
                quality = pq_compute_multi_core(pairs, truth, folder, categories)
        results = panoptic_metrics(quality, categories)
        logger.info("Evaluation results for panoptic_seg:\n%s", create_small_table(results))
        return {"panoptic_seg": results}


def panoptic_metrics(quality: PQStat, categories: dict[int, dict]) -> dict[str, float]:
    """Averages the quality over classes; see `PanopticEvaluator.evaluate`.

    Args:
        quality: panopticapi's counts by category id.
        categories: the dataset's, with "isthing", by id.
    """
    results = {}
    for suffix, is_thing in GROUPS.items():
        known = {}
        for label, category in categories.items():
            counts = quality.pq_per_cat[label]
            in_group = is_thing is None or bool(category["isthing"]) == is_thing
            if in_group and counts.tp + counts.fp + counts.fn:
                known[label] = category
        means = quality.pq_average(known, is_thing)[0] if known else {}
        for name in ("PQ", "SQ", "RQ"):
            results[name + suffix] = 100 * means.get(name.lower(), float("nan"))
    return results
