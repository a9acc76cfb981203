"""Small datasets of drawn shapes, in the folders and formats of COCO, ADE20K and Cityscapes.

Every scene has stuff (sky above road) and things (persons are ellipses, cars are rectangles) that
hide one another; the classes carry each dataset's own ids, so that the datasets load under their
real names. Things of one colour are one class: a small model can learn them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

SPLITS = ("train", "val")
COLORS = {
    "sky": (90, 160, 240),
    "road": (90, 90, 90),
    "person": (230, 60, 60),
    "car": (60, 200, 90),
}
COCO_IDS = {"sky": 187, "road": 149, "person": 1, "car": 3}
ADE20K_IDS = {"sky": 2, "road": 6, "person": 12, "car": 20}  # from 0
ADE20K_INSTANCE_NUMBERS = {"person": 4, "car": 9}  # from 1, of the 100 things
CITYSCAPES_IDS = {"sky": 23, "road": 7, "person": 24, "car": 26}


@dataclass(frozen=True)
class Shape:
    """A class and the polygon that it was drawn from; later shapes hide earlier ones."""

    name: str
    polygon: np.ndarray  # (P, 2) float64: x, y in pixels

    @property
    def is_thing(self) -> bool:
        return self.name in ("person", "car")


@dataclass(frozen=True)
class Scene:
    """A picture and what was drawn on it."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    shapes: tuple[Shape, ...]
    owner: np.ndarray  # (H, W) int64: index of the shape that is visible; -1 where there is none

    @property
    def size(self) -> tuple[int, int]:
        return self.owner.shape

    def visible(self) -> list[tuple[Shape, np.ndarray]]:
        """Shapes of which something is visible, each with its visible mask (H, W) bool."""
        masks = ((shape, self.owner == i) for i, shape in enumerate(self.shapes))
        return [(shape, mask) for shape, mask in masks if mask.any()]


def make_scene(size: tuple[int, int], num_things: int, generator: np.random.Generator) -> Scene:
    """Draws a scene of (height, width) pixels; its uppermost row belongs to no class."""
    height, width = size
    horizon = generator.uniform(0.3, 0.7) * height
    shapes = [
        Shape("sky", np.array([(0, 1), (width, 1), (width, horizon), (0, horizon)], float)),
        Shape("road", np.array([(0, horizon), (width, horizon), (width, height), (0, height)])),
    ]
    for i in range(num_things):
        center = generator.uniform((0, 1), (width, height))
        half = generator.uniform(0.08, 0.2, 2) * min(size)
        name, corners, start = ("person", 24, 0.0) if i % 2 else ("car", 4, np.pi / 4)
        angles = start + np.arange(corners) * 2 * np.pi / corners
        points = center + np.stack([np.cos(angles), np.sin(angles)], axis=1) * half
        shapes.append(Shape(name, points.clip((0, 1), (width, height))))
    owner = np.full(size, -1)
    image = np.zeros((*size, 3))
    for i, shape in enumerate(shapes):
        mask = draw(shape.polygon, size)
        owner[mask] = i
        image[mask] = np.array(COLORS[shape.name]) + generator.normal(0, 8, 3)
    noise = generator.normal(0, 6, image.shape)
    return Scene((image + noise).clip(0, 255).astype(np.uint8), tuple(shapes), owner)


def make_scenes(
    number: int, size: tuple[int, int] = (96, 128), num_things: int = 4, seed: int = 0
) -> list[Scene]:
    """Draws several scenes, always the same for one seed."""
    generator = np.random.default_rng(seed)
    return [make_scene(size, num_things, generator) for _ in range(number)]


def draw(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool."""
    return mask_util.decode(mask_util.frPyObjects([polygon.ravel()], *size))[..., 0].astype(bool)


def box_xywh(mask: np.ndarray) -> list[int]:
    """Left, top, width and height of a mask that is not empty, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _segmentation(shape: Shape, size: tuple[int, int], form: int) -> list | dict:
    """The shape as a polygon, uncompressed RLE, or compressed RLE."""
    if form == 0:
        return [shape.polygon.ravel().tolist()]
    mask = draw(shape.polygon, size)
    if form == 1:
        flat = mask.ravel(order="F")
        edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
        counts = np.diff(edges).tolist()
        return {"size": list(size), "counts": [0, *counts] if flat[0] else counts}
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(size), "counts": rle["counts"].decode()}


def write_coco(root: Path, scenes: dict[str, list[Scene]]) -> Path:
    """Writes `coco/`, with instances (polygons, RLE of both kinds, and a crowd) and panoptic maps.

    Args:
        root: what DETECTRON2_DATASETS names.
        scenes: of each split.

    Returns:
        The folder `coco`.
    """
    folder = root / "coco"
    for split, split_scenes in scenes.items():
        images, annotations, segments = [], [], []
        for number, scene in enumerate(split_scenes, start=1):
            height, width = scene.size
            name = f"{number:012d}"
            _save(folder / f"{split}2017" / f"{name}.jpg", scene.image)
            images.append(
                {"id": number, "file_name": f"{name}.jpg", "height": height, "width": width}
            )
            annotations += _coco_annotations(scene, number, len(annotations) + 1)
            segments.append(_coco_segments(folder / f"panoptic_{split}2017", name, number, scene))
        things = [_coco_category(name) for name in ("person", "car")]
        everything = things + [_coco_category(name) for name in ("road", "sky")]
        _save_json(
            folder / "annotations" / f"instances_{split}2017.json",
            {"images": images, "annotations": annotations, "categories": things},
        )
        _save_json(
            folder / "annotations" / f"panoptic_{split}2017.json",
            {"images": images, "annotations": segments, "categories": everything},
        )
    return folder


def _coco_category(name: str) -> dict:
    return {"id": COCO_IDS[name], "name": name, "isthing": int(name in ("person", "car"))}


def _coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    annotations = []
    for shape in scene.shapes[2:]:
        mask = draw(shape.polygon, scene.size)
        if mask.any():
            number = first_id + len(annotations)
            annotations.append(
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": COCO_IDS[shape.name],
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": box_xywh(mask),
                    "segmentation": _segmentation(shape, scene.size, number % 3),
                }
            )
    crowd = np.zeros(scene.size, bool)
    crowd[:8, :8] = True
    corner = Shape("person", np.array([(0, 0), (8, 0), (8, 8), (0, 8)], float))
    annotations.append(
        {
            "id": first_id + len(annotations),
            "image_id": image_id,
            "category_id": COCO_IDS["person"],
            "iscrowd": 1,
            "area": 64,
            "bbox": [0, 0, 8, 8],
            "segmentation": _segmentation(corner, scene.size, 1),
        }
    )
    return annotations


def _coco_segments(folder: Path, name: str, image_id: int, scene: Scene) -> dict:
    colors = np.zeros((*scene.size, 3), np.uint8)
    segments = []
    for number, (shape, mask) in enumerate(scene.visible(), start=1):
        segment_id = number * 70_001  # uses all three bytes
        colors[mask] = [segment_id & 255, segment_id >> 8 & 255, segment_id >> 16]
        segments.append(
            {
                "id": segment_id,
                "category_id": COCO_IDS[shape.name],
                "iscrowd": 0,
                "area": int(mask.sum()),
                "bbox": box_xywh(mask),
            }
        )
    _save(folder / f"{name}.png", colors)
    return {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}


def write_ade20k(root: Path, scenes: dict[str, list[Scene]]) -> Path:
    """Writes `ADEChallengeData2016/` as it is downloaded, nothing prepared."""
    folder = root / "ADEChallengeData2016"
    for split, long_split in zip(SPLITS, ("training", "validation"), strict=True):
        for number, scene in enumerate(scenes[split], start=1):
            name = f"ADE_{split}_{number:08d}"
            labels = np.zeros(scene.size, np.uint8)
            instances = np.zeros((*scene.size, 3), np.uint8)
            for index, (shape, mask) in enumerate(scene.visible(), start=1):
                labels[mask] = ADE20K_IDS[shape.name] + 1
                if shape.is_thing:
                    instances[mask] = [ADE20K_INSTANCE_NUMBERS[shape.name], index, 0]
            _save(folder / "images" / long_split / f"{name}.jpg", scene.image)
            _save(folder / "annotations" / long_split / f"{name}.png", labels)
            _save(folder / "annotations_instance" / long_split / f"{name}.png", instances)
    return folder


def write_cityscapes(root: Path, scenes: dict[str, list[Scene]]) -> Path:
    """Writes `cityscapes/` as it is downloaded, nothing prepared; the city is Aachen."""
    folder = root / "cityscapes"
    for split in SPLITS:
        for number, scene in enumerate(scenes[split]):
            name = f"aachen_{number:06d}_000000"
            labels = np.zeros(scene.size, np.uint8)
            instances = np.zeros(scene.size, np.uint16)
            things = dict.fromkeys(CITYSCAPES_IDS, 0)
            for shape, mask in scene.visible():
                label = CITYSCAPES_IDS[shape.name]
                labels[mask] = label
                instances[mask] = label * 1000 + things[shape.name] if shape.is_thing else label
                things[shape.name] += 1
            truth = folder / "gtFine" / split / "aachen"
            _save(
                folder / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png", scene.image
            )
            _save(truth / f"{name}_gtFine_labelIds.png", labels)
            _save(truth / f"{name}_gtFine_instanceIds.png", instances)
            objects = [
                {"label": shape.name, "polygon": shape.polygon.round().astype(int).tolist()}
                for shape in scene.shapes
            ]
            _save_json(
                truth / f"{name}_gtFine_polygons.json",
                {"imgHeight": scene.size[0], "imgWidth": scene.size[1], "objects": objects},
            )
    return folder


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def _save_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
