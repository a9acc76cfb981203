"""Which object of a frame is which of the frames before, so that it keeps its color."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class _Track:
    number: int
    label: int
    box: np.ndarray
    last_seen: int


class Tracks:
    """Pairs boxes of one class from frame to frame, those that overlap most first.

    It is made for steady colors, not for counting: objects that cross may swap numbers.
    """

    def __init__(self, *, min_overlap: float = 0.3, patience: int = 10) -> None:
        """Starts without objects.

        Args:
            min_overlap: intersection over union that makes two boxes one object, in (0, 1].
            patience: frames for which an object that is not seen is remembered.
        """
        self._min_overlap, self._patience = min_overlap, patience
        self._tracks: list[_Track] = []
        self._frame = self._next = 0

    def update(self, boxes: np.ndarray, labels: np.ndarray) -> list[int]:
        """Takes the next frame.

        Args:
            boxes: (N, 4) x0, y0, x1, y1.
            labels: (N,) classes.

        Returns:
            The number of each object: a new one, or that of the object it was before.
        """
        self._frame += 1
        self._tracks = [t for t in self._tracks if self._frame - t.last_seen <= self._patience]
        numbers = [-1] * len(boxes)
        for i, track in self._pairs(boxes, labels):
            numbers[i] = track.number
            track.box, track.last_seen = boxes[i], self._frame
        for i, number in enumerate(numbers):
            if number < 0:
                numbers[i] = self._next
                self._tracks.append(_Track(self._next, int(labels[i]), boxes[i], self._frame))
                self._next += 1
        return numbers

    def _pairs(self, boxes: np.ndarray, labels: np.ndarray) -> list[tuple[int, _Track]]:
        """Objects and the tracks they continue, each at most once."""
        if not len(boxes) or not self._tracks:
            return []
        overlap = box_iou(boxes, np.stack([track.box for track in self._tracks]))
        same = labels[:, None] == np.array([track.label for track in self._tracks])
        overlap = np.where(same, overlap, 0)
        pairs: list[tuple[int, _Track]] = []
        taken: set[int] = set()
        continued: set[int] = set()
        for flat in np.argsort(-overlap, axis=None, kind="stable"):
            i, j = divmod(int(flat), overlap.shape[1])
            if overlap[i, j] < self._min_overlap:
                break
            if i not in taken and j not in continued:
                pairs.append((i, self._tracks[j]))
                taken.add(i)
                continued.add(j)
        return pairs


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union (N, M) of boxes (N, 4) and (M, 4); 0 for boxes without area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (first, second)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared, dtype=float), where=union > 0)
