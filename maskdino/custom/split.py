"""Sets a part of the images aside for validation, the same ones every time."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

from maskdino.custom.annotations import Annotations
from maskdino.data import DataError

SMALL = 100  # images; of fewer, a larger share is set aside
SHARES = (0.2, 0.1)  # of small and of other datasets
MOST = 5000  # images to validate on


def split(data: Annotations) -> tuple[Annotations, Annotations]:
    """Splits annotations into a part for training and a part for validation.

    Images are ordered by a hash of their file names, so that the choice depends on nothing else,
    and hardly changes when images are added. No class loses its last image in training, and where
    there are masks, all objects in validation have one.

    Raises:
        DataError: no image can be set aside.
    """
    share = SHARES[0] if len(data.images) < SMALL else SHARES[1]
    wanted = min(max(round(share * len(data.images)), 1), MOST, len(data.images) - 1)
    classes, complete = defaultdict(set), defaultdict(lambda: True)
    has_masks = any(annotation.get("segmentation") for annotation in data.annotations)
    for annotation in data.annotations:
        if not annotation.get("iscrowd"):
            classes[annotation["image_id"]].add(annotation["category_id"])
        if has_masks and not annotation.get("segmentation"):
            complete[annotation["image_id"]] = False
    left = Counter(name for names in classes.values() for name in names)
    chosen: set = set()
    for image in sorted(
        data.images, key=lambda x: hashlib.sha256(x["file_name"].encode()).digest()
    ):
        if len(chosen) == wanted:
            break
        own = classes[image["id"]]
        # Images without objects tell little: they stay in training.
        if own and complete[image["id"]] and all(left[name] > 1 for name in own):
            chosen.add(image["id"])
            left.subtract(own)
    if not chosen:
        raise DataError(
            f"{data.json_file}: no image can be set aside for validation (of {len(data.images)}): "
            f"each has no objects{', has objects without masks' * has_masks}, or is the only one "
            "of a class; give more images, or some to validate on: in a folder 'val', or with "
            "--val-json and --val-images"
        )
    rest = {image["id"] for image in data.images} - chosen
    return data.only(rest), data.only(chosen)
