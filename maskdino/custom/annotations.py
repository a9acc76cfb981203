"""Annotations in COCO's lists, as people bring them: objects, or what label images show.

A label image gives each pixel of its image a segment (task "panoptic") or a class ("semantic"). Its
segments, or the classes that it shows, are the annotations of its image, so that counting,
splitting and checking are the same for all tasks.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from maskdino.custom.maps import MAP, Maps
from maskdino.data import DataError
from maskdino.data.annotation_checks import LISTS, format_problem
from maskdino.data.reading import read_json
from maskdino.ops.rle import box_and_area
from maskdino.system.files import write_text


@dataclass(frozen=True)
class Annotations:
    """The content of one annotation file and the folder of its images."""

    json_file: Path  # where it came from
    image_root: Path  # folder that the images' file names are relative to
    # images, annotations, categories: COCO's lists; nothing is promised about their entries
    # before `maskdino.custom.checks.check` found them in order.
    images: list[dict] = field(repr=False)
    annotations: list[dict] = field(repr=False)
    categories: list[dict]
    # Where the label images are; None: there are none, but objects of their own.
    maps: Maps | None = None

    @property
    def task(self) -> str:
        """What they teach: "instance", "panoptic" or "semantic"."""
        return "instance" if self.maps is None else self.maps.task

    def without(self, images: Collection[int], annotations: Collection[int]) -> Annotations:
        """Leaves out images, with their annotations, and annotations, by position in their list."""
        ids = (self.images[index].get("id") for index in images)
        kept_images = [x for i, x in enumerate(self.images) if i not in images]
        # Of one image that is there twice, the annotations stay with the other entry.
        gone = {x for x in ids if isinstance(x, Hashable)} - {x["id"] for x in kept_images}
        kept = (x for i, x in enumerate(self.annotations) if i not in annotations)
        return replace(
            self,
            images=kept_images,
            annotations=[x for x in kept if x.get("image_id") not in gone],
        )

    def only(self, image_ids: Collection[Hashable]) -> Annotations:
        """The part that belongs to some of the images."""
        return replace(
            self,
            images=[x for x in self.images if x["id"] in image_ids],
            annotations=[x for x in self.annotations if x["image_id"] in image_ids],
        )

    def path_of(self, image: dict) -> Path:
        """Where the file of an image is."""
        return self.image_root / image["file_name"]

    def objects(self) -> list[dict]:
        """Annotations but crowd regions."""
        return [a for a in self.annotations if not a.get("iscrowd")]


@dataclass(frozen=True)
class Summary:
    """What a plan needs to know of annotations."""

    images: int  # their number
    # Number of objects by class name, in the order of the class indices; of segments, or of
    # images that show the class, where there are label images.
    counts: dict[str, int]
    has_masks: bool  # whether any object has a mask
    longest_side: int  # median of the images' longer sides, in pixels
    most_objects: int  # in one image
    many_objects: int  # in an image; in 19 of 20 there are at most so many
    task: str = "instance"  # "instance", "panoptic" or "semantic"
    stuff: tuple[str, ...] = ()  # names of the classes that are no things, of panoptic data
    # Median root of the areas of the objects' boxes, as a share of the longer side of their images;
    # 0: unknown.
    object_side: float = 0.0

    @property
    def objects(self) -> int:
        """Objects of all classes."""
        return sum(self.counts.values())


def read_annotations(json_file: str | Path, image_root: str | Path) -> Annotations:
    """Reads an annotation file; looks no deeper than its three lists, and at no image.

    Raises:
        DataError: the file is missing, or not COCO's; then the message says what it looks like.
    """
    json_file, image_root = Path(json_file), Path(image_root)
    content = read_json(str(json_file), encoding="utf-8-sig")
    problem = format_problem(content)
    if problem:
        raise DataError(f"{json_file} is not in COCO's format: {problem}")
    return Annotations(json_file, image_root, *(content[name] for name in LISTS))


def summarize(data: Annotations) -> Summary:
    """Counts what is in annotations that were found in order."""
    objects = data.objects()
    by_category = Counter(a["category_id"] for a in objects)
    by_image = Counter(a["image_id"] for a in objects)
    sorted_numbers = sorted(by_image[image["id"]] for image in data.images)
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in data.images}
    sides = []
    for annotation in objects if data.task == "instance" else ():
        size, box = sizes[annotation["image_id"]], annotation.get("bbox")
        if not box and (segmentation := annotation.get("segmentation")):
            box = box_and_area(segmentation, size)[0]
        if box:
            sides.append(math.sqrt(box[2] * box[3]) / max(size))
    return Summary(
        images=len(data.images),
        counts={str(c["name"]): by_category[c["id"]] for c in ordered_categories(data)},
        has_masks=data.maps is not None or any(a.get("segmentation") for a in objects),
        longest_side=round(median(map(max, sizes.values()))),
        most_objects=sorted_numbers[-1],
        many_objects=sorted_numbers[math.ceil(0.95 * len(sorted_numbers)) - 1],
        task=data.task,
        stuff=tuple(str(c["name"]) for c in ordered_categories(data) if not c.get("isthing", True)),
        object_side=median(sides) if sides else 0.0,
    )


def ordered_categories(data: Annotations) -> list[dict]:
    """The categories in the order of their class indices."""
    numbers = _integer_ids(data.categories)
    return sorted(data.categories, key=lambda category: numbers[category["id"]])


def write_annotations(data: Annotations, path: Path) -> list[dict]:
    """Writes annotations that were found in order so that every reader agrees on them.

    Image and category ids stay if they are integers, and are numbered from 1 otherwise.
    Annotations are numbered from 1: pycocotools takes an object of id 0 for none. Boxes and areas
    that are missing are filled in from the masks; fields that nobody reads are left out. Of label
    images, the files are named; those of the task "panoptic" are in COCO's panoptic format.
    """
    image_ids = _integer_ids(data.images)
    category_ids = _integer_ids(data.categories)
    sizes = {x["id"]: (int(x["height"]), int(x["width"])) for x in data.images}
    images = [
        {
            "id": image_ids[x["id"]],
            "file_name": x["file_name"],
            "height": sizes[x["id"]][0],
            "width": sizes[x["id"]][1],
            **({} if data.maps is None else {MAP: x[MAP]}),
        }
        for x in data.images
    ]
    annotations = []
    for number, annotation in enumerate(data.annotations, start=1):
        entry = {
            "id": number,
            "image_id": image_ids[annotation["image_id"]],
            "category_id": category_ids[annotation["category_id"]],
            "iscrowd": int(bool(annotation.get("iscrowd"))),
        }
        if data.maps is None:
            entry |= _geometry(annotation, sizes[annotation["image_id"]])
        else:
            entry |= {key: annotation[key] for key in ("segment", "area") if key in annotation}
        annotations.append(entry)
    categories = [
        {"id": category_ids[x["id"]], "name": str(x["name"])}
        | ({"isthing": int(x["isthing"])} if data.task == "panoptic" else {})
        for x in ordered_categories(data)
    ]
    content: dict[str, Any] = {
        "info": {"description": f"from {data.json_file.name}"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    content = _with_segments(content) if data.task == "panoptic" else content
    write_text(path, json.dumps(content))
    return categories


def _with_segments(content: dict[str, Any]) -> dict[str, Any]:
    """The same in COCO's panoptic format."""
    segments = defaultdict(list)
    for x in content["annotations"]:
        info = {key: x[key] for key in ("category_id", "iscrowd", "area")}
        segments[x["image_id"]].append({"id": x["segment"], **info})
    annotations = [
        {"image_id": x["id"], "file_name": x[MAP], "segments_info": segments[x["id"]]}
        for x in content["images"]
    ]
    return {**content, "annotations": annotations}


def _integer_ids(entries: list[dict]) -> dict[Hashable, int]:
    ids = [entry["id"] for entry in entries]
    if all(isinstance(x, int) for x in ids):
        return {x: x for x in ids}
    return {x: number for number, x in enumerate(ids, start=1)}


def _geometry(annotation: dict, size: tuple[int, int]) -> dict:
    """Box and area, and the mask if there is one."""
    segmentation: Any = annotation.get("segmentation")
    box: Any = annotation.get("bbox")
    area = annotation.get("area")
    result = {}
    if segmentation:
        result["segmentation"] = segmentation
        if not box or area is None:
            own_box, own_area = box_and_area(segmentation, size)
            box, area = box or own_box, own_area if area is None else area
    return {**result, "bbox": box, "area": box[2] * box[3] if area is None else area}
