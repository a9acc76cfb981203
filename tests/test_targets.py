"""Ground truth to targets: formats of masks, the frame of boxes, and bad annotations."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch.utils.data._utils.pin_memory import pin_memory

from maskdino.data.mappers import PinnableInstances
from maskdino.modeling.denoising import slot_index
from maskdino.structures import Matches, PackedMasks, Targets
from maskdino.targets import prepare_targets
from tests.helpers import drawn_instances, rectangles
from tests.pretend_device import CUDA, PretendDevice, missing_api

CPU = torch.device("cpu")
THINGS = torch.tensor([True, False, True, True, True])


def prepare(*images: Instances, canvas: tuple[int, int] = (32, 64), **options: object) -> Targets:
    return prepare_targets(images, canvas, THINGS, CPU, **options)


def test_boxes_are_divided_by_the_canvas() -> None:
    image = Instances((20, 40))
    image.gt_classes = torch.tensor([0, 1])
    image.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 40.0, 20.0], [8.0, 4.0, 16.0, 12.0]]))
    targets = prepare(image)
    expected = torch.tensor(
        [[20 / 64, 10 / 32, 40 / 64, 20 / 32], [12 / 64, 8 / 32, 8 / 64, 8 / 32]]
    )
    torch.testing.assert_close(targets.boxes, expected)
    assert targets.is_thing.tolist() == [True, False]
    assert targets.has_mask.tolist() == [False, False]
    assert targets.masks.size == (32, 64) and not targets.masks.to_bool().any()


@pytest.mark.parametrize("kind", ["packed", "bitmasks", "tensor", "polygons"])
def test_masks_of_all_formats(kind: str) -> None:
    boxes = torch.tensor([[2.0, 3.0, 10.0, 9.0], [0.0, 0.0, 30.0, 20.0]])
    masks = rectangles(boxes, (20, 30))
    image = Instances((20, 30))
    image.gt_classes = torch.tensor([2, 0])
    polygons = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes.tolist()]
    image.gt_masks = {
        "packed": PackedMasks.from_bool(masks),
        "bitmasks": BitMasks(masks),
        "tensor": masks,
        "polygons": PolygonMasks(polygons),
    }[kind]
    targets = prepare(image)
    expected = torch.zeros(2, 32, 64, dtype=torch.bool)
    expected[:, :20, :30] = masks
    assert torch.equal(targets.masks.to_bool(), expected)
    assert targets.has_mask.all()
    # Without gt_boxes the boxes are those of the masks, whose last pixel lies inside.
    torch.testing.assert_close(targets.boxes[0], torch.tensor([6 / 64, 6 / 32, 8 / 64, 6 / 32]))


def test_images_with_and_without_masks_and_objects() -> None:
    images = (
        drawn_instances((20, 30), 2),
        drawn_instances((32, 64), 0),
        drawn_instances((10, 10), 3, masks=False),
        drawn_instances((16, 16), 2),
    )
    images[3].gt_has_mask = torch.tensor([False, True])
    targets = prepare(*images, names=["a", "b", "c", "d"])
    assert targets.counts == (2, 0, 3, 2) and targets.offsets == (0, 2, 2, 5) and len(targets) == 7
    assert targets.has_mask.tolist() == [True, True, False, False, False, False, True]
    assert targets.names == ("a", "b", "c", "d")
    assert torch.equal(targets.labels, torch.cat([image.gt_classes for image in images]))
    assert torch.equal(targets.masks.to_bool()[5:, :16, :16], images[3].gt_masks.to_bool())


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_what_an_image_says_of_things_goes_before_what_is_known_of_classes(number: int) -> None:
    images = [drawn_instances((20, 30), count) for count in (3, 0, 2)]
    expected = [THINGS[image.gt_classes] for image in images]
    for i in range(number):
        images[i].gt_is_thing = ~expected[i]
        expected[i] = images[i].gt_is_thing
    found = prepare(*images).is_thing
    assert torch.equal(found, torch.cat(expected)) and found.dtype == torch.bool


@pytest.mark.parametrize("kind", ["packed", "bitmasks", "polygons", "none"])
def test_images_without_objects(kind: str) -> None:
    image = Instances((20, 30))
    image.gt_classes = torch.zeros(0, dtype=torch.int64)
    image.gt_boxes = Boxes(torch.zeros(0, 4))
    if kind != "none":
        image.gt_masks = {
            "packed": PackedMasks.empty(0, (20, 30)),
            "bitmasks": BitMasks(torch.zeros(0, 20, 30)),
            "polygons": PolygonMasks([]),
        }[kind]
    targets = prepare(image, image)
    assert len(targets) == 0 and targets.boxes.shape == (0, 4) and len(targets.masks) == 0
    assert targets.boxes.dtype == torch.float32 and targets.has_mask.dtype == torch.bool


@pytest.mark.parametrize("label", [-1, 5])
def test_wrong_classes_name_the_image(label: int) -> None:
    image = drawn_instances((20, 30), 2)
    image.gt_classes[1] = label
    with pytest.raises(ValueError, match=f"second.png has an object of class {label};.*0 to 4"):
        prepare(drawn_instances((20, 30), 2), image, names=["first.png", "second.png"])


@pytest.mark.parametrize("size", [(33, 10), (10, 65)])
def test_large_images_name_themselves(size: tuple[int, int]) -> None:
    message = rf"number 0 of the batch of \({size[0]}, {size[1]}\) pixels"
    with pytest.raises(ValueError, match=message):
        prepare(drawn_instances(size, 1))


@pytest.mark.parametrize("kind", ["packed", "bitmasks", "tensor"])
def test_masks_of_another_size_name_their_image(kind: str) -> None:
    image = drawn_instances((20, 30), 2)
    masks = torch.ones(2, 30, 20, dtype=torch.bool)
    image.gt_masks = {
        "packed": PackedMasks.from_bool(masks),
        "bitmasks": BitMasks(masks),
        "tensor": masks,
    }[kind]
    with pytest.raises(ValueError, match=r"x.png of \(20, 30\) pixels has gt_masks of \(30, 20\)"):
        prepare(image, names=["x.png"])


def test_images_without_annotation_name_themselves() -> None:
    image = Instances((20, 30))
    image.gt_classes = torch.tensor([0])
    with pytest.raises(ValueError, match="x.png has neither gt_boxes nor gt_masks"):
        prepare(image, names=["x.png"])


def test_inputs_are_not_modified() -> None:
    image = drawn_instances((20, 30), 2)
    before = image.gt_boxes.tensor.clone()
    targets = prepare(image)
    targets.boxes.zero_()
    assert torch.equal(image.gt_boxes.tensor, before)


@pytest.mark.skipif(bool(missing_api()), reason=missing_api())
@pytest.mark.parametrize("loader_pins", [True, False])
@pytest.mark.parametrize("size", [(32, 64), (20, 30)])
def test_a_gpu_fetches_targets_without_the_host(
    size: tuple[int, int], loader_pins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is pinned, by the thread of the loader or here, and nothing twice."""
    sizes = []
    pin = torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: sizes.append(x.numel()) or pin(x))
    images = [drawn_instances(size, number) for number in (3, 0, 2)]
    images.append(drawn_instances(size, 2, masks=False))
    with PretendDevice() as device:
        batch = [{"instances": PinnableInstances(i.image_size, **i.get_fields())} for i in images]
        if loader_pins:
            batch = pin_memory(batch)
            assert len(sizes) == 3
            sizes.clear()
        of_loader = [x["instances"] for x in batch]
        targets = prepare_targets(of_loader, (32, 64), device.put(THINGS), CUDA)
        # Labels, boxes and has_mask of all, and the masks of the two images that have some.
        assert len(sizes) == 3 + (0 if loader_pins else 2)
        slot_index(targets.counts, CUDA)
        Matches.from_numpy([np.zeros((4, 2), np.int64)], CUDA)
        assert {kind for kind, _ in device.copies} == {"pinned to the device"}
        assert device.copies.total() == 3 + 2 + 2
        assert not device.waits
        expected = prepare(*images)
        for name in ("labels", "boxes", "is_thing", "has_mask"):
            assert torch.equal(getattr(targets, name).numbers, getattr(expected, name))
        assert torch.equal(targets.masks.bits.numbers, expected.masks.bits)
