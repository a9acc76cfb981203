"""Large images in overlapping slices, whose results are joined to those of the whole image.

Objects that the edge of a slice cuts are joined again (`maskdino.inference.parts`). Classes of
pixels, and panoptic "stuff", come from the slice that sees them farthest from its edges.

Shape key: H, W pixels of the image; S edge of a slice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from tqdm import tqdm

from maskdino.inference.parts import (
    EDGE,
    JoinedObject,
    Part,
    Slice,
    Window,
    join_parts,
    neighbors_of,
    slices_of,
)
from maskdino.inference.tiles import TiledImage
from maskdino.ops.rle import encode_mask
from maskdino.visualization.drawing import crop_mask
from maskdino.visualization.results import ImageResult

MOST_OVERLAP = 0.9

logger = logging.getLogger(__name__)


def check_slices(size: int, overlap: float) -> None:
    """Refuses slices of S pixels and an overlap that are out of range.

    Raises:
        ValueError: with the range.
    """
    if size < 16 * EDGE:
        raise ValueError(f"slices of {size} pixels are too small: at least {16 * EDGE}")
    if not 0 <= overlap <= MOST_OVERLAP:
        raise ValueError(f"slices that overlap by {overlap}: it must be in [0, {MOST_OVERLAP}]")


def predict_sliced(
    predict: Callable[[Iterable[np.ndarray]], Iterator[ImageResult]],
    image: TiledImage,
    *,
    size: int,
    overlap: float,
    name: str,
    progress: bool,
) -> ImageResult:
    """Predicts an image in slices.

    Args:
        predict: turns images (h, w, 3) uint8 RGB into results, in order.
        image: of which slices are read.
        size: S.
        overlap: least share of a slice that the next one sees again.
        name: of the image.
        progress: show a bar.

    Raises:
        ValueError: `size` or `overlap` is out of range.
    """
    check_slices(size, overlap)
    slices = slices_of(image.size, size, overlap)
    crops = (image.part(slice(s.top, s.bottom), slice(s.left, s.right)) for s in slices)
    if len(slices) == 1:
        _say_that_it_fits(size)
        return replace(next(predict(crops)), name=name, source=image.source)
    collectors: dict[str, _Objects | _Panoptic | _ClassMap] = {}
    first: ImageResult | None = None
    bar = tqdm(predict(crops), total=len(slices), unit="slice", desc=name, disable=not progress)
    for place, result in enumerate(bar):
        first = first or replace(result, source=None)
        for task in result.tasks:
            if task not in collectors:
                collectors[task] = COLLECTORS[task](image.size, slices)
            collectors[task].add(place, result)
    assert first is not None
    parts: dict = {}
    for collector in collectors.values():
        parts |= collector.fields(first)
    return replace(first, name=name, size=image.size, source=image.source, **parts)


@lru_cache(maxsize=1)
def _say_that_it_fits(size: int) -> None:
    """Once, not for each image of a folder."""
    logger.warning("images that fit into one slice of %d pixels are predicted as they are", size)


class _Parts:
    """What slices see of objects."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices, self.neighbors = slices, neighbors_of(slices)
        self.parts: list[Part] = []

    def add(
        self,
        place: int,
        label: int,
        score: float,
        rle: dict,
        box: np.ndarray | None = None,
        features: np.ndarray | None = None,
    ) -> None:
        """Adds a part, unless another slice sees all of it with fewer of its edges cut.

        That slice then decides, also if it sees nothing: what is seen at the edge is a guess.
        """
        mask, (top, left) = crop_mask(rle)
        if not mask.size:
            return
        own = self.slices[place]
        top, left = own.top + top, own.left + left
        extent = Window(top, left, top + mask.shape[0], left + mask.shape[1])
        cut = own.edges_near(extent)
        others = (self.slices[i] for i in self.neighbors[place]) if cut else ()
        if any(s.common(extent) == extent and s.edges_near(extent) < cut for s in others):
            return
        if box is None:
            edges = (extent.left, extent.top, extent.right, extent.bottom)
            whole_box = np.array(edges, np.float32)
        else:
            whole_box = box + np.array([own.left, own.top] * 2, np.float32)
        packed = np.packbits(mask)
        self.parts.append(Part(place, label, score, whole_box, extent, packed, bool(cut), features))

    def joined(self) -> list[JoinedObject]:
        return join_parts(self.parts, self.slices)


class _Objects:
    """Objects of the task "instance"."""

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice]) -> None:
        self.size, self.parts = size, _Parts(slices)

    def add(self, place: int, result: ImageResult) -> None:
        """Takes what slice number `place` shows."""
        assert result.boxes is not None and result.class_ids is not None
        assert result.scores is not None
        for i, box in enumerate(result.boxes):
            rle = _mask_of_box(box, result.size) if result.rles is None else result.rles[i]
            features = None if result.features is None else result.features[i]
            label, score = int(result.class_ids[i]), float(result.scores[i])
            self.parts.add(place, label, score, rle, box, features)

    def fields(self, first: ImageResult) -> dict:
        """Of the result; `first` is that of some slice."""
        objects = self.parts.joined()
        fields: dict = {
            "boxes": np.array([x.box for x in objects], np.float32).reshape(-1, 4),
            "scores": np.array([x.score for x in objects], np.float32),
            "class_ids": np.array([x.label for x in objects], np.int64),
        }
        if first.rles is not None:
            fields["rles"] = tuple(x.rle(self.size) for x in objects)
        if first.features is not None:
            shape = (-1, first.features.shape[1])
            fields["features"] = np.array([x.features for x in objects], np.float32).reshape(shape)
        return fields


def _mask_of_box(box: np.ndarray, size: tuple[int, int]) -> dict:
    """A box in place of the mask that a model of boxes does not give."""
    mask = np.zeros(size, np.uint8)
    x0, y0, x1, y1 = box.round().astype(int)
    mask[y0:y1, x0:x1] = 1
    return encode_mask(mask)


class _ClassMap:
    """The label map of the task "semantic"."""

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice]) -> None:
        self.size, self.slices = size, slices
        self.labels: np.ndarray | None = None

    def add(self, place: int, result: ImageResult) -> None:
        """Takes what slice number `place` shows."""
        assert result.label_map is not None
        self.write(place, result.label_map)

    def write(self, place: int, labels: np.ndarray) -> None:
        """Takes labels (S, S) of the pixels that the slice owns."""
        if self.labels is None:
            self.labels = np.zeros(self.size, labels.dtype)
        own = self.slices[place]
        everything = Window(0, 0, *self.size)
        self.labels[own.owned.inside(everything)] = labels[own.owned.inside(own)]

    def fields(self, first: ImageResult) -> dict:  # noqa: ARG002
        """Of the result."""
        return {"label_map": self.labels}


class _Panoptic:
    """Things, as objects are joined, over stuff, by class."""

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice]) -> None:
        self.stuff, self.things = _ClassMap(size, slices), _Parts(slices)

    def add(self, place: int, result: ImageResult) -> None:
        """Takes what slice number `place` shows."""
        ids = result.panoptic_ids
        assert ids is not None and result.segments is not None
        stuff = np.zeros(ids.shape, np.int32)  # class numbers from 1
        for segment in result.segments:
            mask, label = ids == segment["id"], segment["category_id"]
            if segment["isthing"]:
                self.things.add(place, label, segment.get("score", 1.0), encode_mask(mask))
            else:
                stuff[mask] = label + 1
        self.stuff.write(place, stuff)

    def fields(self, first: ImageResult) -> dict:  # noqa: ARG002
        """Of the result."""
        ids = self.stuff.labels
        assert ids is not None
        labels = [label for label in np.unique(ids).tolist() if label]
        new_ids = np.zeros(max(labels, default=0) + 1, np.int32)
        new_ids[labels] = np.arange(1, len(labels) + 1)
        for row in ids:  # in place: the map may be most of the memory
            row[:] = new_ids[row]
        segments = [
            {"id": i, "category_id": label - 1, "isthing": False}
            for i, label in enumerate(labels, start=1)
        ]
        objects = self.things.joined()
        everything = Window(0, 0, *ids.shape)
        for number, thing in enumerate(reversed(objects), start=len(segments) + 1):
            for part in thing.parts:  # the best is drawn last, and whole
                ids[part.extent.inside(everything)][part.mask()] = number
            segments.append(
                {"id": number, "category_id": thing.label, "isthing": True, "score": thing.score}
            )
        seen = set(np.unique(ids).tolist())
        return {"panoptic_ids": ids, "segments": tuple(s for s in segments if s["id"] in seen)}


COLLECTORS: dict[str, type[_Objects] | type[_Panoptic] | type[_ClassMap]] = {
    "instance": _Objects,
    "panoptic": _Panoptic,
    "semantic": _ClassMap,
}
