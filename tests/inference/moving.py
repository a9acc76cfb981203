"""Drawn scenes of moving shapes, in which some hide others, and who is who is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from maskdino.categories import Categories
from maskdino.inference.tracking import Tracker
from maskdino.ops.rle import encode_mask
from maskdino.visualization.results import ImageResult

SIZE = (120, 240)
PILLAR = (80, 80, 80)
RATE = 25
CATEGORIES = Categories(("ball", "box"), (True, True), (5, 9))


@dataclass
class Mover:
    """A shape: disk or rectangle, at a place (x, y) in each frame.

    Attributes:
        color: by which it is found in an image again.
        path: x, y of its center, frame by frame.
        size: width, height.
        disk: or rectangle.
    """

    color: tuple[int, int, int]
    path: list[tuple[float, float]]
    size: tuple[int, int] = (24, 32)
    disk: bool = False

    def mask(self, frame: int) -> np.ndarray:
        rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
        x, y = self.path[frame]
        across, down = np.abs(columns - x) / self.size[0] * 2, np.abs(rows - y) / self.size[1] * 2
        return across**2 + down**2 <= 1 if self.disk else (across <= 1) & (down <= 1)


def line(start: tuple[float, float], step: tuple[float, float], frames: int) -> list:
    """A path at a constant speed, in pixels of a frame."""
    return [(start[0] + step[0] * i, start[1] + step[1] * i) for i in range(frames)]


@dataclass
class Scene:
    """Movers, the later in front, before a background and behind a pillar.

    Attributes:
        pillar: columns that it hides, from and to.
    """

    movers: list[Mover]
    pillar: tuple[int, int] = (0, 0)
    owners: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        for frame in range(len(self.movers[0].path)):
            owner = np.zeros(SIZE, np.int64)
            for number, mover in enumerate(self.movers, start=1):
                owner[mover.mask(frame)] = number
            owner[:, slice(*self.pillar)] = 0
            self.owners.append(owner)

    def images(self) -> Iterator[np.ndarray]:
        """(H, W, 3) of each frame."""
        noise = np.random.default_rng(0)
        for owner in self.owners:
            image = noise.integers(150, 170, (*SIZE, 3)).astype(np.uint8)
            image[:, slice(*self.pillar)] = PILLAR
            for number, mover in enumerate(self.movers, start=1):
                image[owner == number] = mover.color
            yield image

    def seen(self, frame: int, least: int = 30) -> list[tuple[int, np.ndarray]]:
        """Numbers and masks of movers of which enough pixels are seen."""
        masks = [(i, self.owners[frame] == i) for i in range(1, len(self.movers) + 1)]
        return [(i, mask) for i, mask in masks if mask.sum() >= least]


def boxes_of(masks: Iterable[np.ndarray]) -> np.ndarray:
    """(N, 4) boxes around masks."""
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return np.array(boxes, np.float64).reshape(-1, 4)


def track(
    scene: Scene,
    *,
    masks: bool = True,
    colors: bool = True,
    every: int = 1,
    scores: dict[tuple[int, int], float] | None = None,
) -> tuple[dict[int, list[int]], Tracker]:
    """Follows what is seen; the identities that each mover had, in order of their first use.

    Args:
        scene: the scene.
        masks: or boxes alone.
        colors: whether the tracker sees the images.
        every: of so many frames, one is seen.
        scores: of a frame and mover; 0.9 where it is left out.
    """
    tracker = Tracker()
    had: dict[int, list[int]] = {i: [] for i in range(1, len(scene.movers) + 1)}
    for frame, image in enumerate(scene.images()):
        if frame % every:
            continue
        seen = scene.seen(frame)
        numbers = tracker.update(
            boxes_of(mask for _, mask in seen),
            np.zeros(len(seen), np.int64),
            np.array([(scores or {}).get((frame, i), 0.9) for i, _ in seen]),
            rles=[encode_mask(mask) for _, mask in seen] if masks else None,
            image=image if colors else None,
            size=SIZE,
            seconds=frame / RATE,
        )
        for (mover, _), number in zip(seen, numbers, strict=True):
            if number not in had[mover]:
                had[mover].append(number)
    return had, tracker


class Oracle:
    """Stands in for a predictor: finds shapes by their colors."""

    categories = CATEGORIES

    def __init__(self, *, panoptic: bool = False, slices: tuple[int, float] | None = None) -> None:
        self._panoptic, self.options = panoptic, SimpleNamespace(batch_size=2, slices=slices)

    def stream(self, images: Iterable[np.ndarray]) -> Iterator[ImageResult]:
        for image in images:
            masks, labels = [], []
            for label, color in enumerate(((230, 40, 40), (40, 40, 230))):
                mask = np.abs(image.astype(int) - color).max(2) < 60
                if mask.sum() >= 30:
                    masks.append(mask)
                    labels.append(label)
            yield self._result(image, masks, labels)

    def _result(self, image: np.ndarray, masks: list, labels: list[int]) -> ImageResult:
        common = {"name": "frame", "size": image.shape[:2], "categories": CATEGORIES}
        if self._panoptic:
            ids = np.zeros(image.shape[:2], np.int32)
            for i, mask in enumerate(masks, start=1):
                ids[mask] = i
            segments = tuple(
                {"id": i, "category_id": label, "isthing": True, "score": 0.9}
                for i, label in enumerate(labels, start=1)
            )
            return ImageResult(**common, panoptic_ids=ids, segments=segments, source=image)
        return ImageResult(
            **common,
            boxes=boxes_of(masks).astype(np.float32),
            scores=np.full(len(masks), 0.9, np.float32),
            class_ids=np.array(labels, np.int64),
            rles=tuple(encode_mask(mask) for mask in masks),
            source=image,
        )
