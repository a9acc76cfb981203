"""Does memory grow with the number of images? In a process of its own.

    python -m tests.flat_memory predictions 2000

prints, as one line of JSON, the mean of what the process held in the first and in the last third of
the steps, in MiB, and how many tensors were alive in the middle and at the end. A narrow model and
tiny images: growth does not depend on their size.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from torch import Tensor

from maskdino.data import register_coco_folder
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from tests.helpers import drawn_batch, tiny_cfg, tiny_model
from tests.memory import one_thread, resident_mib

OBJECTS = 100
SIZES = ((64, 64), (48, 80), (75, 50))  # of images, in turn


class Samples:
    """Takes a sample of the memory after each step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.resident, self.alive = steps, list[float](), list[int]()

    def take(self) -> None:
        """After a step."""
        self.resident.append(resident_mib())
        if len(self.resident) in (self.steps // 2, self.steps):
            gc.collect()
            self.alive.append(sum(isinstance(x, Tensor) for x in gc.get_objects()))

    def summary(self) -> dict[str, float | list[int]]:
        """What is printed."""
        third = self.steps // 3
        first, last = np.mean(self.resident[:third]), np.mean(self.resident[-third:])
        return {"first": float(first), "last": float(last), "alive": self.alive}


def predictions(samples: Samples, _: Path) -> None:
    """Images one by one, 100 masks in each."""
    cfg = tiny_cfg(QUERY_SELECTION__NUM_QUERIES=OBJECTS)
    cfg.TEST.DETECTIONS_PER_IMAGE = OBJECTS
    model = tiny_model(QUERY_SELECTION__NUM_QUERIES=OBJECTS)
    predictor = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0, size=64)
    generator = np.random.default_rng(0)
    for number in range(samples.steps):
        height, width = SIZES[number % len(SIZES)]
        result = predictor(generator.integers(0, 256, (height, width, 3), np.uint8))
        assert len(result.rles) == OBJECTS
        samples.take()


class _Sampling(HookBase):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def after_step(self) -> None:
        self.samples.take()


def training(samples: Samples, folder: Path) -> None:
    """The trainer with all its hooks; checkpoints and averages of weights among them."""
    cfg = tiny_cfg(NUM_CLASSES=1)
    cfg.DATASETS.TRAIN = ("nuclei_train",)  # its classes are checked; drawn images are read
    cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = str(folder), samples.steps
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = max(1, samples.steps // 5), 0
    cfg.SOLVER.EMA.ENABLED = True
    batches = [drawn_batch([size, SIZES[0]], [7, 2]) for size in SIZES]
    for example in (x for batch in batches for x in batch):
        example["instances"].gt_classes.zero_()

    class Trainer(MaskDINOTrainer):
        @classmethod
        def build_train_loader(cls, _: object) -> Iterator[list[dict]]:
            while True:
                yield from batches

    trainer = Trainer(cfg)
    trainer.register_hooks([_Sampling(samples)])
    trainer.resume_or_load(resume=False)
    trainer.train()


def evaluation(samples: Samples, folder: Path) -> None:
    """What an evaluation of COCO's numbers holds: the records of what was found, and no more."""
    ids = range(1, samples.steps + 1)
    image = {"file_name": "none.png", "height": SIZES[0][0], "width": SIZES[0][1]}
    truth = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    content = {
        "images": [image | {"id": i} for i in ids],
        "annotations": [truth | {"id": 1, "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]}],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(5)],
    }
    (folder / "flat.json").write_text(json.dumps(content))
    register_coco_folder("flat", folder / "flat.json", folder)
    DatasetCatalog.get("flat")  # its classes are known once it is read
    cfg = tiny_cfg()
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("flat",), str(folder)
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    batches = [drawn_batch([size], [0]) for size in SIZES]

    class Trainer(MaskDINOTrainer):
        @classmethod
        def build_test_loader(cls, *_: object) -> list[list[dict]]:
            return _Inputs(samples, batches)

    Trainer.test(cfg, MaskDINO(cfg))
    DatasetCatalog.remove("flat")
    MetadataCatalog.remove("flat")


class _Inputs(list):
    """As long as there are steps; a sample is taken whenever the next batch is asked for."""

    def __init__(self, samples: Samples, batches: list[list[dict]]) -> None:
        self.samples, self.batches = samples, batches

    def __len__(self) -> int:
        return self.samples.steps

    def __iter__(self) -> Iterator[list[dict]]:
        for number in range(self.samples.steps):
            (inputs,) = self.batches[number % len(self.batches)]
            yield [inputs | {"image_id": number + 1}]
            self.samples.take()


WHAT: dict[str, Callable[[Samples, Path], None]] = {
    "predictions": predictions,
    "training": training,
    "evaluation": evaluation,
}


def main(what: str, steps: int) -> None:
    """Measures one of `WHAT`."""
    one_thread()
    torch.manual_seed(0)
    samples = Samples(steps)
    with tempfile.TemporaryDirectory() as folder:
        WHAT[what](samples, Path(folder))
    print(json.dumps(samples.summary()))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
