"""Label images and panoptic annotations of drawn classes, as other programs write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from maskdino.data.reading import colors_of_ids

NAMES = ("background", "apple", "nut")
COLORS = ((0, 0, 0), (128, 0, 0), (0, 128, 0))
SIZE = (24, 32)


def label(number: int) -> np.ndarray:
    """(24, 32) uint8 classes: all three, and pixels that do not count."""
    labels = np.zeros(SIZE, np.uint8)
    labels[4:12, 4 : 10 + number] = 1
    labels[14:22, 8:20] = 2
    labels[0] = 255
    return labels


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_images(folder: Path, number: int = 5, suffix: str = ".jpg") -> None:
    for i in range(number):
        save(folder / f"photo_{i}{suffix}", np.full((*SIZE, 3), 20 * i, np.uint8))


def write_semantic(root: Path) -> None:
    """images, labels, classes.txt."""
    write_images(root / "images")
    for i in range(5):
        save(root / "labels" / f"photo_{i}.png", label(i))
    (root / "classes.txt").write_text("\n".join(NAMES))


def write_palette(root: Path) -> None:
    """The same with palettes, as Pascal VOC has them, and a list of names in YAML."""
    write_semantic(root)
    (root / "classes.txt").unlink()
    (root / "data.yaml").write_text("names: [background, apple, nut]\n")
    for path in (root / "labels").iterdir():
        image = Image.open(path).convert("L")
        image.putpalette([x for color in COLORS for x in color] + [9] * 3 * (256 - len(COLORS)))
        image.save(path)


def write_modes(root: Path) -> None:
    """Three equal channels, or transparency: training reads neither."""
    write_semantic(root)
    for i, path in enumerate(sorted((root / "labels").iterdir())):
        Image.open(path).convert("RGB" if i % 2 else "LA").save(path)


def colored(labels: np.ndarray) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(COLORS)] = COLORS
    table[255] = (224, 224, 192)
    return table[labels]


def write_cvat(root: Path) -> None:
    """CVAT's "Segmentation mask": VOC's folders, colors in labelmap.txt."""
    write_images(root / "JPEGImages")
    for i in range(5):
        save(root / "SegmentationClass" / f"photo_{i}.png", colored(label(i)))
        save(root / "SegmentationObject" / f"photo_{i}.png", colored(label(i)))
    lines = ["# label:color_rgb:parts:actions"]
    named = zip(NAMES, COLORS, strict=True)
    lines += [f"{name}:{','.join(map(str, color))}::" for name, color in named]
    (root / "labelmap.txt").write_text("\n".join(lines))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "Train.txt").write_text("photo_0\nphoto_1\nphoto_3\n")
    (lists / "Validation.txt").write_text("photo_2\nphoto_4\n")


def write_roboflow(root: Path) -> None:
    """Images, labels and a table of names in the folder of each split."""
    for split, numbers in (("train", (0, 1, 3)), ("valid", (2, 4))):
        for i in numbers:
            save(root / split / f"photo_{i}.jpg", np.zeros((*SIZE, 3), np.uint8))
            save(root / split / f"photo_{i}_mask.png", label(i))
        rows = "".join(f"{i}, {name}\n" for i, name in enumerate(NAMES))
        (root / split / "_classes.csv").write_text(f"Pixel Value, Class\n{rows}")


def write_sparse(root: Path) -> None:
    """Values that are no class numbers, and 16 bits."""
    write_semantic(root)
    (root / "classes.txt").unlink()
    (root / "label_map.json").write_text('{"background": 0, "apple": 70, "nut": 300, "void": 9}')
    table = np.full(256, 9, np.uint16)
    table[:3] = 0, 70, 300
    for path in (root / "labels").iterdir():
        save(path, table[np.array(Image.open(path))])


def write_panoptic(root: Path, content: dict | None = None) -> dict:
    """annotations/panoptic_train.json, its PNG files beside it, and images of the same names."""
    write_images(root / "train", suffix=".png")
    images, annotations = [], []
    for i in range(5):
        name = f"photo_{i}.png"
        ids = np.select([label(i) == 1, label(i) == 2, label(i) == 0], [700, 70_000, 3], 0)
        save(root / "annotations" / "panoptic_train" / name, colors_of_ids(ids))
        images.append({"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        segments = [{"id": 3, "category_id": 8}, {"id": 700, "category_id": 2}]
        segments.append({"id": 70_000, "category_id": 5, "area": 1})
        annotations.append({"image_id": i, "file_name": name, "segments_info": segments})
    categories = [
        {"id": 8, "name": "background", "isthing": 0},
        {"id": 2, "name": "apple", "isthing": 1},
        {"id": 5, "name": "nut", "isthing": 1},
    ]
    result = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / "panoptic_train.json"
    path.write_text(json.dumps(result if content is None else content))
    return result
