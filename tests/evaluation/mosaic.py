"""A large image of real ones: all validation images of nuclei, side by side.

    python -m tests.evaluation.mosaic WEIGHTS

prints AP of a trained model on the single images, and on the mosaic in slices.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from maskdino.config import load_config
from maskdino.data import register_coco_folder
from maskdino.engine.evaluating import evaluate_weights
from maskdino.ops.rle import decode_segmentation, encode_mask, to_json
from tests.inference.test_sliced import paint

NUCLEI = Path(__file__).resolve().parents[2] / "datasets" / "nuclei"
CELL = (256, 320)  # height and width of the place of an image in the mosaic
COLUMNS = 3


def write_mosaic(folder: Path, *, colors: bool, every: int = 1) -> int:
    """Validation images of nuclei as one; returns how many nuclei it shows.

    Args:
        folder: gets "mosaic.tif" and "mosaic.json".
        colors: paint each nucleus in a color that the oracle knows, in place of the image.
        every: take one of so many images.
    """
    data = json.loads((NUCLEI / "annotations" / "instances_val.json").read_text())
    images = data["images"][::every]
    height, width = -(-len(images) // COLUMNS) * CELL[0], COLUMNS * CELL[1]
    mosaic, annotations = np.zeros((height, width, 3), np.uint8), []
    for i, entry in enumerate(images):
        top, left = i // COLUMNS * CELL[0], i % COLUMNS * CELL[1]
        window = mosaic[top : top + entry["height"], left : left + entry["width"]]
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


def configuration(config: str, weights: str, dataset: str, folder: Path) -> CfgNode:
    """Of a trained model, which is evaluated on a CPU."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(folder)]
    cfg = load_config(config, [*options, "DATALOADER.NUM_WORKERS", "0"])
    cfg.DATASETS.TEST = (dataset,)
    return cfg


def main() -> None:
    """Prints a line for each evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--config-file", default="configs/nuclei/instance/maskdino_tiny.yaml")
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.25])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        number = write_mosaic(folder, colors=False)
        register_coco_folder("mosaic_of_nuclei", str(folder / "mosaic.json"), name)
        cfg = configuration(args.config_file, args.weights, "nuclei_val", folder)
        results = {"single images": evaluate_weights(cfg, resume=False)}
        for overlap in args.overlap:
            cfg = configuration(args.config_file, args.weights, "mosaic_of_nuclei", folder)
            cfg.TEST.SLICES.SIZE, cfg.TEST.SLICES.OVERLAP = 256, overlap
            results[f"mosaic, overlap {overlap}"] = evaluate_weights(cfg, resume=False)
    for what, tasks in results.items():
        values = {f"{t}/{n}": round(tasks[t][n], 2) for t in tasks for n in ("AP", "AP50", "AR")}
        print(what, number, values)  # noqa: T201


if __name__ == "__main__":
    main()
