"""Names of the files that evaluators write to their output folder, and reports read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

INSTANCES_FILE = "coco_instances_results.json"
CONVERTED_FILE = "{}_coco_format.json"  # annotations of a dataset that has no such file
PANOPTIC_FILE = "predictions.json"  # in COCO's format of panoptic results
PANOPTIC_FOLDER = "panoptic"  # its PNG files
SEMANTIC_FILE = "sem_seg.json"  # file name of each image to that of its label map
SEMANTIC_FOLDER = "sem_seg"  # label maps
LOSSES_FILE = "losses.csv"  # one line for each image


def unique_pngs(paths: Sequence[str]) -> list[str]:
    """A name for the PNG file of each image: the image's own, numbered where it is taken."""
    names: dict[str, None] = {}  # in order
    counts: Counter[str] = Counter()
    for path in paths:
        stem = name = Path(path).stem
        while name in names:
            counts[stem] += 1
            name = f"{stem}_{counts[stem] + 1}"
        names[name] = None
    return [f"{name}.png" for name in names]
