"""Folders in which panoptic data lie as COCO has them, beside other annotations of the images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdino.custom.formats import read_own_data
from maskdino.custom.request import Request

CATEGORIES = [{"id": 1, "name": "nut", "isthing": 1}, {"id": 2, "name": "table", "isthing": 0}]
NAMES = {"train": ("a.png", "b.png"), "val": ("c.png",)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images are PNG files, as label images are, of the same names."""
    root = tmp_path / "data"
    ids = np.ones((8, 8, 3), np.uint8) * (1, 0, 0)
    ids[2:5, 2:5, 0] = 2
    for split, names in NAMES.items():
        images, entries, objects = [], [], []
        for number, name in enumerate(names):
            pixels = {split: ids * 80, f"panoptic_{split}": ids, f"semantic_{split}": ids[..., 0]}
            for kind, values in pixels.items():
                (root / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(root / kind / name)
            images.append({"id": number, "file_name": name, "width": 8, "height": 8})
            parts = [{"id": 1, "category_id": 2}, {"id": 2, "category_id": 1}]
            entries.append({"image_id": number, "file_name": name, "segments_info": parts})
            objects.append({"id": number, "image_id": number, "category_id": 1})
            objects[-1] |= {"bbox": [2, 2, 3, 3], "area": 9, "iscrowd": 0}
        (root / "annotations").mkdir(exist_ok=True)
        for kind, annotations in (("instances", objects), ("panoptic", entries)):
            content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
    return root


def test_each_split_has_its_own_file_and_folder(folder: Path) -> None:
    """Label images are no images, and the fourth JSON file of a folder is looked into as well."""
    own = read_own_data(Request(data=folder, output=folder.parent / "out", task="panoptic"))
    assert own.validation is not None
    for split, part in (("train", own.train), ("val", own.validation)):
        assert not part.findings and part.data.maps is not None
        assert part.data.json_file == folder / "annotations" / f"panoptic_{split}.json"
        assert part.data.image_root == folder / split
        assert part.data.maps.root == folder / f"panoptic_{split}"
        assert [x["file_name"] for x in part.data.images] == list(NAMES[split])
