"""Mean intersection over union of semantic maps.

Shape key: K classes, H, W pixels of an image's label map.
"""

from __future__ import annotations

import itertools
import json
import logging
import os

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from PIL import Image

from maskdino.data.reading import DataError, read_label_map
from maskdino.evaluation.files import SEMANTIC_FILE, SEMANTIC_FOLDER, unique_pngs
from maskdino.metrics import of_classes_together
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

# Whether the installed detectron2 leaves classes without ground truth out of the mean IoU, as its
# releases after 0.6 do; there, a class that is predicted wrongly counts as 0.
ABSENT_CLASSES_LEFT_OUT = "logical_and" in SemSegEvaluator.evaluate.__code__.co_names


class SemanticEvaluator(DatasetEvaluator):
    """Counts pixels by true and predicted class; pixels of the `ignore_label` do not count.

    Classes may be things and stuff, and any category ids: label maps hold class numbers.

    Args:
        dataset_name: a dataset whose images have "sem_seg_file_name".
        output_folder: the counts go to ``confusion_matrix.json`` there, the predicted label maps to
            ``sem_seg/``, and which of them is whose to ``sem_seg.json``; None: nowhere.
    """

    reads_run_lengths = True  # as it reads no objects

    def __init__(self, dataset_name: str, output_folder: str | None) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._names = list(metadata.stuff_classes)
        self._ignore_label = metadata.get("ignore_label", 255)
        self._output_folder = output_folder
        self._label_maps = {
            record["file_name"]: record["sem_seg_file_name"]
            for record in DatasetCatalog.get(dataset_name)
        }
        # Of all images, so that processes that see different ones agree on the names.
        pngs = unique_pngs(list(self._label_maps))
        self._pngs = dict(zip(self._label_maps, pngs, strict=True))
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions."""
        self._counts = np.zeros((len(self._names), len(self._names)), np.int64)
        self._written: dict[str, str] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in the ``sem_seg`` (K, H, W) that the model predicts for a batch of images.

        Where there is a ``label_map`` (H, W), it is read instead.

        Raises:
            DataError: a label map cannot be read, holds an unknown class, or has not the size of
                the prediction, or the dataset has more than 255 classes; names the file.
            ValueError: the model does not predict as many classes as the dataset has.
        """
        number = len(self._names)
        for image, output in zip(inputs, outputs, strict=True):
            name = self._label_maps[image["file_name"]]
            labels = read_label_map(name, number, self._ignore_label)  # 0: ignored, else class + 1
            if "label_map" in output:
                classes = output["label_map"]
                classes_of_model = max(number, int(classes.max()) + 1)
            else:
                classes, classes_of_model = output["sem_seg"].argmax(0), len(output["sem_seg"])
            if classes_of_model != number:
                raise ValueError(
                    f"The model predicts {counted(classes_of_model, 'class')}, but the dataset has "
                    f"{number}; MODEL.MASK_DINO.NUM_CLASSES must fit."
                )
            if classes.shape != labels.shape:
                raise DataError(
                    f"label map {name} has (height, width) {labels.shape}, but its image "
                    f"{image['file_name']} {tuple(classes.shape)}"
                )
            predicted = classes.to(torch.int32).cpu().numpy()
            self._counts += count_pixels(labels, predicted, number)
            if self._output_folder:
                self._write(self._output_folder, image["file_name"], predicted)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Returns the metrics under "sem_seg" on the main process; None on the others."""
        gathered = comm.gather((self._counts, list(self._written.items())))
        if not comm.is_main_process():
            return None
        counts = np.sum([part for part, _ in gathered], axis=0)
        if self._output_folder:
            PathManager.mkdirs(self._output_folder)
            matrix = {"classes": self._names, "counts": counts.tolist()}
            written = dict(itertools.chain.from_iterable(items for _, items in gathered))
            for name, content in (("confusion_matrix.json", matrix), (SEMANTIC_FILE, written)):
                with PathManager.open(os.path.join(self._output_folder, name), "w") as file:
                    json.dump(content, file)
        results = semantic_metrics(counts, self._names)
        table = create_small_table(of_classes_together(results))
        logger.info("Evaluation results for sem_seg:\n%s", table)
        return {"sem_seg": results}

    def _write(self, output_folder: str, file_name: str, predicted: np.ndarray) -> None:
        folder = os.path.join(output_folder, SEMANTIC_FOLDER)
        PathManager.mkdirs(folder)
        pixels = predicted.astype(np.uint8)  # `read_label_map` refused more classes
        with PathManager.open(os.path.join(folder, self._pngs[file_name]), "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG")
        self._written[file_name] = self._pngs[file_name]


def count_pixels(labels: np.ndarray, predicted: np.ndarray, number: int) -> np.ndarray:
    """Counts (K, K) int64 pixels of an image by true and by predicted class.

    Labels (H, W) are 0 where pixels do not count, else the true class + 1.
    """
    known = labels > 0
    pairs = (labels[known].astype(np.int64) - 1) * number + predicted[known]
    return np.bincount(pairs, minlength=number**2).reshape(number, number)


def semantic_metrics(counts: np.ndarray, names: list[str]) -> dict[str, float]:
    """Metrics in percent of (K, K) pixels by true and by predicted class; NaN: not measured.

    Returns:
        "mIoU", the mean over classes that the annotations or the predictions have (with newer
        releases of detectron2 as there: that the annotations have); "fwIoU",
        weighted by the pixels of the annotations; "mACC" and "pACC", the share of pixels that are
        right, as a mean over classes, and over all; "IoU-NAME" and "ACC-NAME" of each class.
    """
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + predicted - right
    iou = 100 * _ratio(right, union)
    accuracy = 100 * _ratio(right, true)
    share = _ratio(true, np.full_like(true, true.sum()))
    seen = true > 0
    return {
        "mIoU": _mean(iou[seen if ABSENT_CLASSES_LEFT_OUT else union > 0]),
        "fwIoU": float((share * iou)[seen].sum()) if seen.any() else float("nan"),
        "mACC": _mean(accuracy[seen]),
        "pACC": float(100 * right.sum() / true.sum()) if seen.any() else float("nan"),
        **{f"IoU-{name}": float(value) for name, value in zip(names, iou, strict=True)},
        **{f"ACC-{name}": float(value) for name, value in zip(names, accuracy, strict=True)},
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Gives part / whole; NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
