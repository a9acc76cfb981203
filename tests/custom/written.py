"""Writes annotations in COCO's lists in the formats of other programs, as these write them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import yaml
from PIL import Image

from maskdino.ops.rle import decode_segmentation


@dataclass
class Sample:
    """A small dataset in COCO's lists.

    Attributes:
        images: folder of the images by split.
        content: of the annotation file by split.
    """

    images: dict[str, Path]
    content: dict[str, dict]

    @property
    def names(self) -> list[str]:
        """Of the classes, in their order."""
        return [x["name"] for x in next(iter(self.content.values()))["categories"]]

    def each(self) -> list[tuple[str, dict, list[tuple[str, dict]]]]:
        """Split, image, and class name and annotation of each of its objects."""
        result = []
        for split, content in self.content.items():
            names = {x["id"]: x["name"] for x in content["categories"]}
            objects = defaultdict(list)
            for x in content["annotations"]:
                objects[x["image_id"]].append((names[x["category_id"]], x))
            result += [(split, image, objects[image["id"]]) for image in content["images"]]
        return result

    def copy_images(self, folder_of: Callable[[str], Path]) -> None:
        """Copies the images of each split into a folder."""
        for split, image, _ in self.each():
            folder_of(split).mkdir(parents=True, exist_ok=True)
            shutil.copy(self.images[split] / image["file_name"], folder_of(split))


def shorten(sample: Sample, most: int) -> Sample:
    """The first images of each split."""
    content = {}
    for split, whole in sample.content.items():
        images = whole["images"][:most]
        ids = {x["id"] for x in images}
        objects = [x for x in whole["annotations"] if x["image_id"] in ids]
        content[split] = {**whole, "images": images, "annotations": objects}
    return Sample(sample.images, content)


def corners(box: list[float]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of COCO's box."""
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def write_coco(sample: Sample, root: Path) -> None:
    """annotations/instances_SPLIT.json, images in images/SPLIT."""
    sample.copy_images(lambda split: root / "images" / split)
    (root / "annotations").mkdir()
    for split, content in sample.content.items():
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))


def write_roboflow(sample: Sample, root: Path) -> None:
    """SPLIT/_annotations.coco.json with a class 0 that is the parent of the others."""
    folders = {"train": "train", "val": "valid", "test": "test"}
    sample.copy_images(lambda split: root / folders[split])
    for split, content in sample.content.items():
        parent = {"id": 0, "name": "things", "supercategory": "none"}
        classes = [{**x, "supercategory": "things"} for x in content["categories"]]
        text = json.dumps({**content, "categories": [parent, *classes]})
        (root / folders[split] / "_annotations.coco.json").write_text(text)


def write_yolo(sample: Sample, root: Path) -> None:
    """data.yaml, images/SPLIT, labels/SPLIT; polygons where there are some."""
    sample.copy_images(lambda split: root / "images" / split)
    settings = {"names": sample.names, "nc": len(sample.names)}
    settings |= {split: f"../images/{split}" for split in sample.content}  # as Roboflow has it
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    for split, image, objects in sample.each():
        width, height = image["width"], image["height"]
        lines = []
        for name, x in objects:
            left, top, right, bottom = corners(x["bbox"])
            values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
            if x.get("segmentation"):
                (values,) = x["segmentation"]
            shares = [v / (height if i % 2 else width) for i, v in enumerate(values)]
            lines.append(" ".join([str(sample.names.index(name)), *(f"{v:.6f}" for v in shares)]))
        path = (root / "labels" / split / image["file_name"]).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


def write_label_studio_yolo(sample: Sample, root: Path) -> None:
    """classes.txt, notes.json, images and labels without splits."""
    write_yolo(sample, root)
    (root / "data.yaml").unlink()
    for kind in ("images", "labels"):
        for path in (root / kind).glob("*/*"):
            path.rename(root / kind / path.name)
        for folder in (root / kind).iterdir():
            if folder.is_dir():
                folder.rmdir()
    (root / "classes.txt").write_text("\n".join(sample.names) + "\n")
    (root / "notes.json").write_text(json.dumps({"categories": [], "info": {"version": "1.0"}}))


def write_darknet(sample: Sample, root: Path) -> None:
    """CVAT's YOLO 1.1: obj.names, and images and labels together in obj_SPLIT_data."""
    write_yolo(sample, root)
    (root / "data.yaml").unlink()
    for split in sample.content:
        folder = root / f"obj_{split}_data"
        (root / "images" / split).rename(folder)
        for path in (root / "labels" / split).iterdir():
            path.rename(folder / path.name)
        listed = "".join(f"data/{folder.name}/{p.name}\n" for p in folder.glob("*.[jp]*"))
        (root / f"{split}.txt").write_text(listed)
    (root / "obj.names").write_text("\n".join(sample.names))
    (root / "obj.data").write_text("classes = 3\ntrain = data/train.txt\n")


def voc_file(image: dict, objects: list[tuple[str, dict]], first: int = 1) -> str:
    """An XML file of Pascal VOC whose pixels are counted from `first`."""
    lines = ["<annotation>", f"<filename>{image['file_name']}</filename>", "<size>"]
    lines += [f"<width>{image['width']}</width><height>{image['height']}</height>", "</size>"]
    for name, x in objects:
        left, top, right, bottom = corners(x["bbox"])
        sides = {"xmin": left + first, "ymin": top + first, "xmax": right, "ymax": bottom}
        box = "".join(f"<{k}>{v:.12g}</{k}>" for k, v in sides.items())
        # The box of a part, such as a head, must not be taken for the object's.
        part = "<part><name>part</name><bndbox><xmin>3</xmin></bndbox></part>"
        lines.append(f"<object>{part}<name>{name}</name>\n<bndbox>{box}</bndbox></object>")
    return "\n".join([*lines, "</annotation>"])


def write_voc(sample: Sample, root: Path) -> None:
    """Annotations, JPEGImages, ImageSets/Main."""
    sample.copy_images(lambda _: root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, image, objects in sample.each():
        stem = Path(image["file_name"]).stem
        (root / "Annotations" / f"{stem}.xml").write_text(voc_file(image, objects))
        with (root / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
            file.write(f"{stem}\n")


def labelme_shape(name: str, x: dict, size: tuple[int, int]) -> list[dict]:
    """Shapes of an object: a rectangle, a polygon for each part, or a mask."""
    left, top, right, bottom = corners(x["bbox"])
    box = [[left, top], [right, bottom]]
    segmentation = x.get("segmentation")
    if isinstance(segmentation, dict):
        mask = decode_segmentation(segmentation, size)
        part = mask[int(top) : int(bottom), int(left) : int(right)]
        buffer = io.BytesIO()
        Image.fromarray(part.astype(np.uint8) * 255).save(buffer, "PNG")
        text = base64.b64encode(buffer.getvalue()).decode()
        box = [[left, top], [right - 1, bottom - 1]]  # the last pixel
        return [{"label": name, "shape_type": "mask", "points": box, "mask": text}]
    if not segmentation:
        return [{"label": name, "shape_type": "rectangle", "points": box[::-1]}]
    group = x["id"] if len(segmentation) > 1 else None
    return [
        {
            "label": name,
            "shape_type": "polygon",
            "points": [list(pair) for pair in zip(p[::2], p[1::2], strict=True)],
            "group_id": group,
        }
        for p in segmentation
    ]


def write_labelme(sample: Sample, root: Path) -> None:
    """A JSON file beside each image, in a folder for each split."""
    sample.copy_images(lambda split: root / split)
    for split, image, objects in sample.each():
        size = image["height"], image["width"]
        content = {
            "version": "5.5.0",
            "shapes": [shape for name, x in objects for shape in labelme_shape(name, x, size)],
            "imagePath": image["file_name"],
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        path = (root / split / image["file_name"]).with_suffix(".json")
        path.write_text(json.dumps(content))


def cvat_shape(name: str, x: dict, size: tuple[int, int]) -> str:
    """Elements of an object: a box, a polygon for each part, or a mask."""
    left, top, right, bottom = corners(x["bbox"])
    segmentation = x.get("segmentation")
    label = f"label={quoteattr(name)}"
    if isinstance(segmentation, dict):
        mask = decode_segmentation(segmentation, size)
        part = mask[int(top) : int(bottom), int(left) : int(right)].ravel()
        edges = np.flatnonzero(np.diff(part)) + 1
        counts = np.diff([0, *edges, part.size]).tolist()
        counts = [0, *counts] if part[0] else counts
        return (
            f'<mask {label} rle="{", ".join(map(str, counts))}" left="{left:.0f}" '
            f'top="{top:.0f}" width="{right - left:.0f}" height="{bottom - top:.0f}"/>'
        )
    if not segmentation:
        return f'<box {label} xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"/>'
    group = f' group_id="{x["id"] + 1}"' if len(segmentation) > 1 else ""
    texts = []
    for p in segmentation:
        points = ";".join(f"{a:.2f},{b:.2f}" for a, b in zip(p[::2], p[1::2], strict=True))
        texts.append(f'<polygon {label} points="{points}"{group}></polygon>')
    return "\n".join(texts)


def write_cvat(sample: Sample, root: Path) -> None:
    """annotations.xml of a project, images in images/SUBSET."""
    subsets = {"train": "Train", "val": "Validation", "test": "Test"}
    sample.copy_images(lambda split: root / "images" / subsets[split])
    labels = "".join(f"<label><name>{name}</name></label>" for name in sample.names)
    lines = ["<annotations>", f"<meta><project><labels>{labels}</labels></project></meta>"]
    for split, image, objects in sample.each():
        size = image["height"], image["width"]
        lines.append(
            f'<image id="{image["id"]}" name="{image["file_name"]}" subset="{subsets[split]}" '
            f'width="{size[1]}" height="{size[0]}">'
        )
        lines += [*(cvat_shape(name, x, size) for name, x in objects), "</image>"]
    (root / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]))
