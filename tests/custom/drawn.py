"""A small dataset as somebody would bring it: polygons, and category ids of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.data.synthetic import box_xywh, make_scenes

CATEGORIES = {"person": 70, "car": 3}


@dataclass
class Drawn:
    """A dataset in a folder; change `content`, then write it.

    Attributes:
        json_file: the annotations.
        images: folder of the images.
        content: of the annotation file.
    """

    json_file: Path
    images: Path
    content: dict

    def write(self) -> Drawn:
        """Writes the annotations."""
        self.json_file.write_text(json.dumps(self.content))
        return self


def write_drawn(folder: Path, number: int = 6, *, masks: bool = True, seed: int = 0) -> Drawn:
    """Writes `number` images of 64 x 48 pixels with persons and cars."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for image_id, scene in enumerate(make_scenes(number, (48, 64), 4, seed)):
        name = f"scene_{image_id}.png"
        Image.fromarray(scene.image).save(folder / "images" / name)
        height, width = scene.size
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for shape, mask in scene.visible():
            if not shape.is_thing or mask.sum() < 40:
                continue
            annotation = {
                "id": len(annotations),  # from 0, as many tools do
                "image_id": image_id,
                "category_id": CATEGORIES[shape.name],
                "bbox": box_xywh(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
            }
            if masks:
                annotation["segmentation"] = [shape.polygon.ravel().tolist()]
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return Drawn(folder / "annotations.json", folder / "images", content).write()
