"""Which object of a frame is which of the frames before: identities that last through occlusion.

Objects are paired with tracks as ByteTrack does ([arXiv 2110.06864](https://arxiv.org/abs/2110.06864)):
confident ones first, then uncertain ones with what is left, as objects that are being hidden are
uncertain. How well two fit is told by their masks, the older moved to where its object should be by
now, and by their colors. What is hidden goes on at its speed, and is found again near its way.

Shape key: N objects of a frame, T tracks, h, w pixels of a mask's bounding box, V bins of color.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from maskdino.ops.runs import crop_mask

THRESHOLD = 0.5  # score from which an object may begin a track
MIN_OVERLAP, MIN_WEAK_OVERLAP = 0.15, 0.4  # IoU of a confident object with its track, and of others
MIN_COLOR = 0.5  # likeness of colors of what is found again
COLOR_WEIGHT = 0.5  # beside the IoU
PATIENCE = 2.0  # seconds for which an object that is not seen is remembered
CERTAIN = 3  # frames in which an object was seen, to be counted
SMOOTHING = 0.3  # share of the newest measurement in a track's speed
STEADY = (0.9, 1.15)  # ratio of sizes, of two frames, that tells that an object is not being hidden


@dataclass(frozen=True)
class Shape:
    """Where an object is.

    Attributes:
        box: (4,) float64 x0, y0, x1, y1.
        mask: (h, w) bool; None: the box is all that is known.
        corner: (x, y) of the mask.
        colors: (V,) square roots of shares of colors, whose sum is 1; None: not known.
    """

    box: np.ndarray
    mask: np.ndarray | None = None
    corner: tuple[int, int] = (0, 0)
    colors: np.ndarray | None = None

    @property
    def center(self) -> np.ndarray:
        """(2,) x, y."""
        return (self.box[:2] + self.box[2:]) / 2

    @property
    def size(self) -> np.ndarray:
        """(2,) width, height."""
        return np.maximum(self.box[2:] - self.box[:2], 1e-6)


@dataclass
class Identity:
    """One object of a video.

    Attributes:
        number: from 1 on.
        label: class number.
        first: seconds at which it was seen first.
        last: and last.
        sightings: frames in which it was seen.
        score: the largest of its scores.
    """

    number: int
    label: int
    first: float
    last: float
    sightings: int = 1
    score: float = 1.0


@dataclass
class _Track:
    identity: Identity
    shape: Shape
    size: np.ndarray  # (2,) of the whole object, as far as it was seen
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))  # pixels in a second

    def way(self, now: float) -> np.ndarray:
        """(2,) pixels that it has moved since it was seen."""
        return self.velocity * (now - self.identity.last)

    def see(self, shape: Shape, score: float, now: float) -> None:
        identity, passed = self.identity, max(now - self.identity.last, 1e-6)
        speed = (shape.center - self.shape.center) / passed
        ratio = float(np.prod(shape.size) / np.prod(self.shape.size))
        share = SMOOTHING if STEADY[0] <= ratio <= STEADY[1] else SMOOTHING / 6
        self.velocity = (
            speed if identity.sightings == 1 else (1 - share) * self.velocity + share * speed
        )
        self.size = np.maximum(shape.size, 0.98 * self.size)
        colors = shape.colors
        if colors is not None and self.shape.colors is not None:
            colors = np.sqrt(0.9 * self.shape.colors**2 + 0.1 * colors**2)
        self.shape = Shape(shape.box, shape.mask, shape.corner, colors)
        identity.last, identity.score = now, max(identity.score, score)
        identity.sightings += 1


class Tracker:
    """Gives the objects of a video numbers that stay theirs.

    Attributes:
        identities: all objects so far, by number.
    """

    def __init__(self, *, threshold: float = THRESHOLD, patience: float = PATIENCE) -> None:
        """Starts without objects.

        Args:
            threshold: score from which an object may begin a track; others only continue one.
            patience: seconds for which an object that is not seen is remembered.
        """
        self._threshold, self._patience = threshold, patience
        self._tracks: list[_Track] = []
        self._now, self._before = -1.0, -1.0
        self.identities: dict[int, Identity] = {}

    def update(
        self,
        boxes: np.ndarray,
        labels: np.ndarray,
        scores: np.ndarray | None = None,
        *,
        rles: list[dict] | None = None,
        image: np.ndarray | None = None,
        size: tuple[int, int] | None = None,
        seconds: float | None = None,
    ) -> list[int]:
        """Takes the next frame.

        Args:
            boxes: (N, 4) x0, y0, x1, y1 in pixels.
            labels: (N,) class numbers; objects of two classes are never the same.
            scores: (N,) in [0, 1]; None: all are confident.
            rles: N masks in COCO's compressed form; None: boxes are compared.
            image: (H, W, 3) uint8 RGB, whose colors tell objects apart; None: they do not.
            size: (H, W) of the frame, outside of which nothing is looked for.
            seconds: when the frame comes, later than the one before; None: 1/25 s after it.

        Returns:
            The identity of each object, 1 or more; 0 for uncertain objects that have none.
        """
        self._before, self._now = self._now, self._now + 0.04 if seconds is None else seconds
        shapes = _shapes(np.asarray(boxes, np.float64), rles, image)
        labels = np.asarray(labels)
        scores = np.ones(len(shapes)) if scores is None else np.asarray(scores)
        self._forget(size)
        numbers = [0] * len(shapes)
        free_tracks = list(range(len(self._tracks)))
        strong = np.flatnonzero(scores >= self._threshold).tolist()
        weak = np.flatnonzero(scores < self._threshold).tolist()
        overlap, colors = self._likeness(shapes, labels)
        nearness = self._nearness(shapes)
        near = np.where((overlap >= 0) & (colors >= MIN_COLOR), nearness, -1)
        seen = np.array([t.identity.last == self._before for t in self._tracks], bool)
        overlap = np.where(seen | (colors >= MIN_COLOR), overlap, -1)
        just_seen = np.where(seen, overlap, -1)
        for objects, fit, least in (
            (strong, overlap, MIN_OVERLAP),
            (weak, just_seen, MIN_WEAK_OVERLAP),
            (strong, near, 1e-9),
        ):
            for i, j in _pairs(fit, fit + COLOR_WEIGHT * colors, objects, free_tracks, least):
                numbers[i] = self._tracks[j].identity.number
                self._tracks[j].see(shapes[i], float(scores[i]), self._now)
                objects.remove(i)
                free_tracks.remove(j)
        for i in strong:
            numbers[i] = self._begin(shapes[i], int(labels[i]), float(scores[i]))
        return numbers

    def counts(self) -> Counter[int]:
        """How many objects of each class were seen, in at least `CERTAIN` frames each."""
        return Counter(x.label for x in self.identities.values() if x.sightings >= CERTAIN)

    def _begin(self, shape: Shape, label: int, score: float) -> int:
        number = len(self.identities) + 1
        identity = Identity(number, label, self._now, self._now, score=score)
        self.identities[number] = identity
        self._tracks.append(_Track(identity, shape, shape.size))
        return number

    def _forget(self, size: tuple[int, int] | None) -> None:
        """Drops tracks that were not seen for long, or have left the frame."""
        kept = []
        for track in self._tracks:
            x, y = track.shape.center + track.way(self._now)
            hidden = track.identity.last < self._before
            inside = size is None or (0 <= x <= size[1] and 0 <= y <= size[0])
            if self._now - track.identity.last <= self._patience and (inside or not hidden):
                kept.append(track)
        self._tracks = kept

    def _likeness(self, shapes: list[Shape], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N, T) IoU, -1 where classes differ; and (N, T) likeness of colors, in [0, 1]."""
        overlap = np.full((len(shapes), len(self._tracks)), -1.0)
        colors = np.ones_like(overlap)
        for j, track in enumerate(self._tracks):
            way = track.way(self._now)
            for i in np.flatnonzero(labels == track.identity.label):
                overlap[i, j] = shifted_iou(track.shape, way, shapes[i])
                ours, theirs = shapes[i].colors, track.shape.colors
                if ours is not None and theirs is not None:
                    colors[i, j] = float(ours @ theirs)
        return overlap, colors

    def _nearness(self, shapes: list[Shape]) -> np.ndarray:
        """(N, T): 1 where a track should be by now, 0 and less where it cannot be."""
        near = np.zeros((len(shapes), len(self._tracks)))
        for j, track in enumerate(self._tracks):
            gone = self._now - track.identity.last
            reach = float(np.linalg.norm(track.size)) * min(1 + gone, 2.5)
            place = track.shape.center + track.way(self._now)
            for i, shape in enumerate(shapes):
                near[i, j] = 1 - float(np.linalg.norm(shape.center - place)) / reach
        return near


def _pairs(
    fit: np.ndarray, value: np.ndarray, objects: list[int], tracks: list[int], least: float
) -> list[tuple[int, int]]:
    """Pairs of objects and tracks with the largest sum of values, of those that fit at all."""
    chosen = np.ix_(objects, tracks)
    possible = fit[chosen] >= least
    rows, columns = linear_sum_assignment(np.where(possible, value[chosen], -1e3), maximize=True)
    return [(objects[i], tracks[j]) for i, j in zip(rows, columns, strict=True) if possible[i, j]]


def _shapes(boxes: np.ndarray, rles: list[dict] | None, image: np.ndarray | None) -> list[Shape]:
    shapes = []
    for i, box in enumerate(boxes):
        mask, corner = None, (0, 0)
        if rles is not None:
            mask, (top, left) = crop_mask(rles[i])
            corner = (left, top)
            if not mask.size:  # nothing of it is seen: its box must do
                mask = None
        shapes.append(Shape(box, mask, corner, _colors(image, box, mask, corner)))
    return shapes


def _colors(
    image: np.ndarray | None, box: np.ndarray, mask: np.ndarray | None, corner: tuple[int, int]
) -> np.ndarray | None:
    """(24,) square roots of the shares of eight steps of red, green and blue, smoothed; or None."""
    if image is None:
        return None
    if mask is None:  # the middle of the box
        x0, y0, x1, y1 = np.maximum(box, 0)
        left, right = int((3 * x0 + x1) / 4), int((x0 + 3 * x1) / 4) + 1
        top, bottom = int((3 * y0 + y1) / 4), int((y0 + 3 * y1) / 4) + 1
        pixels = image[top:bottom, left:right].reshape(-1, 3)
    else:
        (left, top), (height, width) = corner, mask.shape
        pixels = image[top : top + height, left : left + width][mask]
    if not len(pixels):
        return None
    shares = [np.bincount(channel >> 5, minlength=8) / len(pixels) for channel in pixels.T]
    # Light that changes a little must not move all of them to another step.
    smooth = [np.convolve(share, (0.25, 0.5, 0.25), "same") for share in shares]
    return np.sqrt(np.concatenate([share / (3 * share.sum()) for share in smooth]))


def shifted_iou(first: Shape, way: np.ndarray, second: Shape) -> float:
    """Intersection over union of two masks, the first moved; of boxes, where one has no mask."""
    if first.mask is None or second.mask is None:
        low = np.maximum(first.box[:2] + way, second.box[:2])
        high = np.minimum(first.box[2:] + way, second.box[2:])
        shared = float(np.prod(np.clip(high - low, 0, None)))
        return shared / (float(np.prod(first.size) + np.prod(second.size)) - shared)
    left, top = np.round(np.asarray(first.corner) + way).astype(int).tolist()
    (other_left, other_top), (height, width) = second.corner, first.mask.shape
    other_height, other_width = second.mask.shape
    x0, x1 = max(left, other_left), min(left + width, other_left + other_width)
    y0, y1 = max(top, other_top), min(top + height, other_top + other_height)
    if x0 >= x1 or y0 >= y1:
        return 0.0
    ours = first.mask[y0 - top : y1 - top, x0 - left : x1 - left]
    theirs = second.mask[y0 - other_top : y1 - other_top, x0 - other_left : x1 - other_left]
    shared = int((ours & theirs).sum())
    return shared / (int(first.mask.sum()) + int(second.mask.sum()) - shared)
