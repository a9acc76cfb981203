"""Training examples of several images: copy-paste and mosaic.

Shape key: N objects of an image; C channels; H, W pixels; B = ceil(W / 8) bytes of a row of masks.

What is mixed is what mappers give, so that augmentations, forms of annotation and mappers need not
know of it. Random numbers are NumPy's global ones, which the stream seeds for each position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes

from maskdino.data.mappers import Mapper, PinnableInstances
from maskdino.data.reading import DataError
from maskdino.data.transforms import PADDING, LargeScaleJitter
from maskdino.structures import PackedMasks

FIELDS = {"gt_classes", "gt_boxes", "gt_masks", "gt_has_mask", "gt_is_thing"}  # those understood
OF_OBJECTS = ("labels", "boxes", "shapes", "areas", "has_mask", "is_thing")  # parts of a scene
CENTERS = (0.25, 0.75)  # of mosaics, in shares of height and width
_FOREGROUND = np.array([value.bit_count() for value in range(256)], np.uint8)  # pixels of a byte


@dataclass(frozen=True)
class Scene:
    """An image and its objects; the shape of one is its mask, or its box if it has no mask."""

    image: np.ndarray  # (C, H, W) uint8
    labels: np.ndarray  # (N,) int64
    # (N, 4) float32 x0, y0, x1, y1 in pixels; not yet those of what is left visible.
    boxes: np.ndarray
    shapes: np.ndarray  # (N, H, B) uint8, packed as in `PackedMasks`: what is visible
    areas: np.ndarray  # (N,) pixels of the shapes before anything was cut
    has_mask: np.ndarray  # (N,) bool
    is_thing: np.ndarray  # (N,) bool; True where nothing is known
    fields: frozenset[str]  # names of what is known

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[1], self.image.shape[2]

    def take(self, index: np.ndarray) -> Scene:
        """The scene with some of its objects, given by numbers or flags."""
        return replace(self, **{name: getattr(self, name)[index] for name in OF_OBJECTS})

    def fitted(self, size: tuple[int, int]) -> Scene:
        """The scene, cut off or padded at the right and at the bottom."""
        if self.size == size:
            return self
        height, width = np.minimum(self.size, size)
        image = np.full((len(self.image), *size), PADDING, np.uint8)
        image[:, :height, :width] = self.image[:, :height, :width]
        whole = np.packbits(np.arange(size[1]) < width)  # a byte may be cut too
        used = (width + 7) // 8
        shapes = np.zeros((len(self.shapes), size[0], len(whole)), np.uint8)
        shapes[:, :height, :used] = self.shapes[:, :height, :used] & whole[:used]
        return replace(self, image=image, shapes=shapes)


def scene_of(example: dict) -> Scene:
    """The scene of an example of a mapper; DataError if that has fields that are not known here."""
    objects = example["instances"]
    fields = objects.get_fields()
    masks = fields.get("gt_masks")
    if masks is None:
        masks = PackedMasks.empty(len(objects), objects.image_size)
    if not fields.keys() <= FIELDS or not isinstance(masks, PackedMasks):
        raise DataError(
            f"image {example.get('file_name')}: INPUT.COPY_PASTE and INPUT.MOSAIC cannot mix "
            f"{', '.join(sorted(fields))}, the last as {type(masks).__name__}: they know "
            f"{', '.join(sorted(FIELDS))}, with masks as PackedMasks"
        )
    flags = {
        name: fields[name].numpy() if name in fields else np.full(len(objects), default)
        for name, default in (("gt_has_mask", "gt_masks" in fields), ("gt_is_thing", True))
    }
    has_mask, boxes = flags["gt_has_mask"], fields["gt_boxes"].tensor.numpy()
    shapes = masks.bits.numpy().copy()
    shapes[~has_mask] = _rectangles(boxes[~has_mask], objects.image_size)
    return Scene(
        example["image"].numpy(),
        fields["gt_classes"].numpy(),
        boxes,
        shapes,
        _areas(shapes),
        has_mask,
        flags["gt_is_thing"],
        frozenset(fields),
    )


def paste(scene: Scene, other: Scene, chosen: np.ndarray) -> Scene:
    """Lays chosen objects of another scene, given by numbers, over a scene, where they are there.

    They hide what is below them, but not one another.
    """
    pasted = other.take(chosen).fitted(scene.size)
    cover = np.bitwise_or.reduce(pasted.shapes, axis=0)
    is_covered = np.unpackbits(cover, axis=1, count=scene.size[1]).astype(bool)
    image = np.where(is_covered, pasted.image, scene.image)
    return _join(image, [replace(scene, shapes=scene.shapes & ~cover), pasted])


def assemble(tiles: Sequence[tuple[Scene, int, int]], size: tuple[int, int]) -> Scene:
    """Lays tiles, each with its top and left, side by side; stuff of one class is one object then.

    The left is a multiple of 8, as masks are in bytes. Tiles cover the size (height, width).
    """
    image = np.empty((len(tiles[0][0].image), *size), np.uint8)
    placed = []
    for tile, top, left in tiles:
        (height, width), first = tile.size, left // 8
        image[:, top : top + height, left : left + width] = tile.image
        shapes = np.zeros((len(tile.shapes), size[0], (size[1] + 7) // 8), np.uint8)
        shapes[:, top : top + height, first : first + tile.shapes.shape[2]] = tile.shapes
        boxes = tile.boxes + np.array([left, top, left, top], np.float32)
        placed.append(replace(tile, shapes=shapes, boxes=boxes))
    return _with_one_stuff_per_class(_join(image, placed))


def finish(scene: Scene, example: dict, min_visible: float) -> dict:
    """Makes an example of a scene, with the further entries of an example of a mapper.

    Things of whose area a smaller share than `min_visible` is left are dropped, and stuff where
    nothing is. Boxes of objects that lost pixels are those of what is left, within the box as it
    was.
    """
    left = _areas(scene.shapes)
    kept = (left > 0) & ((left >= min_visible * scene.areas) | ~scene.is_thing)
    cut = np.flatnonzero(left[kept] < scene.areas[kept])
    scene = scene.take(kept)
    boxes = scene.boxes.copy()
    around = _boxes_around(scene.shapes[cut], scene.size[1])
    boxes[cut, :2] = np.maximum(around[:, :2], boxes[cut, :2])
    boxes[cut, 2:] = np.minimum(around[:, 2:], boxes[cut, 2:])
    objects = PinnableInstances(scene.size)
    objects.gt_classes = torch.from_numpy(scene.labels)
    objects.gt_boxes = Boxes(torch.from_numpy(boxes))
    if "gt_masks" in scene.fields:
        scene.shapes[~scene.has_mask] = 0
        objects.gt_masks = PackedMasks(torch.from_numpy(scene.shapes), scene.size)
    if "gt_has_mask" in scene.fields or not scene.has_mask.all() and "gt_masks" in scene.fields:
        objects.gt_has_mask = torch.from_numpy(scene.has_mask)
    if "gt_is_thing" in scene.fields:
        objects.gt_is_thing = torch.from_numpy(scene.is_thing)
    image = torch.from_numpy(np.ascontiguousarray(scene.image))
    return {**example, "image": image, "instances": objects}


class MixingMapper:
    """A mapper that mixes what another mapper, one of `maskdino.data.mappers`, makes of records.

    The other images are drawn from `records`, all of the training, with probabilities in proportion
    to `repeat_factors` (N,): as often as they are trained on.

    Raises:
        ValueError: `mapper` cannot make the tiles of a mosaic.
    """

    def __init__(
        self,
        cfg: CfgNode,
        mapper: Callable[[dict], dict],
        records: Sequence[dict],
        repeat_factors: torch.Tensor,
    ) -> None:
        pasting, mosaic = cfg.INPUT.COPY_PASTE, cfg.INPUT.MOSAIC
        self._mapper, self._records = mapper, records
        self._ends = np.cumsum(repeat_factors.double().numpy())
        self._pasting, self._max_objects = pasting.PROBABILITY, pasting.MAX_OBJECTS
        self._tiling, self._scales = mosaic.PROBABILITY, (mosaic.MIN_SCALE, mosaic.MAX_SCALE)
        self._min_pasted, self._min_tiled = pasting.MIN_VISIBLE, mosaic.MIN_VISIBLE
        self._size = tuple(cfg.INPUT.LSJ.SIZE)
        augmentations: Sequence[object] = ()
        if isinstance(mapper, Mapper):
            augmentations = mapper.augmentations.augs
        if self._tiling and not any(isinstance(item, LargeScaleJitter) for item in augmentations):
            raise ValueError(
                "INPUT.MOSAIC makes tiles by large-scale jitter, but "
                f"{type(mapper).__name__} has none in its `augmentations`"
            )

    def __call__(self, record: dict) -> dict:
        """Makes an example of a record, perhaps mixed with others; it has this record's entries."""
        is_tiled, is_pasted = np.random.rand(2) < (self._tiling, self._pasting)
        example = self._mosaic(record) if is_tiled else self._mapper(record)
        return self._paste(example) if is_pasted else example

    def _paste(self, example: dict) -> dict:
        other = scene_of(self._mapper(self._another()))
        things = np.flatnonzero(other.is_thing)
        number = np.random.randint(min(len(things), self._max_objects)) + 1 if len(things) else 0
        chosen = np.random.permutation(things)[:number]
        return finish(paste(scene_of(example), other, chosen), example, self._min_pasted)

    def _mosaic(self, record: dict) -> dict:
        height, width = self._size
        share_y, share_x = np.random.uniform(*CENTERS, 2)
        y, x = round(share_y * height), round(share_x * width / 8) * 8
        tiles: list[tuple[Scene, int, int]] = []
        examples: list[dict] = []
        for top, bottom in ((0, y), (y, height)):
            for left, right in ((0, x), (x, width)):
                cell = bottom - top, right - left
                if min(cell) > 0:
                    chosen = self._another() if examples else record
                    examples.append(self._for_tiles(cell)(chosen))
                    tiles.append((scene_of(examples[-1]).fitted(cell), top, left))
        return finish(assemble(tiles, (height, width)), examples[0], self._min_tiled)

    def _for_tiles(self, size: tuple[int, int]) -> Callable[[dict], dict]:
        """The mapper, with images of the size of a tile."""
        mapper, jitter = copy.copy(self._mapper), LargeScaleJitter(size, *self._scales, self._size)
        assert isinstance(mapper, Mapper)  # see __init__
        augmentations = mapper.augmentations.augs
        mapper.augmentations = T.AugmentationList(
            [jitter if isinstance(item, LargeScaleJitter) else item for item in augmentations]
        )
        return mapper

    def _another(self) -> dict:
        drawn = np.random.rand() * self._ends[-1]
        return self._records[int(np.searchsorted(self._ends, drawn, side="right"))]


def check_mixing(cfg: CfgNode) -> None:
    """Raises a DataError, which names the key, unless what is to be mixed can be."""
    pasting, mosaic = cfg.INPUT.COPY_PASTE, cfg.INPUT.MOSAIC
    key = "INPUT.MOSAIC" if mosaic.PROBABILITY else "INPUT.COPY_PASTE"
    if max(mosaic.PROBABILITY, pasting.PROBABILITY) and cfg.INPUT.DATASET_MAPPER_NAME == "semantic":
        raise DataError(
            f"{key}.PROBABILITY is above 0, but INPUT.DATASET_MAPPER_NAME is semantic: objects are "
            "mixed, of which semantic maps have none"
        )
    if mosaic.PROBABILITY and not cfg.INPUT.LSJ.ENABLED:
        raise DataError(
            "INPUT.MOSAIC.PROBABILITY is above 0, but INPUT.LSJ.ENABLED False: a mosaic has the "
            "size INPUT.LSJ.SIZE"
        )


def build_mixing(
    cfg: CfgNode,
    mapper: Callable[[dict], dict],
    records: Sequence[dict],
    repeat_factors: torch.Tensor,
) -> Callable[[dict], dict]:
    """The mapper, which mixes images where the configuration asks for it."""
    if not max(cfg.INPUT.COPY_PASTE.PROBABILITY, cfg.INPUT.MOSAIC.PROBABILITY):
        return mapper
    check_mixing(cfg)
    return MixingMapper(cfg, mapper, records, repeat_factors)


def _join(image: np.ndarray, scenes: Sequence[Scene]) -> Scene:
    """The objects of scenes of one size, on an image."""
    objects = {name: np.concatenate([getattr(s, name) for s in scenes]) for name in OF_OBJECTS}
    fields = scenes[0].fields.union(*(scene.fields for scene in scenes))
    return Scene(image=image, fields=fields, **objects)


def _with_one_stuff_per_class(scene: Scene) -> Scene:
    """Joins stuff of the same class, whose shapes do not overlap."""
    kept, boxes, shapes = scene.is_thing.copy(), scene.boxes.copy(), scene.shapes
    areas = scene.areas.copy()
    for label in np.unique(scene.labels[~scene.is_thing]):
        same = np.flatnonzero(~scene.is_thing & (scene.labels == label))
        first = same[0]
        kept[first] = True
        boxes[first, :2], boxes[first, 2:] = boxes[same, :2].min(0), boxes[same, 2:].max(0)
        shapes[first] = np.bitwise_or.reduce(shapes[same], axis=0)
        areas[first] = areas[same].sum()
    return replace(scene, boxes=boxes, areas=areas).take(kept)


def _areas(shapes: np.ndarray) -> np.ndarray:
    """(N,) pixels of shapes (N, H, B)."""
    return _FOREGROUND[shapes].sum(axis=(1, 2), dtype=np.int64)


def _rectangles(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, H, B): the pixels that boxes (N, 4) touch."""
    low, high = np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])
    rows, columns = np.arange(size[0]), np.arange(size[1])
    in_rows = (rows >= low[:, 1:]) & (rows < high[:, 1:])
    in_columns = (columns >= low[:, :1]) & (columns < high[:, :1])
    packed = np.packbits(in_columns, axis=1)
    return np.where(in_rows[:, :, None], packed[:, None], np.uint8(0))


def _boxes_around(shapes: np.ndarray, width: int) -> np.ndarray:
    """(N, 4) float32: x0, y0, x1, y1 around the pixels of shapes (N, H, B), which have some."""
    rows = np.bitwise_or.reduce(shapes, axis=2) > 0
    columns = np.unpackbits(np.bitwise_or.reduce(shapes, axis=1), axis=1, count=width)
    (x0, x1), (y0, y1) = (
        (flags.argmax(axis=1), flags.shape[1] - flags[:, ::-1].argmax(axis=1))
        for flags in (columns, rows)
    )
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.float32)
