"""What is known of a video's objects: drawn with their identities, and written as files.

- `IdentityFile`: JSON, frame by frame, with bounded memory.
- `VideoLabels`: one dataset of videos in the form of YouTube-VIS, which extends COCO's to videos.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from pycocotools import mask as mask_utils

from maskdino.categories import Categories
from maskdino.inference.labels import write_dataset
from maskdino.inference.tracking import CERTAIN, Tracker
from maskdino.ops.rle import to_json
from maskdino.ops.runs import encode_at
from maskdino.visualization.drawing import Region, color_of, draw_regions
from maskdino.visualization.results import ImageResult

WEAK = 0.4  # share of the threshold from which objects may continue a track


@dataclass(frozen=True)
class Seen:
    """An object in a frame.

    Attributes:
        number: its identity; 0: none is known.
        label: class number.
        score: in [0, 1], or None.
        box: x0, y0, x1, y1 in pixels.
        rle: mask in COCO's compressed form, or None.
    """

    number: int
    label: int
    score: float | None
    box: tuple[float, float, float, float]
    rle: dict | None

    def to_json(self, categories: Categories) -> dict[str, Any]:
        """As plain values; the class is that of the dataset."""
        x0, y0, x1, y1 = self.box
        entry: dict[str, Any] = {
            "id": self.number,
            "category_id": categories.dataset_ids[self.label],
            "category_name": categories.names[self.label],
            "bbox": [round(x, 2) for x in (x0, y0, x1 - x0, y1 - y0)],
        }
        if self.score is not None:
            entry["score"] = round(self.score, 4)
        if self.rle is not None:
            entry["segmentation"] = to_json(self.rle)
        return entry


def follow(
    result: ImageResult, tracker: Tracker, seconds: float, *, named: bool
) -> tuple[list[Seen], list[Region]]:
    """Finds the identities of a frame's objects, or things among its panoptic segments.

    Args:
        result: of the frame.
        tracker: that saw the frames before.
        seconds: when the frame comes.
        named: labels tell identities.

    Returns:
        The objects that have one, and what to draw, in colors that stay an object's.
    """
    regions = result.regions("panoptic" if result.boxes is None else "instance")
    things = _things(result, regions)
    scores, rles = [x.score for x in things.values()], [x.rle for x in things.values()]
    numbers = tracker.update(
        np.array([x.box for x in things.values()], np.float64).reshape(-1, 4),
        np.array([x.label for x in things.values()], np.int64),
        None if None in scores else np.array(scores, np.float64),
        rles=None if None in rles else rles,  # type: ignore[arg-type]
        image=result.image,
        size=result.size,
        seconds=seconds,
    )
    seen, drawn = [], {i: region for i, region in enumerate(regions) if i not in things}
    for (i, thing), number in zip(things.items(), numbers, strict=True):
        if number:
            seen.append(replace(thing, number=number))
            label = f"#{number} {regions[i].label}" if named else regions[i].label
            drawn[i] = replace(regions[i], color=color_of(number), label=label)
    return seen, [drawn[i] for i in sorted(drawn)]


def _things(result: ImageResult, regions: Sequence[Region]) -> dict[int, Seen]:
    """Objects, or things among the segments, by the place of their region; without identities."""
    found = {}
    if result.boxes is not None and result.class_ids is not None:
        scores = [None] * len(result) if result.scores is None else result.scores.tolist()
        for i, (label, box) in enumerate(zip(result.class_ids, result.boxes, strict=True)):
            rle = None if result.rles is None else result.rles[i]
            found[i] = Seen(0, int(label), scores[i], tuple(box.tolist()), rle)
        return found
    for i, (segment, region) in enumerate(zip(result.segments or (), regions, strict=True)):
        label, mask = int(segment["category_id"]), region.mask
        if result.categories.is_thing[label] and mask is not None:  # all segments have one
            box = float(mask.left), float(mask.top), float(mask.right), float(mask.bottom)
            pixels = mask.columns(mask.left, mask.right)
            rle = encode_at(pixels, (mask.top, mask.left), result.size)
            found[i] = Seen(0, label, segment.get("score"), box, rle)
    return found


def draw_followed(
    result: ImageResult, tracker: Tracker, seconds: float, *, named: bool
) -> tuple[list[Seen], np.ndarray]:
    """The objects of a frame, and its drawing (H, W, 3); see `follow`. Maps have no objects."""
    if result.label_map is not None:
        return [], result.draw()
    seen, regions = follow(result, tracker, seconds, named=named)
    return seen, draw_regions(result.image, regions)


def named_counts(tracker: Tracker, categories: Categories) -> dict[str, int]:
    """How many objects of each class there were, the most first; see `Tracker.counts`."""
    return {categories.names[label]: count for label, count in tracker.counts().most_common()}


class IdentityFile:
    """A JSON file of a video: "frames", each with its "objects", then "identities" and "counts".

    A frame is one line, so that hours of video need no memory. The file gets its name when it is
    complete.
    """

    def __init__(self, path: Path, name: str, categories: Categories) -> None:
        """Starts a file; nothing is written before the first frame.

        Args:
            path: of the file.
            name: of the video.
            categories: the classes.
        """
        self.path, self._name, self._categories = path, name, categories
        self._file: IO[str] | None = None
        self._part = path.with_name(f"{path.name}.part")

    def write(
        self, frame: int, seconds: float, size: tuple[int, int], objects: Sequence[Seen]
    ) -> None:
        """Appends a frame, the number of which is its place in the video, from 0 on."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "w", encoding="utf-8")  # noqa: SIM115 - closed below
            head = {"video": self._name, "height": size[0], "width": size[1]}
            self._file.write(json.dumps(head)[:-1] + ', "frames": [\n')
        else:
            self._file.write(",\n")
        entries = [x.to_json(self._categories) for x in objects]
        entry = {"frame": frame, "seconds": round(seconds, 4), "objects": entries}
        self._file.write(json.dumps(entry))

    def close(self, tracker: Tracker) -> None:
        """Completes the file; without a frame there is none."""
        if self._file is None:
            return
        categories = self._categories
        identities = [
            {
                "id": x.number,
                "category_id": categories.dataset_ids[x.label],
                "category_name": categories.names[x.label],
                "first_seconds": round(x.first, 3),
                "last_seconds": round(x.last, 3),
                "frames": x.sightings,
                "score": round(x.score, 4),
            }
            for x in tracker.identities.values()
        ]
        tail = {
            "identities": identities,
            "counts": named_counts(tracker, categories),
            "counted_from_frames": CERTAIN,
        }
        self._file.write("\n], " + json.dumps(tail)[1:] + "\n")
        self._file.close()
        self._file = None
        os.replace(self._part, self.path)


class VideoLabels:
    """Videos as one dataset in the form of YouTube-VIS: each annotation is one object's masks."""

    def __init__(self, categories: Categories) -> None:
        self.categories = categories
        self.videos: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._open: dict[int, dict[int, Seen]] = {}  # of the present video, by identity and frame
        self._files: list[str] = []

    def add_frame(self, name: str, frame: int, objects: Sequence[Seen]) -> None:
        """Adds a frame of the present video.

        Args:
            name: of the video, without suffix.
            frame: place of the frame in the video, from 0 on.
            objects: that are in it.
        """
        for x in objects:
            self._open.setdefault(x.number, {})[len(self._files)] = x
        self._files.append(f"{name}/{frame:05d}.jpg")

    def end_video(self, size: tuple[int, int]) -> None:
        """Ends the present video, of frames (H, W); without a frame there is none."""
        length, video = len(self._files), len(self.videos) + 1
        if length:
            height, width = size
            shape = {"height": height, "width": width, "length": length}
            self.videos.append({"id": video, "file_names": self._files, **shape})
            for seen in self._open.values():
                entry = {"id": len(self.annotations) + 1, "video_id": video, "iscrowd": 0, **shape}
                self.annotations.append(entry | self._track(seen, length))
        self._open, self._files = {}, []

    def _track(self, seen: dict[int, Seen], length: int) -> dict[str, Any]:
        first = next(iter(seen.values()))
        boxes: list[list[float] | None] = [None] * length
        areas: list[float | None] = [None] * length
        masks: list[dict | None] = [None] * length
        for i, x in seen.items():
            x0, y0, x1, y1 = x.box
            boxes[i] = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            areas[i] = round((x1 - x0) * (y1 - y0), 2)
            if x.rle is not None:
                masks[i], areas[i] = to_json(x.rle), int(mask_utils.area(x.rle))
        scores = [x.score for x in seen.values() if x.score is not None]
        return {
            "category_id": self.categories.dataset_ids[first.label],
            "segmentations": masks,
            "bboxes": boxes,
            "areas": areas,
            **({"score": round(sum(scores) / len(scores), 4)} if scores else {}),
        }

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        lists = {"videos": self.videos, "annotations": self.annotations}
        write_dataset(path, self.categories, "file_names hold places of frames", lists)
