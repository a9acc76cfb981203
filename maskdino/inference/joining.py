"""Joins the parts of objects that several slices of an image see, while the slices are read.

Parts are kept as pixels only as long as a slice may follow that sees more of their object: those of
about one row of slices. What is whole is kept as run lengths.

Shape key: H, W pixels of the image; h, w pixels of a window; N parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from maskdino.inference.parts import Part, Slice, Window, neighbors_of, touching
from maskdino.ops.runs import crop_mask

AGREEMENT = 0.5  # least intersection over union, in the overlap of two slices, of what is joined
WHOLE = 0.8  # share of a joined object that a view without cut edges must have to stand for it


@dataclass(frozen=True)
class JoinedObject:
    """An object of the whole image.

    Attributes:
        label: class number.
        score: in [0, 1].
        box: (4,) float32 x0, y0, x1, y1 in pixels.
        rle: the mask in an image (H, W), in COCO's compressed form.
        features: (C,) of its largest part, or None.
    """

    label: int
    score: float
    box: np.ndarray
    rle: dict
    features: np.ndarray | None = field(default=None, repr=False)


class Joiner:
    """Makes objects of what the slices see, which are added in order.

    Parts of two slices belong together if they have one class and their masks agree inside the
    overlap of the slices; each has at most one such partner in another slice, and chains of
    partners are one object.
    """

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice]) -> None:
        """Begins without objects.

        Args:
            size: (H, W).
            slices: of `slices_of`.
        """
        self.size, self.slices, self.neighbors = size, slices, neighbors_of(slices)
        self.parts: dict[int, Part] = {}  # by number, as long as they may have partners to come
        self._number = 0
        self._of_slice: list[list[int]] = [[] for _ in slices]
        self._ending: list[list[int]] = [[] for _ in slices]  # by the last slice that sees them
        self._last: dict[int, int] = {}
        self._groups: dict[int, list[int]] = {}  # one list for all parts of an object
        self._done: list[tuple[int, JoinedObject]] = []

    def add(
        self,
        place: int,
        label: int,
        score: float,
        rle: dict,
        box: np.ndarray | None = None,
        features: np.ndarray | None = None,
    ) -> None:
        """Adds what slice number `place` sees of an object.

        It is left out if all of it lies in another slice, fewer of whose edges cut it: what is seen
        at an edge is a guess, and the other slice decides, even if it sees nothing.

        Args:
            place: of the slice.
            label: class number.
            score: in [0, 1].
            rle: mask in the slice.
            box: (4,) x0, y0, x1, y1 in the slice; None: that of the mask.
            features: (C,) or None.
        """
        mask, (top, left) = crop_mask(rle)
        if not mask.size:
            return
        own = self.slices[place]
        top, left = own.top + top, own.left + left
        extent = Window(top, left, top + mask.shape[0], left + mask.shape[1])
        cut, last = own.edges_near(extent), place
        for i in self.neighbors[place]:
            common = self.slices[i].common(extent)
            if common == extent and cut and self.slices[i].edges_near(extent) < cut:
                return
            last = max(last, i) if common is not None else last
        if box is None:
            edges = (extent.left, extent.top, extent.right, extent.bottom)
            whole_box = np.array(edges, np.float32)
        else:
            whole_box = box + np.array([own.left, own.top] * 2, np.float32)
        number, self._number = self._number, self._number + 1
        packed = np.packbits(mask)
        self.parts[number] = Part(
            place, label, score, whole_box, extent, packed, bool(cut), features
        )
        self._groups[number], self._last[number] = [number], last
        self._of_slice[place].append(number)
        self._ending[last].append(number)

    def finish(self, place: int) -> None:
        """Joins the parts of slice number `place`, all of which were added, to those before."""
        ours = self._of_slice[place]
        for other in self.neighbors[place]:
            window = self.slices[place].common(self.slices[other])
            if other < place and ours and window is not None:
                theirs = [n for n in self._of_slice[other] if n in self.parts]
                for a, b in _partners(self.parts, theirs, ours, window):
                    self._unite(a, b)
        for number in self._ending[place]:
            group = self._groups.get(number, [])
            if group and all(self._last[n] <= place for n in group):
                self._complete(sorted(group))

    def objects(self) -> list[JoinedObject]:
        """All, best first."""
        return [x for _, x in sorted(self._done, key=lambda entry: (-entry[1].score, entry[0]))]

    def _unite(self, a: int, b: int) -> None:
        kept, other = sorted((self._groups[a], self._groups[b]), key=len, reverse=True)
        if kept is not other:
            kept.extend(other)
            self._groups.update(dict.fromkeys(other, kept))

    def _complete(self, group: list[int]) -> None:
        parts = [self.parts.pop(n) for n in group]
        for n in group:
            del self._groups[n], self._last[n]
        self._done.append((group[0], _joined(parts, self.slices, self.size)))


def _partners(
    parts: Mapping[int, Part], ours: list[int], theirs: list[int], window: Window
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
        for k in np.flatnonzero(touching(their_edges, edges[i])).tolist():
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


def _joined(group: list[Part], slices: Sequence[Slice], size: tuple[int, int]) -> JoinedObject:
    """One object of parts that belong together."""
    if len(group) > 1:
        trimmed = [x for part in group if (x := _trimmed(part, group, slices)) is not None]
        area = sum(int(part.mask().sum()) for part in trimmed)
        whole = [x for x in group if not x.cut and x.mask().sum() >= WHOLE * area]
        if not whole and trimmed:
            return _of_pieces(group, trimmed, size)
        group = [max(whole or group, key=lambda part: part.score)]
    (part,) = group
    return JoinedObject(part.label, part.score, part.box, part.rle(size), part.features)


def _of_pieces(group: list[Part], trimmed: list[Part], size: tuple[int, int]) -> JoinedObject:
    areas = [int(part.mask().sum()) for part in group]
    largest = group[int(np.argmax(areas))]
    extents = np.array([(x.left, x.top, x.right, x.bottom) for x in (p.extent for p in trimmed)])
    box = np.concatenate([extents[:, :2].min(0), extents[:, 2:].max(0)]).astype(np.float32)
    score = float(np.average([part.score for part in group], weights=areas))
    rle = mask_utils.merge([part.rle(size) for part in trimmed])
    return JoinedObject(largest.label, score, box, rle, largest.features)


def _trimmed(part: Part, group: list[Part], slices: Sequence[Slice]) -> Part | None:
    """The part without the pixels that another slice of the group sees farther from its edges."""
    mask, own = part.mask().copy(), slices[part.place]
    for place in {other.place for other in group} - {part.place}:
        window = part.extent.common(slices[place])
        if window is not None:
            theirs, ours = slices[place].depth(window), own.depth(window)
            decided = theirs >= ours if place < part.place else theirs > ours
            mask[window.inside(part.extent)] &= ~decided
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return None
    top, left = part.extent.top + y, part.extent.left + x
    extent = Window(top, left, top + height, left + width)
    return replace(part, extent=extent, packed=np.packbits(mask[extent.inside(part.extent)]))
