"""A dataset of one's own: a folder of images, and a table of boxes (file, x0, y0, x1, y1)."""

import csv
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

FOLDER = Path(os.environ.get("MY_DATA", "my_data"))


def read(part: str) -> list[dict]:
    """Detectron2's dicts of a part; masks here are the boxes, drawn as polygons."""
    images: dict[str, dict] = {}
    for file, *numbers in csv.reader((FOLDER / f"{part}.csv").open()):
        image = images.setdefault(file, {"image_id": file, "annotations": []})
        image["file_name"] = str(FOLDER / file)
        x0, y0, x1, y1 = map(float, numbers)
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        box = {"bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
        image["annotations"].append({**box, "segmentation": [polygon], "category_id": 0})
    return list(images.values())


for part in ("train", "val"):
    DatasetCatalog.register(f"my_{part}", lambda part=part: read(part))
    MetadataCatalog.get(f"my_{part}").set(thing_classes=["cell"], evaluator_type="counting")
