"""Objects that several slices of an image see in parts: which belong together, and what they make.

Shape key: H, W pixels of the image; S edge of a slice; h, w pixels of a window; N parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from pycocotools import mask as mask_utils

AGREEMENT = 0.5  # least intersection over union, in the overlap of two slices, of what is joined
EDGE = 3  # pixels from a cut edge within which an object counts as cut: masks are that rough
WHOLE = 0.8  # share of a joined object that a view without cut edges must have to stand for it
FAR = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Window:
    """A rectangle of the image: rows top to bottom - 1, columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w)."""
        return self.bottom - self.top, self.right - self.left

    def common(self, other: Window) -> Window | None:
        """The rectangle that both have, or None."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Window(top, left, bottom, right) if top < bottom and left < right else None

    def inside(self, around: Window) -> tuple[slice, slice]:
        """Index of this rectangle in the array of another one around it."""
        return (
            slice(self.top - around.top, self.bottom - around.top),
            slice(self.left - around.left, self.right - around.left),
        )


@dataclass(frozen=True)
class Slice(Window):
    """A part of the image that is predicted by itself.

    Attributes:
        cut: whether the image goes on beyond the top, left, bottom and right edge.
        owned: the pixels that no other slice sees farther from its edges.
    """

    cut: tuple[bool, bool, bool, bool]
    owned: Window

    def edges_near(self, extent: Window) -> frozenset[int]:
        """Which of the four edges cut an object with this extent."""
        distances = (
            extent.top - self.top,
            extent.left - self.left,
            self.bottom - extent.bottom,
            self.right - extent.right,
        )
        return frozenset(i for i, d in enumerate(distances) if self.cut[i] and d < EDGE)

    def depth(self, window: Window) -> np.ndarray:
        """(h, w): pixels to the nearest cut edge, of each pixel of a window inside the slice."""
        rows, columns = np.arange(window.top, window.bottom), np.arange(window.left, window.right)
        distances = (
            rows[:, None] - self.top,
            columns[None] - self.left,
            self.bottom - 1 - rows[:, None],
            self.right - 1 - columns[None],
        )
        depth = np.full(window.shape, FAR)
        for distance, cut in zip(distances, self.cut, strict=True):
            if cut:
                np.minimum(depth, distance, out=depth)
        return depth


def slices_of(size: tuple[int, int], edge: int, overlap: float) -> list[Slice]:
    """Slices that cover an image, row by row; all of one size, as far as the image allows.

    Args:
        size: (H, W).
        edge: S.
        overlap: least share of a slice that the next one sees again.
    """
    down, along = (_intervals(length, edge, overlap) for length in size)
    return [
        Slice(
            top,
            left,
            bottom,
            right,
            cut=(top > 0, left > 0, bottom < size[0], right < size[1]),
            owned=Window(own_top, own_left, own_bottom, own_right),
        )
        for top, bottom, own_top, own_bottom in down
        for left, right, own_left, own_right in along
    ]


def _intervals(length: int, edge: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Begin and end of each interval, and of what it owns: up to the middle of the overlaps."""
    edge = min(edge, length)
    step = max(1, int(edge * (1 - overlap)))
    number = 1 + -(-(length - edge) // step)
    begins = [round(i * (length - edge) / max(number - 1, 1)) for i in range(number)]
    middles = [(a + edge + b) // 2 for a, b in zip(begins, begins[1:], strict=False)]
    owned = zip([0, *middles], [*middles, length], strict=True)
    return [(begin, begin + edge, *own) for begin, own in zip(begins, owned, strict=True)]


def neighbors_of(slices: Sequence[Slice]) -> list[list[int]]:
    """For each slice the numbers of those that overlap it."""
    edges = np.array([(s.top, s.left, s.bottom, s.right) for s in slices])
    return [
        [j for j in np.flatnonzero(_touching(edges, own)).tolist() if j != i]
        for i, own in enumerate(edges)
    ]


def _touching(edges: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(N,) bool: which rectangles (N, 4) share a pixel with one (4,)."""
    before, behind = edges[:, :2] < own[2:], edges[:, 2:] > own[:2]
    return np.asarray((before & behind).all(1))


@dataclass(frozen=True)
class Part:
    """What one slice sees of an object.

    Attributes:
        place: number of the slice.
        label: class number.
        score: in [0, 1].
        box: (4,) float32 x0, y0, x1, y1 in pixels of the image, as predicted.
        extent: of the mask, in the image.
        packed: the mask inside `extent`, eight pixels in a byte.
        cut: whether an edge of the slice cuts it.
        features: (C,) of the object, or None.
    """

    place: int
    label: int
    score: float
    box: np.ndarray
    extent: Window
    packed: np.ndarray
    cut: bool
    features: np.ndarray | None = field(default=None, repr=False)

    def mask(self, window: Window | None = None) -> np.ndarray:
        """(h, w) bool, inside a window inside the extent; None: inside the extent."""
        height, width = self.extent.shape
        mask = np.unpackbits(self.packed, count=height * width).reshape(height, width).view(bool)
        return mask if window is None else mask[window.inside(self.extent)]


@dataclass(frozen=True)
class JoinedObject:
    """An object of the whole image.

    Attributes:
        label: class number.
        score: in [0, 1].
        box: (4,) float32 x0, y0, x1, y1 in pixels.
        parts: whose masks are its mask together.
        features: (C,) of its largest part, or None.
    """

    label: int
    score: float
    box: np.ndarray
    parts: tuple[Part, ...]
    features: np.ndarray | None = field(default=None, repr=False)

    def rle(self, size: tuple[int, int]) -> dict:
        """The mask in an image (H, W), in COCO's compressed form; no array of it is made."""
        pieces = [run_lengths(part.mask(), part.extent, size) for part in self.parts]
        return pieces[0] if len(pieces) == 1 else mask_utils.merge(pieces)


def run_lengths(mask: np.ndarray, extent: Window, size: tuple[int, int]) -> dict:
    """COCO's compressed form of a mask (h, w) bool, which lies somewhere in an image (H, W)."""
    height, width = mask.shape
    padded = np.zeros((width, height + 2), np.int8)  # by columns, as COCO counts
    padded[:, 1:-1] = mask.T
    columns, begins = np.nonzero(np.diff(padded) == 1)
    _, ends = np.nonzero(np.diff(padded) == -1)
    offsets = (extent.left + columns) * size[0] + extent.top
    runs = np.stack([offsets + begins, offsets + ends], 1).ravel()
    # Runs through the full height of the image go on in the next column.
    going_on = np.flatnonzero(runs[1:-1:2] == runs[2::2]) * 2 + 1
    runs = np.delete(runs, np.concatenate([going_on, going_on + 1]))
    counts = np.diff(runs, prepend=0, append=size[0] * size[1]).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return mask_utils.frPyObjects({"size": list(size), "counts": counts}, *size)


def join_parts(parts: Sequence[Part], slices: Sequence[Slice]) -> list[JoinedObject]:
    """Makes objects of what the slices see, best first.

    Parts of two slices belong together if they have one class and their masks agree inside the
    overlap of the slices; each has at most one such partner in another slice, and chains of
    partners are one object.
    """
    groups: dict[int, list[Part]] = defaultdict(list)
    for part, root in zip(parts, _groups(parts, slices), strict=True):
        groups[root].append(part)
    joined = (_joined(group, slices) for group in groups.values())
    return sorted(joined, key=lambda x: -x.score)


def _groups(parts: Sequence[Part], slices: Sequence[Slice]) -> list[int]:
    """For each part a number that those of its object share."""
    above = list(range(len(parts)))

    def root(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    members: dict[int, list[int]] = defaultdict(list)
    for i, part in enumerate(parts):
        members[part.place].append(i)
    for place, neighbors in enumerate(neighbors_of(slices)):
        for other in neighbors:
            if place < other and members[place] and members[other]:
                window = slices[place].common(slices[other])
                assert window is not None
                for i, j in _partners(parts, members[place], members[other], window):
                    above[root(i)] = root(j)
    return [root(i) for i in range(len(parts))]


def _partners(
    parts: Sequence[Part], ours: list[int], theirs: list[int], window: Window
) -> Iterator[tuple[int, int]]:
    """Pairs of parts of two slices that agree inside the window that both see."""
    edges = {
        i: np.array([x.top, x.left, x.bottom, x.right])
        for i in (*ours, *theirs)
        if (x := parts[i].extent.common(window)) is not None
    }
    ours, theirs = [i for i in ours if i in edges], [j for j in theirs if j in edges]
    if not ours or not theirs:
        return
    areas = {i: int(parts[i].mask(Window(*edge.tolist())).sum()) for i, edge in edges.items()}
    their_edges = np.stack([edges[j] for j in theirs])
    found = []
    for i in ours:
        for k in np.flatnonzero(_touching(their_edges, edges[i])).tolist():
            a, b = parts[i], parts[theirs[k]]
            if a.label != b.label:
                continue
            own = Window(*edges[i].tolist()).common(Window(*their_edges[k].tolist()))
            common = int((a.mask(own) & b.mask(own)).sum())
            agreement = common / max(areas[i] + areas[theirs[k]] - common, 1)
            if agreement > AGREEMENT:
                found.append((agreement * a.score * b.score, agreement, i, theirs[k]))
    taken: set[int] = set()
    for *_, i, j in sorted(found, reverse=True):
        if i not in taken and j not in taken:
            taken |= {i, j}
            yield i, j


def _joined(group: list[Part], slices: Sequence[Slice]) -> JoinedObject:
    """One object of parts that belong together."""
    if len(group) > 1:
        trimmed = [x for part in group if (x := _trimmed(part, group, slices)) is not None]
        area = sum(int(part.mask().sum()) for part in trimmed)
        whole = [x for x in group if not x.cut and x.mask().sum() >= WHOLE * area]
        if not whole and trimmed:
            return _of_pieces(group, trimmed)
        group = [max(whole or group, key=lambda part: part.score)]
    (part,) = group
    return JoinedObject(part.label, part.score, part.box, (part,), part.features)


def _of_pieces(group: list[Part], trimmed: list[Part]) -> JoinedObject:
    areas = [int(part.mask().sum()) for part in group]
    largest = group[int(np.argmax(areas))]
    extents = np.array([(x.left, x.top, x.right, x.bottom) for x in (p.extent for p in trimmed)])
    box = np.concatenate([extents[:, :2].min(0), extents[:, 2:].max(0)]).astype(np.float32)
    score = float(np.average([part.score for part in group], weights=areas))
    return JoinedObject(largest.label, score, box, tuple(trimmed), largest.features)


def _trimmed(part: Part, group: list[Part], slices: Sequence[Slice]) -> Part | None:
    """The part without the pixels that another slice of the group sees farther from its edges."""
    mask, own = part.mask().copy(), slices[part.place]
    for place in {other.place for other in group} - {part.place}:
        window = part.extent.common(slices[place])
        if window is not None:
            theirs, ours = slices[place].depth(window), own.depth(window)
            decided = theirs >= ours if place < part.place else theirs > ours
            mask[window.inside(part.extent)] &= ~decided
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    top, left = part.extent.top, part.extent.left
    extent = Window(
        top + int(rows[0]),
        left + int(columns[0]),
        top + int(rows[-1]) + 1,
        left + int(columns[-1]) + 1,
    )
    return replace(part, extent=extent, packed=np.packbits(mask[extent.inside(part.extent)]))
