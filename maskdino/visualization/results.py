"""What is known of one image, predicted or true: to be drawn, saved or converted.

Shape key: N objects, H, W pixels of the image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_utils

from maskdino.categories import Categories
from maskdino.ops.masks import MapMask, RunMask, masks_of_map
from maskdino.ops.rle import to_json
from maskdino.ops.runs import encode_map, rle_of
from maskdino.system.files import written_whole
from maskdino.visualization.drawing import MAX_LABELS, Region, color_of, draw_regions
from maskdino.visualization.images import ImageSource, load_image

TASKS = ("instance", "panoptic", "semantic")


@dataclass(frozen=True)
class ImageResult:
    """Objects, segments or classes of one image; what was not asked for is None.

    Attributes:
        name: of the image, as its file's path.
        size: (H, W) in pixels.
        categories: the classes.
        boxes: (N, 4) float32 x0, y0, x1, y1 in pixels, best object first.
        scores: (N,) float32 in [0, 1]; None for ground truth.
        class_ids: (N,) int64 class numbers.
        rles: N masks in COCO's compressed form ("counts" in bytes); None without masks.
        panoptic_ids: (H, W) int32 segment of each pixel, 0 for none.
        segments: for each segment "id", "category_id" (class number), "isthing" and, for
            predicted things, "score".
        features: (N, C) float32 what the decoder knows of each object, as its class and mask head
            read it; None where nobody asked for it.
        label_map: (H, W) uint8 or int32 class of each pixel; 255 is ignored in ground truth.
        class_scores: (K, H, W) float16 of which the label map is the best; None unless asked for.
        source: the image: its path, or (H, W, 3) uint8 RGB.
    """

    name: str
    size: tuple[int, int]
    categories: Categories
    boxes: np.ndarray | None = None
    scores: np.ndarray | None = None
    class_ids: np.ndarray | None = None
    rles: tuple[dict, ...] | None = None
    features: np.ndarray | None = None
    panoptic_ids: np.ndarray | None = None
    segments: tuple[dict, ...] | None = None
    label_map: np.ndarray | None = None
    class_scores: np.ndarray | None = None
    source: ImageSource | None = None

    def __len__(self) -> int:
        """Number of objects or, without objects, of panoptic segments."""
        return len(self.boxes) if self.boxes is not None else len(self.segments or ())

    @property
    def tasks(self) -> tuple[str, ...]:
        """Which of "instance", "panoptic" and "semantic" the result holds."""
        parts = (self.boxes, self.panoptic_ids, self.label_map)
        return tuple(t for t, part in zip(TASKS, parts, strict=True) if part is not None)

    @property
    def class_names(self) -> list[str]:
        """Name of each object's class."""
        return [self.categories.names[label] for label in self._known("class_ids")]

    @property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool, decoded at each access."""
        rles = self._known("rles")
        if not rles:
            return np.zeros((0, *self.size), bool)
        return mask_utils.decode(list(rles)).transpose(2, 0, 1).astype(bool)

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB; read again where the image is a file."""
        if self.source is None:
            raise ValueError(f"the result of {self.name} was made without its image")
        return load_image(self.source)

    def select(self, keep: np.ndarray) -> ImageResult:
        """The result with some of its objects: `keep` are indices, or (N,) bool."""
        index = np.arange(len(self._known("boxes")))[keep]
        parts: dict[str, Any] = {
            name: None if (part := getattr(self, name)) is None else part[index]
            for name in ("boxes", "scores", "class_ids", "features")
        }
        parts["rles"] = None if self.rles is None else tuple(self.rles[i] for i in index)
        return replace(self, **parts)

    def to_instances(self) -> Instances:
        """The objects as detectron2's evaluators and visualisers take them, on the CPU."""
        instances = Instances(self.size)
        instances.pred_boxes = Boxes(torch.from_numpy(self._known("boxes").copy()))
        if self.scores is not None:
            instances.scores = torch.from_numpy(self.scores.copy())
        instances.pred_classes = torch.from_numpy(self._known("class_ids").copy())
        if self.rles is not None:
            instances.pred_masks = torch.from_numpy(self.masks)
        return instances

    def to_supervision(self) -> Any:
        """The objects as `supervision.Detections`.

        Raises:
            ModuleNotFoundError: the package `supervision` is not installed.
        """
        import supervision

        return supervision.Detections(
            xyxy=self._known("boxes"),
            mask=None if self.rles is None else self.masks,
            confidence=self.scores,
            class_id=self._known("class_ids"),
            data={"class_name": np.array(self.class_names)},
        )

    def to_coco(self, image_id: int | str | None = None, task: str | None = None) -> list[dict]:
        """Objects, segments or classes as a list in the form of COCO's results.

        Args:
            image_id: the image's number in the dataset; None: its name.
            task: one of `tasks`; None for the first: objects, which alone have scores that COCO's
                evaluation ranks, if there are, else panoptic segments, else classes.

        Returns:
            "image_id", "category_id" (the dataset's), "category_name", "bbox" (x, y, w, h) and,
            where known, "score" and "segmentation"; plain values that JSON can hold.
        """
        image_id = self.name if image_id is None else image_id
        task = self.tasks[0] if task is None else task
        return [{"image_id": image_id, **entry} for entry in self._coco_entries(task)]

    def to_dict(self) -> dict:
        """All of the result as plain values that JSON can hold."""
        return self._head() | {task: list(self._coco_entries(task)) for task in self.tasks}

    def _head(self) -> dict:
        return {"image": self.name, "height": self.size[0], "width": self.size[1]}

    def draw(
        self,
        task: str | None = None,
        *,
        scale: int = 1,
        show_boxes: bool | None = None,
        max_labels: int = MAX_LABELS,
        colors: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Draws on the image.

        Args:
            task: one of `tasks`; None for panoptic segments if there are, else objects, else
                classes.
            scale: whole factor by which the image is enlarged first.
            show_boxes: of objects; None: where they carry a label, or there is no mask.
            max_labels: with more objects or segments than this, names are left out.
            colors: a number for each object or segment; things with equal numbers get equal
                colors. None: all differ.

        Returns:
            (scale * H, scale * W, 3) uint8 RGB.
        """
        task = task or next(t for t in ("panoptic", "instance", "semantic") if t in self.tasks)
        return draw_regions(
            self.image,
            self.regions(task, colors),
            scale=scale,
            show_boxes=show_boxes,
            max_labels=max_labels,
        )

    def save(self, path: str | os.PathLike, **drawing: Any) -> Path:
        """Writes the drawn image, or with the suffix .json all of `to_dict`.

        Args:
            path: its suffix names the format; folders are made.
            drawing: arguments of `draw`.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".json":
            with written_whole(path, sync=False) as temporary, temporary.open("w") as file:
                file.writelines(self._json())
            return path
        formats = Image.registered_extensions()
        if path.suffix.lower() not in formats:
            raise ValueError(f"{path}: no format of images has the suffix {path.suffix!r}")
        image = Image.fromarray(self.draw(**drawing))
        with written_whole(path, sync=False) as temporary:
            image.save(temporary, formats[path.suffix.lower()], quality=95)  # of JPEG
        return path

    def _json(self) -> Iterator[str]:
        """`to_dict` as text, in parts: that of large maps is long."""
        yield json.dumps(self._head())[:-1]
        for task in self.tasks:
            yield f', "{task}": ['
            for i, entry in enumerate(self._coco_entries(task)):
                yield (", " if i else "") + json.dumps(entry)
            yield "]"
        yield "}"

    def regions(self, task: str, colors: Sequence[int] | None = None) -> list[Region]:
        """What `draw` draws."""
        self._check(task)
        if task == "instance":
            return [self._object_region(i, colors) for i in range(len(self))]
        labels = self._map(task)
        masks = masks_of_map(labels)
        regions = []
        for i, (number, label, score) in enumerate(self._numbers(task, masks)):
            thing = task == "panoptic" and self.categories.is_thing[label]
            # Far from the colors of other classes, and of other objects.
            own_color = i if colors is None else colors[i]
            color = color_of(len(self.categories) + own_color if thing else label)
            mask = masks.get(number) or MapMask(0, 0, 0, 0, 0, labels, number)
            regions.append(Region(color, _label(self.categories.names[label], score), mask=mask))
        return regions

    def segment_rles(self) -> list[dict]:
        """The mask of each panoptic segment, in COCO's compressed form."""
        return [rle for *_, rle in self._map_rles("panoptic")]

    def _object_region(self, i: int, colors: Sequence[int] | None) -> Region:
        label = int(self._known("class_ids")[i])
        thing = self.categories.is_thing[label]
        own_color = i if thing else label
        color = color_of(own_color if colors is None else colors[i])
        name = self.categories.names[label] if len(self.categories) > 1 else ""
        score = None if self.scores is None else float(self.scores[i])
        mask = None if self.rles is None else RunMask.of(self.rles[i])
        box = tuple(self._known("boxes")[i].tolist()) if thing or mask is None else None
        return Region(color, _label(name, score), box, mask)

    def _map(self, task: str) -> np.ndarray:
        return self._known("panoptic_ids" if task == "panoptic" else "label_map")

    def _numbers(self, task: str, seen: Iterable[int]) -> list[tuple[int, int, float | None]]:
        """Number in the map, class and score of each segment, or of each class that is `seen`."""
        if task == "panoptic":
            segments = self._known("segments")
            return [(s["id"], s["category_id"], s.get("score")) for s in segments]
        return [(n, n, None) for n in seen if n < len(self.categories)]  # others are ignored

    def _map_rles(self, task: str) -> Iterator[tuple[int, float | None, dict]]:
        """Class number, score and mask of each panoptic segment, or each class of the label map."""
        rles = encode_map(self._map(task))
        nowhere = rle_of(np.zeros((0, 2), np.int64), self.size)
        for number, label, score in self._numbers(task, rles):
            yield label, score, rles.get(number, nowhere)

    def _check(self, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"the result of {self.name} holds {self.tasks}, not {task!r}")

    def _coco_entries(self, task: str) -> Iterator[dict]:
        self._check(task)
        if task == "instance":
            boxes = self._known("boxes").tolist()
            for i, (label, (x0, y0, x1, y1)) in enumerate(
                zip(self._known("class_ids"), boxes, strict=True)
            ):
                entry = self._coco_entry(int(label), [x0, y0, x1 - x0, y1 - y0])
                if self.scores is not None:
                    entry["score"] = float(self.scores[i])
                if self.rles is not None:
                    entry["segmentation"] = to_json(self.rles[i])
                yield entry
            return
        for label, score, rle in self._map_rles(task):
            entry = self._coco_entry(label, [float(value) for value in mask_utils.toBbox(rle)])
            entry |= {} if score is None else {"score": float(score)}
            yield entry | {"area": int(mask_utils.area(rle)), "segmentation": to_json(rle)}

    def _coco_entry(self, label: int, box: list[float]) -> dict:
        names, ids = self.categories.names, self.categories.dataset_ids
        return {"category_id": ids[label], "category_name": names[label], "bbox": box}

    def _known(self, field: str) -> Any:
        """A field that the caller needs; ValueError if the result has none."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"the result of {self.name} has no {field}; it holds {self.tasks}")
        return value


def _label(name: str, score: float | None) -> str:
    return name if score is None else f"{name} {100 * score:.0f}".strip()
