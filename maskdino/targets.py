"""From the ground truth of images to targets: boxes and packed masks of the padded canvas.

Shape key: N objects of the batch; H, W pixels of the padded canvas.
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor

from maskdino.ops.boxes import xyxy_to_cxcywh
from maskdino.structures import PackedMasks, Targets, send


def prepare_targets(
    instances: Sequence[Instances],
    canvas: tuple[int, int],
    is_thing: Tensor,
    device: torch.device,
    names: Sequence[str] = (),
    *,
    with_masks: bool = False,
) -> Targets:
    """Collects the objects of a batch.

    Args:
        instances: one for each image, in pixels of that image, with `gt_classes`, and with
            `gt_boxes` or `gt_masks` (PackedMasks, BitMasks, PolygonMasks or an (N, H, W) tensor
            of the image's size); `gt_has_mask` says which of the masks are none. Images whose
            `gt_masks` is missing train boxes only. `gt_is_thing` says which objects are things.
        canvas: (height, width) of the padded batch.
        is_thing: (classes,) bool, for images that do not say. "Stuff" is left out of box training
            where that is decoupled (section 3.6).
        device: where the targets shall be.
        names: of the images, for messages.
        with_masks: whether masks are learned: some image must then have `gt_masks`, or say by
            `gt_has_mask` that it has none.

    Returns:
        Targets whose boxes are divided by the canvas.

    Raises:
        ValueError: an object's class is not among `is_thing`'s, an image is larger than the canvas,
            an image has neither boxes nor masks, masks have another size than their image, or
            masks are learned, and no image of the batch knows of any.
    """
    names = tuple(names) or tuple(f"number {i} of the batch" for i in range(len(instances)))
    if with_masks and not any(
        i.has("gt_masks") or i.has("gt_has_mask") for i in instances if len(i)
    ):
        _refuse_missing_masks(instances, names)
    height, width = canvas
    labels, boxes, masks, has_mask = [], [], [], []
    for image, name in zip(instances, names, strict=True):
        _check(image, canvas, len(is_thing), name)
        packed = _packed_masks(image, name)
        known = torch.full((len(image),), packed is not None)
        labels.append(image.gt_classes)
        boxes.append(_boxes(image, packed, name))
        masks.append(PackedMasks.empty(len(image), (0, 0)) if packed is None else packed)
        has_mask.append(image.gt_has_mask if image.has("gt_has_mask") else known)
    all_labels = send(torch.cat(labels), device)
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    return Targets(
        labels=all_labels,
        boxes=send(xyxy_to_cxcywh(torch.cat(boxes)) / size, device),
        is_thing=_things(instances, is_thing.to(device)[all_labels]),
        has_mask=send(torch.cat(has_mask), device),
        masks=PackedMasks.join(masks, canvas, device),
        counts=tuple(len(image) for image in instances),
        names=names,
    )


def _refuse_missing_masks(instances: Sequence[Instances], names: Sequence[str]) -> None:
    """Ends a training whose mask losses would stay 0 in silence."""
    if any(len(image) for image in instances):
        raise ValueError(
            f"the model learns masks (MODEL.MASK_DINO.MASK_ON), but images {', '.join(names)} have "
            "no gt_masks: detectron2's mapper reads masks where MODEL.MASK_ON is True "
            "(maskdino.adapt_to_detectron2 sets it); data without masks need "
            "MODEL.MASK_DINO.MASK_ON False"
        )


def _things(instances: Sequence[Instances], of_class: Tensor) -> Tensor:
    """(N,) bool: what an image says of its objects, else what is known of their classes (N,)."""
    told = [image.has("gt_is_thing") for image in instances]
    if not any(told):
        return of_class
    flags = [
        image.gt_is_thing if says else torch.zeros(len(image), dtype=torch.bool)
        for image, says in zip(instances, told, strict=True)
    ]
    things = send(torch.cat(flags), of_class.device)
    if all(told):
        return things
    known = [torch.full((len(image),), s) for image, s in zip(instances, told, strict=True)]
    return torch.where(send(torch.cat(known), of_class.device), things, of_class)


def _check(image: Instances, canvas: tuple[int, int], num_classes: int, name: str) -> None:
    if image.image_size[0] > canvas[0] or image.image_size[1] > canvas[1]:
        raise ValueError(
            f"image {name} of {tuple(image.image_size)} pixels does not fit the canvas "
            f"{tuple(canvas)}"
        )
    if not len(image):
        return
    low, high = int(image.gt_classes.min()), int(image.gt_classes.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"image {name} has an object of class {low if low < 0 else high}; the model's classes "
            f"are 0 to {num_classes - 1} (MODEL.MASK_DINO.NUM_CLASSES)"
        )


def _packed_masks(image: Instances, name: str) -> PackedMasks | None:
    if not image.has("gt_masks"):
        return None
    masks, size = image.gt_masks, tuple(image.image_size)
    if not len(masks):
        return PackedMasks.empty(0, size)
    if isinstance(masks, PolygonMasks):
        bitmaps = [polygons_to_bitmask(polygons, *size) for polygons in masks.polygons]
        return PackedMasks.from_bool(np.stack(bitmaps))
    if not isinstance(masks, PackedMasks):
        masks = PackedMasks.from_bool(masks.tensor if isinstance(masks, BitMasks) else masks)
    if masks.size != size:
        raise ValueError(f"image {name} of {size} pixels has gt_masks of {masks.size} pixels")
    return masks


def _boxes(image: Instances, masks: PackedMasks | None, name: str) -> Tensor:
    """(n, 4) xyxy in pixels of the image."""
    if image.has("gt_boxes"):
        boxes = image.gt_boxes
        return (boxes.tensor if isinstance(boxes, Boxes) else boxes).float()
    if masks is None:
        raise ValueError(f"image {name} has neither gt_boxes nor gt_masks")
    return BitMasks(masks.to_bool()).get_bounding_boxes().tensor
