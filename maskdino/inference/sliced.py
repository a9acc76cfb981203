"""Large images in overlapping slices, whose results are joined to those of the whole image.

Objects that the edge of a slice cuts are joined again (`maskdino.inference.joining`). A pixel is of
the class with the largest sum of scores over slices, weighted by its distance to their edges
(`maskdino.inference.class_maps`).

Shape key: H, W pixels of the image; S edge of a slice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np

from maskdino.inference.class_maps import ClassMap, LargeMap
from maskdino.inference.joining import Joiner
from maskdino.inference.large_result import LargeResult
from maskdino.inference.parts import EDGE, Slice, Window, slices_of
from maskdino.inference.tiles import TiledImage
from maskdino.ops.masks import RunMask
from maskdino.ops.rle import encode_mask
from maskdino.system.progress import Bar
from maskdino.visualization.results import ImageResult

MOST_OVERLAP = 0.9
PATIENCE = 3  # seconds that pass before an image has a bar of its own

logger = logging.getLogger(__name__)


def check_slices(size: int, overlap: float) -> None:
    """Refuses slices of S pixels and an overlap that are out of range.

    Raises:
        ValueError: with the range.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise ValueError(f"slices of {size!r} pixels: their edge must be one whole number")
    if size < 16 * EDGE:
        raise ValueError(f"slices of {size} pixels are too small: at least {16 * EDGE}")
    if not isinstance(overlap, int | float) or not 0 <= overlap <= MOST_OVERLAP:
        raise ValueError(
            f"slices that overlap by {overlap}: it must be in [0, {MOST_OVERLAP}], as a share of "
            f"their {size} pixels"
        )


def predict_sliced(
    predict: Callable[[Iterable[np.ndarray]], Iterator[ImageResult]],
    image: TiledImage,
    *,
    size: int,
    overlap: float,
    name: str,
    progress: bool,
    class_scores: bool = False,
) -> LargeResult:
    """Predicts an image in slices.

    Args:
        predict: turns images (h, w, 3) uint8 RGB into results, in order.
        image: of which slices are read.
        size: S.
        overlap: least share of a slice that the next one sees again.
        name: of the image.
        progress: show a bar, if it takes longer than some seconds.
        class_scores: keep the scores of all classes of each pixel, not of the best alone.

    Raises:
        ValueError: `size` or `overlap` is out of range, or class scores need too much memory.
    """
    check_slices(size, overlap)
    slices = slices_of(image.size, size, overlap)
    crops = (image.part(slice(s.top, s.bottom), slice(s.left, s.right)) for s in slices)
    if len(slices) == 1:
        _say_that_it_fits(size)
        result = next(predict(crops))
        return _large(result if class_scores else replace(result, class_scores=None), image, name)
    collectors: list[_Objects | _Panoptic | ClassMap] = []
    bar = Bar(
        predict(crops),
        total=len(slices),
        unit="slice",
        desc=name,
        delay=PATIENCE,
        disable=not progress,
    )
    for place, result in enumerate(bar):
        if place == 0:
            joined = replace(result, source=None, class_scores=None)
            collectors = [
                _collector(task, image.size, slices, result, class_scores) for task in result.tasks
            ]
        for collector in collectors:
            collector.add(place, result)
    for collector in collectors:
        joined = replace(joined, **collector.fields())
    return _large(joined, image, name)


def _large(result: ImageResult, image: TiledImage, name: str) -> LargeResult:
    known = {x.name: getattr(result, x.name) for x in fields(ImageResult)}
    known |= {"name": name, "size": image.size, "source": image.source}
    return LargeResult(**known, tiled=image)


@lru_cache(maxsize=1)
def _say_that_it_fits(size: int) -> None:
    """Warns once, not for each image of a folder."""
    logger.warning("images that fit into one slice of %d pixels are predicted as they are", size)


def _collector(
    task: str, size: tuple[int, int], slices: Sequence[Slice], first: ImageResult, scores: bool
) -> _Objects | _Panoptic | ClassMap:
    """What collects the results of a task; `first` is that of the first slice."""
    if task == "instance":
        return _Objects(size, slices, first)
    return _Panoptic(size, slices) if task == "panoptic" else ClassMap(size, slices, first, scores)


class _Objects:
    """Objects of the task "instance"."""

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice], first: ImageResult) -> None:
        self.parts, self.has_masks = Joiner(size, slices), first.rles is not None
        self.channels = None if first.features is None else first.features.shape[1]

    def add(self, place: int, result: ImageResult) -> None:
        """Takes the result of slice number `place`."""
        assert result.boxes is not None and result.class_ids is not None
        assert result.scores is not None
        for i, box in enumerate(result.boxes):
            rle = _mask_of_box(box, result.size) if result.rles is None else result.rles[i]
            features = None if result.features is None else result.features[i]
            label, score = int(result.class_ids[i]), float(result.scores[i])
            self.parts.add(place, label, score, rle, box, features)
        self.parts.finish(place)

    def fields(self) -> dict:
        """Fields of the result of the whole image."""
        objects = self.parts.objects()
        fields: dict = {
            "boxes": np.array([x.box for x in objects], np.float32).reshape(-1, 4),
            "scores": np.array([x.score for x in objects], np.float32),
            "class_ids": np.array([x.label for x in objects], np.int64),
        }
        if self.has_masks:
            fields["rles"] = tuple(x.rle for x in objects)
        if self.channels is not None:
            features = np.array([x.features for x in objects], np.float32)
            fields["features"] = features.reshape(-1, self.channels)
        return fields


def _mask_of_box(box: np.ndarray, size: tuple[int, int]) -> dict:
    """The box as a mask, for models that give boxes alone."""
    mask = np.zeros(size, np.uint8)
    x0, y0, x1, y1 = box.round().astype(int)
    mask[y0:y1, x0:x1] = 1
    return encode_mask(mask)


class _Panoptic:
    """Segments: things are joined as objects are, and cover stuff.

    Each pixel of stuff is of the class that the slice says which sees it farthest from its edges.
    """

    def __init__(self, size: tuple[int, int], slices: Sequence[Slice]) -> None:
        self.slices, self.things = slices, Joiner(size, slices)
        self.stuff = LargeMap(size, np.int32)  # class number + 1; 0: none
        self.most = 0  # the largest number in it

    def add(self, place: int, result: ImageResult) -> None:
        """Takes the result of slice number `place`."""
        ids = result.panoptic_ids
        assert ids is not None and result.segments is not None
        stuff = np.zeros(ids.shape, np.int32)
        for segment in result.segments:
            mask, label = ids == segment["id"], segment["category_id"]
            if segment["isthing"]:
                self.things.add(place, label, segment.get("score", 1.0), encode_mask(mask))
            else:
                stuff[mask] = label + 1
                self.most = max(self.most, label + 1)
        own = self.slices[place]
        window = own.owned.inside(Window(0, 0, *self.stuff.array.shape))
        self.stuff.array[window] = stuff[own.owned.inside(own)]
        self.stuff.let_go()
        self.things.finish(place)

    def fields(self) -> dict:
        """Fields of the result of the whole image."""
        painted = self.stuff
        labels = (np.flatnonzero(painted.seen(self.most)[1:]) + 1).tolist()
        new_ids = np.zeros(self.most + 1, np.int32)
        new_ids[labels] = np.arange(1, len(labels) + 1)
        painted.renumber(new_ids)
        segments = [
            {"id": i, "category_id": label - 1, "isthing": False}
            for i, label in enumerate(labels, start=1)
        ]
        objects = self.things.objects()
        for number, thing in enumerate(reversed(objects), start=len(segments) + 1):
            mask = RunMask.of(thing.rle)  # the best is drawn last, and whole
            for left, right in mask.strips():
                window = painted.array[mask.top : mask.bottom, left:right]
                window[mask.columns(left, right)] = number
                painted.let_go()
            segments.append(
                {"id": number, "category_id": thing.label, "isthing": True, "score": thing.score}
            )
        seen = painted.seen(len(segments))
        return {
            "panoptic_ids": painted.array,
            "segments": tuple(s for s in segments if seen[s["id"]]),
        }
