"""One image of 4,000 x 6,000 pixels with 100 objects, in a process of its own.

    python -m tests.large_image predict

prints the memory that the process held before and at most, in MiB, and the processor time of its
one thread, in seconds, as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from maskdino.config import load_config
from maskdino.data import register_coco_folder
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from tests.memory import most_resident_mib, one_thread, resident_mib

HEIGHT, WIDTH, OBJECTS = 4000, 6000, 100
CONFIG = "nuclei/instance/maskdino_tiny"


def configuration(folder: Path) -> CfgNode:
    """The tiny model of nuclei, which keeps 100 objects, whatever their scores."""
    cfg = load_config(
        f"configs/{CONFIG}.yaml",
        ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(folder)],
    )
    cfg.TEST.DETECTIONS_PER_IMAGE = OBJECTS
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("large",)
    return cfg


def write_dataset(folder: Path) -> None:
    """One image; half of its objects are polygons, half run lengths of the whole image."""
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT // 50, WIDTH // 50, 3), np.uint8)
    Image.fromarray(noise.repeat(50, 0).repeat(50, 1)).save(folder / "large.png", compress_level=1)
    annotations = []
    for number in range(OBJECTS):
        x, y = 20 + 590 * (number % 10), 20 + 390 * (number // 10)
        segmentation: list | dict = [[x, y, x + 500, y, x + 500, y + 300, x, y + 300]]
        if number % 2:
            counts = [x * HEIGHT + y, *([300, HEIGHT - 300] * 499), 300]
            rest = HEIGHT * WIDTH - sum(counts)
            segmentation = {"size": [HEIGHT, WIDTH], "counts": [*counts, rest]}
        annotations.append(
            {
                "id": number + 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [x, y, 500, 300],
                "area": 150_000,
                "iscrowd": 0,
                "segmentation": segmentation,
            }
        )
    content = {
        "images": [{"id": 1, "file_name": "large.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "nucleus"}],
    }
    (folder / "large.json").write_text(json.dumps(content))
    register_coco_folder("large", folder / "large.json", folder)


def predict(model: MaskDINO, cfg: CfgNode, folder: Path) -> int:
    """Predicts, draws, and writes all as JSON; gives the number of objects."""
    predictor = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0)
    result = predictor(folder / "large.png")
    result.save(folder / "drawn.png")
    result.save(folder / "drawn.json")
    return len(result)


def evaluate(model: MaskDINO, cfg: CfgNode, folder: Path) -> int:
    """Evaluates as a training does; gives the number of objects in the file of results."""
    MaskDINOTrainer.test(cfg, model)
    file = folder / "inference" / "large" / "coco_instances_results.json"
    return len(json.loads(file.read_text()))


def train(model: MaskDINO, cfg: CfgNode, _: Path) -> int:
    """Reads the image and its masks for training, in their full size; gives their number."""
    cfg.INPUT.LSJ.SIZE = [HEIGHT, WIDTH]
    cfg.INPUT.LSJ.MIN_SCALE = cfg.INPUT.LSJ.MAX_SCALE = 1.0
    cfg.SOLVER.IMS_PER_BATCH = 1
    loader = iter(MaskDINOTrainer.build_train_loader(cfg))
    instances = next(loader)[0]["instances"]
    assert instances.image_size == (HEIGHT, WIDTH) and model.training is False
    return len(instances.gt_masks)


def main(what: str) -> None:
    """Measures one of the functions above."""
    one_thread()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder)
        cfg = configuration(folder)
        torch.manual_seed(0)
        model = MaskDINO(cfg).eval()
        before, begin = resident_mib(), time.process_time()
        number = {"predict": predict, "evaluate": evaluate, "train": train}[what](
            model, cfg, folder
        )
    found = {"objects": number, "before": before, "most": most_resident_mib()}
    print(json.dumps(found | {"seconds": time.process_time() - begin}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
