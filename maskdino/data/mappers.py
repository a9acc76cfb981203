"""Mappers: one dataset dict in, one training example out.

Shape key: N objects of an image, H, W pixels of the transformed image.

All three give "image", (C, H, W) uint8 in INPUT.FORMAT, and "instances", detectron2's `Instances`
with `gt_classes` (N,) int64, `gt_boxes` (x0, y0, x1, y1 in pixels) and `gt_masks` (PackedMasks).
Objects that the crop leaves nothing of are dropped; an example may have none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from maskdino.categories import Categories
from maskdino.data import masks
from maskdino.data.panoptic_checks import read_segments
from maskdino.data.reading import (
    DataError,
    check_same_size,
    read_image,
    read_label_map,
    segment_indices,
)
from maskdino.data.transforms import Always, build_augmentations
from maskdino.integration.extensions import MAPPER_REGISTRY
from maskdino.system.words import counted


class PinnableInstances(Instances):
    """Instances whose masks a DataLoader brings where a GPU can fetch them (pin_memory)."""

    def pin_memory(self) -> PinnableInstances:
        """The same objects, with `gt_masks` in pinned memory.

        The other fields are a few bytes, and are joined with those of other images first.
        """
        result = PinnableInstances(self.image_size, **self.get_fields())
        if self.has("gt_masks"):
            result.gt_masks = self.gt_masks.pin_memory()
        return result


class Mapper:
    """What the mappers share: reads and augments the image, and puts the result together.

    They are called with detectron2's dict of an image, with "file_name", which stays as it is, and
    give it with "image" and, in training, "instances". A `DataError` names a file that is wrong.
    """

    def __init__(
        self, *, augmentations: Sequence[T.Augmentation], image_format: str, num_classes: int
    ) -> None:
        """Takes augmentations, in their order, INPUT.FORMAT, and the number of the class head.

        A class that it has not is an error.
        """
        self.augmentations = T.AugmentationList(
            [Always(item) if isinstance(item, T.Transform) else item for item in augmentations]
        )
        self.image_format = image_format
        self.num_classes = num_classes

    def _read(self, dataset_dict: dict) -> tuple[dict, np.ndarray]:
        """Gives a copy of the dict with "height" and "width" of the file, and the image.

        The image is (height, width, C) uint8.
        """
        example = copy.copy(dataset_dict)
        image = read_image(example["file_name"], self.image_format)
        try:
            detection_utils.check_image_size(example, image)
        except detection_utils.SizeMismatchError as error:
            raise DataError(str(error)) from error
        return example, image

    def _require(self, dataset_dict: dict, key: str) -> None:
        if key not in dataset_dict:
            raise DataError(
                f"image {dataset_dict['file_name']} comes without {key!r}, which "
                f"{type(self).__name__} needs: "
                "does INPUT.DATASET_MAPPER_NAME fit the dataset?"
            )

    def _check_class(self, category: int) -> int:
        if not 0 <= category < self.num_classes:
            raise DataError(
                f"category {category} is outside of the model's "
                f"{counted(self.num_classes, 'class')}"
            )
        return category


class InstanceMapper(Mapper):
    """Boxes, and masks where the data has them, of COCO-style annotations, but for crowd regions.

    Without any mask in the annotations of an image there is no `gt_masks`. If not all have one,
    `gt_has_mask` (N,) bool tells which.
    """

    @configurable
    def __init__(self, *, use_masks: bool, **common) -> None:
        """Takes what this task needs; without `use_masks` it feeds a pure detector."""
        super().__init__(**common)
        self.use_masks = use_masks

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Reads MASK_ON, and what all mappers need."""
        return {**_common_arguments(cfg, is_train), "use_masks": cfg.MODEL.MASK_DINO.MASK_ON}

    def __call__(self, dataset_dict: dict) -> dict:
        """Makes an example, with "instances" for "annotations"; the dict stays as it is."""
        self._require(dataset_dict, "annotations")
        example, image = self._read(dataset_dict)
        annotations = [a for a in example.pop("annotations") if not a.get("iscrowd", 0)]
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        size, before = aug_input.image.shape[:2], image.shape[:2]

        classes, boxes, cropped = [], [], []
        for annotation in annotations:
            try:
                category = self._check_class(annotation["category_id"])
                box, mask = self._transform(annotation, transforms, before, size)
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                # detectron2 asserts that boxes have four numbers.
                raise DataError(
                    f"an annotation of image {example['file_name']} is wrong: {error}"
                ) from error
            if box is not None:
                classes.append(category)
                boxes.append(box)
                cropped.append(mask)
        any_mask = self.use_masks and any(a.get("segmentation") for a in annotations)
        example["image"] = _image_tensor(aug_input.image)
        instances = _instances(size, classes, boxes, cropped if any_mask else None)
        if self.use_masks and not any_mask:  # known to have none, not forgotten
            instances.gt_has_mask = torch.zeros(len(instances), dtype=torch.bool)
        example["instances"] = instances
        return example

    def _transform(
        self,
        annotation: dict,
        transforms: T.TransformList,
        before: tuple[int, int],
        after: tuple[int, int],
    ) -> tuple[Sequence[float] | None, masks.CroppedMask | None]:
        """Box and mask of an object in the transformed image; no box where nothing is left."""
        if self.use_masks and annotation.get("segmentation"):
            mask = masks.transform_mask(annotation["segmentation"], transforms, before, after)
            return (None, None) if mask is None else (mask.box(), mask)
        box = np.array(
            BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS),
            float,
        )
        if not np.isfinite(box).all():
            raise DataError(f"a box is not finite: {box.tolist()}")
        box = transforms.apply_box(box[None])[0].clip(0, (after[1], after[0]) * 2)
        return (box if (box[2:] > box[:2]).all() else None), None


class PanopticMapper(Mapper):
    """Segments of things and stuff, of COCO's panoptic format.

    `gt_is_thing` (N,) bool tells which is which.
    """

    @configurable
    def __init__(self, *, thing_classes: Iterable[int], **common) -> None:
        """Takes what this task needs; classes that are no things are stuff."""
        super().__init__(**common)
        self.thing_classes = frozenset(thing_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Reads which classes are things, and what all mappers need."""
        is_thing = Categories.from_config(cfg).is_thing
        things = [label for label, thing in enumerate(is_thing) if thing]
        return {**_common_arguments(cfg, is_train), "thing_classes": things}

    def __call__(self, dataset_dict: dict) -> dict:
        """Makes an example of "pan_seg_file_name" and "segments_info"; the dict stays as it is."""
        self._require(dataset_dict, "segments_info")
        example, image = self._read(dataset_dict)
        colors, segments = self._read_segments(example, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        ids = [segment["id"] for segment in segments]
        indices = segment_indices(transforms.apply_segmentation(colors), ids)
        example["image"] = _image_tensor(aug_input.image)
        instances = _instances_of_map(indices, [segment["category_id"] for segment in segments])
        classes = instances.gt_classes.tolist()
        instances.gt_is_thing = torch.tensor(
            [c in self.thing_classes for c in classes], dtype=torch.bool
        )
        example["instances"] = instances
        return example

    def _read_segments(self, example: dict, image: np.ndarray) -> tuple[np.ndarray, list[dict]]:
        """The image of segment ids (height, width, 3), and the segments that are no crowds."""
        colors = read_segments(example, image.shape[:2])
        segments = example.pop("segments_info")
        try:
            for segment in segments:
                self._check_class(segment["category_id"])
        except DataError as error:
            name = example["pan_seg_file_name"]
            raise DataError(f"a segment of {name} is wrong: {error}") from error
        return colors, [segment for segment in segments if not segment.get("iscrowd", 0)]


class SemanticMapper(Mapper):
    """One object for each class of a semantic map that the image shows: all of its pixels."""

    @configurable
    def __init__(self, *, ignore_label: int, **common) -> None:
        """Takes what this task needs, and the value of pixels without a class, in the files."""
        super().__init__(**common)
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Reads the ignored label of the first training dataset, and what all mappers need."""
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        return {
            **_common_arguments(cfg, is_train, ignored_category=0),
            "ignore_label": metadata.get("ignore_label", 255),
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Makes an example of "sem_seg_file_name"; the dict stays as it is."""
        self._require(dataset_dict, "sem_seg_file_name")
        example, image = self._read(dataset_dict)
        name = example["sem_seg_file_name"]
        labels = read_label_map(name, self.num_classes, self.ignore_label)
        check_same_size(image, labels, example["file_name"], name)
        aug_input = T.AugInput(image, sem_seg=labels)
        self.augmentations(aug_input)
        example["image"] = _image_tensor(aug_input.image)
        example["instances"] = _instances_of_map(aug_input.sem_seg, range(self.num_classes))
        return example


class InferenceMapper(Mapper):
    """Only the image, resized as INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST say; no ground truth."""

    @configurable
    def __init__(self, **common) -> None:
        """Takes what all mappers need."""
        super().__init__(**common)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Reads what all mappers need."""
        return _common_arguments(cfg, is_train=False)

    def __call__(self, dataset_dict: dict) -> dict:
        """Gives the dict with "image", and with "height" and "width" of the file."""
        example, image = self._read(dataset_dict)
        aug_input = T.AugInput(image)
        self.augmentations(aug_input)
        example.pop("annotations", None)
        example["image"] = _image_tensor(aug_input.image)
        return example


MAPPER_REGISTRY.register(InstanceMapper, name="instance")
MAPPER_REGISTRY.register(PanopticMapper, name="panoptic")
MAPPER_REGISTRY.register(SemanticMapper, name="semantic")


def build_train_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """The training mapper that INPUT.DATASET_MAPPER_NAME names; ValueError if there is none."""
    return MAPPER_REGISTRY.find(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, is_train=True)


def build_test_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """The mapper of evaluation, for any task; unlike detectron2's, it names broken images."""
    return InferenceMapper(cfg)


def _common_arguments(cfg: CfgNode, is_train: bool, ignored_category: int | None = None) -> dict:
    return {
        "augmentations": build_augmentations(cfg, is_train, ignored_category),
        "image_format": cfg.INPUT.FORMAT,
        "num_classes": cfg.MODEL.MASK_DINO.NUM_CLASSES,
    }


def _image_tensor(image: np.ndarray) -> torch.Tensor:
    """(C, H, W) uint8."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _instances_of_map(labels: np.ndarray, classes: Sequence[int]) -> Instances:
    """The objects that a map (H, W) shows: 0 is none, else the place in `classes` + 1."""
    present = np.flatnonzero(np.bincount(labels.ravel())[1:]).tolist()
    cropped = [masks.CroppedMask.around(labels == place + 1) for place in present]
    boxes = [mask.box() for mask in cropped]
    return _instances(labels.shape, [classes[place] for place in present], boxes, cropped)


def _instances(
    size: tuple[int, int],
    classes: Sequence[int],
    boxes: Sequence[Sequence[float] | None],
    cropped: Sequence[masks.CroppedMask | None] | None,
) -> Instances:
    """Puts N objects together; `cropped` is None where the image has no masks."""
    instances = PinnableInstances(size)
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    # Also (0, 4) where there are none.
    instances.gt_boxes = Boxes(torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)))
    if cropped is not None:
        instances.gt_masks = masks.pack(cropped, size)
        has_mask = [mask is not None for mask in cropped]
        if not all(has_mask):
            instances.gt_has_mask = torch.tensor(has_mask, dtype=torch.bool)
    return instances
