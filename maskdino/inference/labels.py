"""Results of many images as one dataset in COCO's form, to be corrected and trained on.

Annotation tools read it, and `maskdino train-custom` takes it as it is.

Shape key: h, w pixels of a mask's bounding box; V vertices of an outline.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from maskdino.categories import Categories
from maskdino.checkpoint.pretrained import categories_to_list
from maskdino.ops.rle import to_json
from maskdino.ops.runs import crop_mask
from maskdino.system.files import write_text
from maskdino.system.words import counted
from maskdino.visualization.results import ImageResult

STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # x, y: right, down, left, up


class ClassThresholds:
    """Least scores of objects of some classes."""

    def __init__(self, text: str) -> None:
        """From "name=0.6,other name=0.3".

        Raises:
            ValueError: the text has another form, or a score is not in [0, 1].
        """
        self.scores: dict[str, float] = {}
        entry = re.compile(r"(.+?)=([0-9.eE+-]+)(?:,|$)")
        place = 0
        while place < len(text):
            found = entry.match(text, place)
            try:
                score = float(found[2]) if found else float("nan")
            except ValueError:
                score = float("nan")
            if found is None or not 0 <= score <= 1:
                raise ValueError(
                    f"thresholds {text!r}: they must be name=score,... with scores in [0, 1]"
                )
            self.scores[found[1].strip()] = score
            place = found.end()

    def check(self, categories: Categories) -> None:
        """Refuses classes that a model does not know.

        Raises:
            ValueError: names them.
        """
        unknown = sorted(set(self.scores) - set(categories.names))
        if unknown:
            raise ValueError(
                f"there is no class {', '.join(unknown)}; the classes are "
                f"{', '.join(categories.names)}"
            )

    def least(self, otherwise: float) -> float:
        """The lowest threshold of all classes; `otherwise` is that of the classes not named."""
        return min([otherwise, *self.scores.values()])

    def select(self, result: ImageResult, otherwise: float) -> ImageResult:
        """The result without objects below the threshold of their class."""
        if not self.scores or result.class_ids is None or result.scores is None:
            return result
        least = np.array([self.scores.get(name, otherwise) for name in result.categories.names])
        return result.select(result.scores >= least[result.class_ids])


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder below which all of them are."""
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    return Path(os.path.commonpath(folders)) if folders else Path()


def name_below(root: Path, path: Path) -> Path:
    """The path relative to the `common_folder`, without the ".." that it may have."""
    return Path(os.path.abspath(path)).relative_to(root)


class CocoLabels:
    """A dataset in COCO's form, image by image.

    Attributes:
        root: folder that the images' file names are relative to.
        left_out: objects that have no pixel.
    """

    def __init__(
        self, categories: Categories, images: Sequence[Path], *, tolerance: float | None = None
    ) -> None:
        """An empty dataset.

        Args:
            categories: its classes.
            images: all paths that may come.
            tolerance: None: masks are run lengths; else polygons whose edges are at most so many
                pixels away from the masks' edges.
        """
        if tolerance is not None and not 0 <= tolerance < 1e4:
            raise ValueError(f"polygons within {tolerance} pixels: it must be 0 or more")
        self.categories, self.tolerance = categories, tolerance
        self.root = common_folder(images)
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.left_out = 0

    def add(self, path: Path, result: ImageResult) -> None:
        """Adds an image and its objects."""
        name = name_below(self.root, path).as_posix()
        height, width = result.size
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": name, "height": height, "width": width})
        for i, entry in enumerate(result.to_coco(number, "instance")):
            geometry = self._geometry(
                entry["bbox"], None if result.rles is None else result.rles[i]
            )
            if geometry is None:
                self.left_out += 1
                continue
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": number,
                    "category_id": entry["category_id"],
                    "iscrowd": 0,
                    "score": round(entry["score"], 4),
                    **geometry,
                }
            )

    def _geometry(self, box: list[float], rle: dict | None) -> dict | None:
        """Box, area and mask; the box is the mask's where there is one. None: there is nothing."""
        if rle is None:
            if min(box[2:]) <= 0:
                return None
            return {"bbox": [round(x, 2) for x in box], "area": round(box[2] * box[3], 2)}
        area = int(mask_utils.area(rle))
        if not area:
            return None
        shape = to_json(rle) if self.tolerance is None else polygons_of(rle, self.tolerance)
        return {"bbox": mask_utils.toBbox(rle).tolist(), "area": area, "segmentation": shape}

    def __str__(self) -> str:
        objects, images = len(self.annotations), len(self.images)
        return f"{counted(objects, 'object')} of {counted(images, 'image')}"

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        lists = {"images": self.images, "annotations": self.annotations}
        write_dataset(path, self.categories, "each annotation has a score", lists)


def write_dataset(
    path: Path,
    categories: Categories,
    note: str,
    lists: dict[str, list[dict[str, Any]]],
    *,
    told_apart: bool = False,
) -> None:
    """Writes a dataset in COCO's form, whole or not at all.

    Args:
        path: of the file; its folder is made.
        categories: its classes.
        note: what whoever reads the file has to know.
        lists: all others, such as "images" and "annotations".
        told_apart: classes say whether they are things.
    """
    keys = ("id", "name", "isthing") if told_apart else ("id", "name")
    content = {
        "info": {"description": f"predicted by Mask DINO; {note}"},
        **lists,
        "categories": [
            {key: entry[key] for key in keys} for entry in categories_to_list(categories)
        ],
    }
    write_text(path, json.dumps(content))


def polygons_of(rle: dict, tolerance: float) -> list[list[float]]:
    """A mask as COCO's polygons [[x, y, x, y, ...], ...].

    Polygons follow the edges of pixels, so that with a tolerance of 0 they are the mask. A hole is
    part of the outline around it, to which a slit without width leads: polygons of a list are all
    foreground.

    Args:
        rle: compressed, not empty.
        tolerance: pixels that an edge may be off; holes that fit into it are closed.
    """
    mask, (top, left) = crop_mask(rle)
    outlines = list(_outlines(mask))
    outer = [x for x in outlines if _area(x) > 0]
    rings = [_simplified(x, tolerance) for x in outer]
    for hole in outlines:
        if _area(hole) > 0 or -_area(hole) <= tolerance**2:
            continue
        inside = tuple(float(x) for x in hole[0])
        around = [i for i, x in enumerate(outer) if cv2.pointPolygonTest(x, inside, False) >= 0]
        i = min(around, key=lambda i: _area(outer[i]))  # outlines may stand inside one another
        rings[i] = _with_hole(rings[i], _simplified(hole, tolerance))
    return [(ring + (left, top)).astype(float).ravel().tolist() for ring in rings]


def _outlines(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Closed outlines (V, 2) int32 x, y of a mask (h, w) bool, along the edges of its pixels.

    The foreground lies to the right: outer outlines have a positive area, those of holes a
    negative one. Pixels that meet at a corner alone are apart.
    """
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    sides = (  # of each pixel, where the outline goes, and from which of its corners
        (inner & ~padded[:-2, 1:-1], (0, 0)),
        (inner & ~padded[1:-1, 2:], (1, 0)),
        (inner & ~padded[2:, 1:-1], (1, 1)),
        (inner & ~padded[1:-1, :-2], (0, 1)),
    )
    leaving: dict[tuple[int, int], list[int]] = {}  # directions of the outlines from a corner on
    for direction, (side, corner) in enumerate(sides):
        for y, x in np.argwhere(side).tolist():
            leaving.setdefault((x + corner[0], y + corner[1]), []).append(direction)
    while leaving:
        start = place = next(iter(leaving))
        heading, corners = -1, list[tuple[int, int]]()
        while not corners or place != start:
            choices = leaving[place]
            turned = (heading + 1) % 4  # to the right, around the same pixel
            direction = turned if turned in choices else choices[0]
            choices.remove(direction)
            if not choices:
                del leaving[place]
            if direction != heading:
                corners.append(place)
            heading, (right, down) = direction, STEPS[direction]
            place = place[0] + right, place[1] + down
        yield np.array(corners, np.int32)


def _area(ring: np.ndarray) -> float:
    """Signed area of a ring (V, 2), positive where it turns right."""
    x, y = ring.astype(float).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A ring (V, 2) with fewer vertices; as it is where less than a triangle would stay."""
    if not tolerance:
        return ring
    simple = cv2.approxPolyDP(ring, tolerance, True)[:, 0]
    return simple if len(simple) >= 3 else ring


def _with_hole(ring: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """One ring of two, joined where their vertices are nearest."""
    distances = ((ring[:, None] - hole[None]) ** 2).sum(-1)
    i, j = np.unravel_index(distances.argmin(), distances.shape)
    around = np.roll(hole, -j, axis=0)
    return np.concatenate([ring[: i + 1], around, around[:1], ring[i:]])
