"""The small dataset that the corpus spoils, and a model that knows what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor

from maskdino.data import register_coco_folder
from maskdino.data.mappers import InstanceMapper, PanopticMapper, SemanticMapper
from maskdino.ops.rle import encode_mask, to_json
from tests.corpus.case import PREFIX
from tests.engine.stand_in import CONFIG, StandIn

SIZE = 48, 64  # height and width of the images
NAME = f"{PREFIX}scene"
CATEGORIES = {"car": 3, "person": 70}
STUFF = 9, 71  # segment and category of all the rest, in maps
CLASSES = {**CATEGORIES, "ground": STUFF[1]}
NAMES = {1: "a.png", 2: "b.png", 3: "c.png", 4: "d.png"}
Box = tuple[int, int, int, int]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Thing:
    """An object: a rectangle, whose mask is all of it."""

    image: int
    category: str
    box: Box
    form: str = "polygon"  # "list" and "text": run lengths

    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        x0, y0, x1, y1 = self.box
        mask = np.zeros(SIZE, bool)
        mask[y0:y1, x0:x1] = True
        return mask

    def annotation(self, number: int) -> dict[str, Any]:
        """COCO's."""
        x0, y0, x1, y1 = self.box
        rle = to_json(encode_mask(self.mask()))
        if self.form == "polygon":
            segmentation: Any = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        else:
            segmentation = (
                rle if self.form == "text" else {"size": [*SIZE], "counts": self.counts()}
            )
        return {
            "id": number,
            "image_id": self.image,
            "category_id": CATEGORIES[self.category],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "segmentation": segmentation,
        }

    def counts(self) -> list[int]:
        """Run lengths, of columns."""
        flat = self.mask().ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        return np.diff([0, *edges, flat.size]).tolist()


THINGS = {
    1: Thing(1, "person", (8, 8, 28, 24)),
    2: Thing(1, "car", (32, 16, 56, 40)),
    3: Thing(2, "car", (4, 20, 24, 44), "list"),
    4: Thing(2, "person", (30, 4, 60, 30), "text"),
    5: Thing(3, "person", (10, 10, 40, 40)),
    6: Thing(3, "car", (44, 2, 62, 20)),
    7: Thing(4, "car", (6, 6, 26, 26)),
    8: Thing(4, "person", (30, 22, 50, 46), "text"),
}
EVERYTHING = frozenset(THINGS)


def content() -> dict[str, Any]:
    """The annotation file, nothing wrong in it."""
    images = [
        {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for number, name in NAMES.items()
    ]
    annotations = [thing.annotation(number) for number, thing in THINGS.items()]
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def pixels(number: int) -> np.ndarray:
    """(H, W, 3) uint8 of an image: its objects in the colors of their classes, on noise."""
    image = np.random.default_rng(number).integers(0, 60, (*SIZE, 3), np.uint8)
    for thing in THINGS.values():
        if thing.image == number:
            image[thing.mask()] = (220, 40, 40) if thing.category == "person" else (40, 200, 90)
    return image


def segment_map(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) int32 segments and (H, W) uint8 classes of an image."""
    ids = np.full(SIZE, STUFF[0], np.int32)
    classes = np.full(SIZE, len(CATEGORIES), np.uint8)
    for i, thing in THINGS.items():
        if thing.image == number:
            ids[thing.mask()] = i
            classes[thing.mask()] = list(CATEGORIES).index(thing.category)
    return ids, classes


def write_images(folder: Path) -> Path:
    """Writes the images into `images`."""
    (folder / "images").mkdir(exist_ok=True)
    for number, name in NAMES.items():
        Image.fromarray(pixels(number)).save(folder / "images" / name)
    return folder / "images"


def write_scene(folder: Path, spoil: Callable[[dict], object] = lambda _: None) -> Path:
    """Writes images and, spoiled, their annotations; returns the annotation file."""
    write_images(folder)
    values = content()
    spoil(values)
    path = folder / "bad.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@META_ARCH_REGISTRY.register()
class Oracle(StandIn):
    """Trains as the stand-in does, and predicts the objects of the images named in `THINGS`."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.names = sorted(CATEGORIES, key=lambda name: CATEGORIES[name])

    def forward(self, images: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses, or detections."""
        if self.training:
            return super().forward(images)
        return [{"instances": self.found(image), **_maps(image)} for image in images]

    def found(self, image: dict) -> Instances:
        """All objects of an image."""
        name = Path(image["file_name"]).name
        things = [thing for thing in THINGS.values() if NAMES[thing.image] == name]
        masks = np.array([thing.mask() for thing in things]).reshape(-1, *SIZE)
        return Instances(
            SIZE,
            pred_boxes=Boxes(torch.tensor([thing.box for thing in things]).reshape(-1, 4)),
            pred_masks=torch.from_numpy(masks),
            scores=torch.linspace(0.9, 0.8, len(things)),
            pred_classes=torch.tensor([self.names.index(thing.category) for thing in things]),
        )


def _maps(image: dict) -> dict[str, Any]:
    """The panoptic segments and the scores of classes of an image."""
    numbers = {name: number for number, name in NAMES.items()}
    ids, classes = map(torch.from_numpy, segment_map(numbers.get(Path(image["file_name"]).name, 0)))
    labels = {int(i): int(classes[ids == i][0]) for i in ids.unique()}
    segments = [
        {"id": i, "category_id": label, "isthing": label < len(CATEGORIES)}
        for i, label in labels.items()
    ]
    scores = torch.nn.functional.one_hot(classes.long(), len(CLASSES)).permute(2, 0, 1).float()
    return {"panoptic_seg": (ids, segments), "sem_seg": scores}


def write_config(folder: Path) -> Path:
    """A configuration of a model of a few weights, for the annotations of `write_scene`."""
    path = folder / "scene.yaml"
    path.write_text(
        f"_BASE_: {CONFIG}\n"
        f"DATASETS: {{TRAIN: [{NAME}], TEST: [{NAME}]}}\n"
        "MODEL: {META_ARCHITECTURE: Oracle, DEVICE: cpu, MASK_DINO: {NUM_CLASSES: 2}}\n"
        "INPUT: {LSJ: {SIZE: [64, 64]}, FORMAT: RGB}\n"
        "SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 1, STEPS: [], WARMUP_ITERS: 0}\n"
        "DATALOADER: {NUM_WORKERS: 0}\n"
        "SEED: 5\n"
        f"OUTPUT_DIR: {folder / 'out'}\n"
    )
    return path


def training_words(folder: Path, json_file: Path, *more: object) -> list[str]:
    """Registers annotations; the words of `maskdino train`, without an evaluation."""
    register_coco_folder(NAME, json_file, folder / "images")
    return command_words(folder, False, *more)


def evaluation_words(folder: Path, json_file: Path, *more: object) -> list[str]:
    """Registers annotations; the words of `maskdino evaluate`, with the weights of the Oracle."""
    register_coco_folder(NAME, json_file, folder / "images")
    return command_words(folder, True, *more)


def command_words(folder: Path, evaluates: bool, *more: object) -> list[str]:
    """The words of either, for the registered dataset."""
    config = write_config(folder)
    if not evaluates:
        return ["--config-file", str(config), "DATASETS.TEST", "()", *map(str, more)]
    weights = folder / "oracle.pth"
    shapes = {"backbone.weight": (4, 3, 16, 16), "backbone.bias": (4,), "norm.weight": (4,)}
    shapes |= {"norm.bias": (4,), "head.weight": (1, 4), "head.bias": (1,)}
    torch.save({"model": {name: torch.ones(shape) for name, shape in shapes.items()}}, weights)
    words = ["--eval-only", "--config-file", str(config), "MODEL.WEIGHTS", str(weights)]
    return [*words, "DATASETS.TRAIN", "()", *map(str, more)]


def custom_words(folder: Path, json_file: Path, *more: object) -> list[str]:
    """The words of `maskdino train-custom`, of which nothing but the data are of interest."""
    words = ["--train-json", json_file, "--train-images", folder / "images", "--weights", "none"]
    words += ["--output", folder / "out", "--epochs", 1, "--batch-size", 1, *more]
    return [*map(str, words)]


Seen = list[tuple[str, int, Box]]


def expected(numbers: Collection[int]) -> Seen:
    """File, class number and box of objects, sorted."""
    names = sorted(CATEGORIES, key=lambda name: CATEGORIES[name])
    things = (THINGS[number] for number in numbers)
    return sorted((NAMES[x.image], names.index(x.category), x.box) for x in things)


def trained_on(kind: str = "instance", num_classes: int = 2) -> Seen:
    """What a training on the registered annotations is given, as its mapper reads it."""
    seen = []
    make: Any = {
        "instance": partial(InstanceMapper, use_masks=True),
        "panoptic": partial(PanopticMapper, thing_classes=range(len(CATEGORIES))),
        "semantic": partial(SemanticMapper, ignore_label=255),
    }[kind]
    mapper = make(augmentations=[], image_format="RGB", num_classes=num_classes)
    for record in DatasetCatalog.get(NAME):
        objects = mapper(record)["instances"]
        boxes = objects.gt_boxes.tensor.round().int().tolist()
        name = Path(record["file_name"]).name
        pairs = zip(objects.gt_classes.tolist(), boxes, strict=True)
        seen += [(name, number, tuple(box)) for number, box in pairs]
    return sorted(seen)


def prepared(folder: Path) -> Seen:
    """What `maskdino train-custom` wrote to train and validate on, crowds left out."""
    seen = []
    for split in ("train", "val"):
        data = json.loads((folder / "out" / "data" / f"custom_{split}.json").read_text())
        names = {image["id"]: Path(image["file_name"]).name for image in data["images"]}
        numbers = {category["id"]: i for i, category in enumerate(data["categories"])}
        for x in data["annotations"]:
            left, top, width, height = x["bbox"]
            box = tuple(map(round, (left, top, left + width, top + height)))
            if not x["iscrowd"]:
                seen.append((names[x["image_id"]], numbers[x["category_id"]], box))
    return sorted(seen)
