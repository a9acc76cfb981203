"""A large image of real ones: all validation images of nuclei, side by side.

    python -m tests.evaluation.mosaic WEIGHTS --gap 0 32

prints AP of a trained model on the single images, as its configuration has them evaluated, and on
mosaics in slices (of 256 pixels, unless it names a size). Masks and boxes in a
single image end at its border. In a mosaic they reach over it, so that AP is also that of what is
left of them inside the image of which they hold most. Nuclei of neighboring images that touch look
like one, which says nothing of slices: with a gap there are none.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from itertools import count, product
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from maskdino.config import load_config
from maskdino.data import register_coco_folder
from maskdino.engine.evaluating import evaluate_weights
from maskdino.evaluation.coco import ALL_DETECTIONS, METRICS, average_precision
from maskdino.evaluation.files import INSTANCES_FILE
from maskdino.inference.parts import Window
from maskdino.ops.rle import decode_segmentation, encode_mask, to_json
from maskdino.ops.runs import crop_mask, encode_at
from tests.inference.test_sliced import paint

NUCLEI = Path(__file__).resolve().parents[2] / "datasets" / "nuclei"
VALIDATION = NUCLEI / "annotations" / "instances_val.json"
CELL = (256, 320)  # height and width of the place of an image in the mosaic
COLUMNS = 3
ALL = {"fast": True, "detections": ALL_DETECTIONS}


def places_of(images: list[dict], gap: int) -> list[Window]:
    """Where each image lies in the mosaic."""
    corners = (((i // COLUMNS) * (CELL[0] + gap), (i % COLUMNS) * (CELL[1] + gap)) for i in count())
    return [
        Window(top, left, top + image["height"], left + image["width"])
        for image, (top, left) in zip(images, corners, strict=False)
    ]


def write_mosaic(folder: Path, *, colors: bool, every: int = 1, gap: int = 0) -> int:
    """Validation images of nuclei as one; returns how many nuclei it shows.

    Args:
        folder: gets "mosaic.tif" and "mosaic.json".
        colors: paint each nucleus in a color that the oracle knows, in place of the image.
        every: take one of so many images.
        gap: black pixels between two images.
    """
    data = json.loads(VALIDATION.read_text())
    images = data["images"][::every]
    height = -(-len(images) // COLUMNS) * (CELL[0] + gap) - gap
    width = COLUMNS * (CELL[1] + gap) - gap
    mosaic, annotations = np.zeros((height, width, 3), np.uint8), []
    for entry, place in zip(images, places_of(images, gap), strict=True):
        top, left = place.top, place.left
        window = mosaic[top : place.bottom, left : place.right]
        if not colors:
            window[:] = np.array(Image.open(NUCLEI / "val" / entry["file_name"]).convert("RGB"))
        for annotation in data["annotations"]:
            if annotation["image_id"] == entry["id"]:
                size = entry["height"], entry["width"]
                mask = decode_segmentation(annotation["segmentation"], size)
                if colors:
                    paint(window, len(annotations) + 1, mask)
                whole = np.zeros((height, width), bool)
                whole[top : top + size[0], left : left + size[1]] = mask
                x, y, w, h = annotation["bbox"]
                moved = {"bbox": [x + left, y + top, w, h], "area": int(mask.sum()), "iscrowd": 0}
                moved |= {"id": len(annotations) + 1, "image_id": 1, "category_id": 1}
                annotations.append({**moved, "segmentation": to_json(encode_mask(whole))})
    Image.fromarray(mosaic).save(folder / "mosaic.tif")
    entry = {"id": 1, "file_name": "mosaic.tif", "height": height, "width": width}
    content = {"images": [entry], "annotations": annotations, "categories": data["categories"]}
    (folder / "mosaic.json").write_text(json.dumps(content))
    return len(annotations)


def clipped(record: dict, places: list[Window]) -> dict:
    """A result record, as far as it lies in that image which holds most of its mask."""
    size = record["segmentation"]["size"][0], record["segmentation"]["size"][1]
    counts = record["segmentation"]["counts"].encode()
    mask, (top, left) = crop_mask({"size": size, "counts": counts})
    whole = Window(top, left, top + mask.shape[0], left + mask.shape[1])
    seen = [(p, part) for p in places if (part := p.common(whole)) is not None]
    if not seen:  # all of it lies in a gap
        return record
    place, part = max(seen, key=lambda pair: mask[pair[1].inside(whole)].sum())
    rle = encode_at(mask[part.inside(whole)], (part.top, part.left), size)
    x, y, w, h = record["bbox"]
    x0, y0 = max(x, place.left), max(y, place.top)
    x1, y1 = min(x + w, place.right), min(y + h, place.bottom)
    box = [x0, y0, max(x1 - x0, 0), max(y1 - y0, 0)]
    return {**record, "bbox": box, "segmentation": to_json(rle)}


def configuration(args: argparse.Namespace, dataset: str, folder: Path) -> CfgNode:
    """Of a trained model, which is evaluated on a CPU."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", args.weights, "OUTPUT_DIR", str(folder)]
    cfg = load_config(args.config_file, [*options, "DATALOADER.NUM_WORKERS", "0", *args.opts])
    cfg.DATASETS.TEST = (dataset,)
    return cfg


def main() -> None:
    """Prints a line for each evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--config-file", default="configs/nuclei/instance/maskdino_tiny.yaml")
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.25])
    parser.add_argument("--gap", type=int, nargs="+", default=[0], help="between images")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="keys and values")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = configuration(args, "nuclei_val", folder)
        show("single images", evaluate_weights(cfg, resume=False))
        for gap, overlap in product(args.gap, args.overlap):
            dataset = f"mosaic_{gap}_{overlap}"
            write_mosaic(folder, colors=False, gap=gap)
            register_coco_folder(dataset, str(folder / "mosaic.json"), name)
            cfg = configuration(args, dataset, folder)
            cfg.TEST.SLICES.SIZE = cfg.TEST.SLICES.SIZE or 256
            cfg.TEST.SLICES.OVERLAP = overlap
            show(f"gap {gap}, overlap {overlap}", evaluate_weights(cfg, resume=False))
            places = places_of(json.loads(VALIDATION.read_text())["images"], gap)
            truth = json.loads((folder / "mosaic.json").read_text())
            file = folder / "inference" / dataset / INSTANCES_FILE
            records = [clipped(x, places) for x in json.loads(file.read_text())]
            found = {
                task: dict(
                    zip(METRICS, average_precision(truth, records, task, **ALL)[0], strict=True)
                )
                for task in ("bbox", "segm")
            }
            show("the same, up to the borders of images", found)


def show(what: str, tasks: Mapping[str, Mapping[str, float]]) -> None:
    """Prints AP of boxes and masks."""
    values = {f"{t}/{n}": round(tasks[t][n], 2) for t in tasks for n in ("AP", "AP50", "AR")}
    print(what, values, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
