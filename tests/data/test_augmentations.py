"""Users' augmentations: what moves an image moves its masks, label maps and boxes alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from maskdino.config import load_config
from maskdino.data import DataError, build_train_mapper
from maskdino.data.augmentations import (
    ImageTransform,
    PixelAugmentation,
    PixelTransform,
    own_augmentations,
)
from maskdino.integration.extensions import AUGMENTATION_REGISTRY

HEIGHT, WIDTH = 48, 64
SQUARE = (slice(8, 20), slice(16, 40))  # rows and columns of the object
BOX = [16.0, 8.0, 40.0, 20.0]


class TurnAndShift:
    """Stands in for Albumentations' Compose: a quarter of a turn, then a shift down by 5."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def set_random_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        moved = []
        for pixels in (image, mask):
            turned = np.rot90(pixels)
            result = np.zeros_like(turned)
            result[5:] = turned[:-5]
            moved.append(result)
        return {"image": moved[0], "mask": moved[1]}


def darker(*, image: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    return {"image": image // 2, "mask": mask}


@pytest.fixture
def register() -> Iterator[dict[str, object]]:
    """Registers what is put into it, for the time of a test, through functions of these names."""
    before = dict(AUGMENTATION_REGISTRY._obj_map)

    class Names(dict):
        def __setitem__(self, name: str, result: object) -> None:
            AUGMENTATION_REGISTRY.register(lambda _cfg: result, name=name)

    yield Names()
    AUGMENTATION_REGISTRY._obj_map.clear()
    AUGMENTATION_REGISTRY._obj_map.update(before)


@pytest.fixture
def record(tmp_path: Path) -> dict:
    """A red rectangle, once as polygon, once as box alone."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[SQUARE] = (250, 60, 20)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    x0, y0, x1, y1 = BOX
    common = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    polygon = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    return {
        "file_name": str(tmp_path / "image.png"),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [{**common, "segmentation": polygon}, common],
    }


def mapped(record: dict, *names: str, masks: bool = True) -> dict:
    cfg = load_config(None, ["INPUT.AUGMENTATIONS", str(list(names)), "INPUT.RANDOM_FLIP", "none"])
    cfg.INPUT.FORMAT = "BGR"
    cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.MIN_SCALE, cfg.INPUT.LSJ.MAX_SCALE = [96, 128], 1.0, 1.0
    cfg.MODEL.MASK_DINO.MASK_ON = masks
    return build_train_mapper(cfg)(record)


def test_polygons_and_boxes_follow_pixels(record: dict, register: dict) -> None:
    register["turn"] = TurnAndShift()
    example = mapped(record, "turn")
    image, instances = example["image"].numpy(), example["instances"]
    bright = image[2] > 125  # red, the last of BGR
    assert image.shape == (3, 128, 96)
    assert bright.sum() == 24 * 48
    masks = instances.gt_masks.to_bool().numpy()
    assert (masks[0] == bright).all()
    rows, columns = np.nonzero(bright)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert instances.gt_boxes.tensor.tolist() == [seen, seen]
    assert instances.gt_has_mask.tolist() == [True, False]


def test_random_numbers_of_a_package_follow_the_stream(record: dict, register: dict) -> None:
    compose = TurnAndShift()
    register["turn"] = compose
    for _ in range(2):
        np.random.seed(7)
        mapped(record, "turn")
    assert len(compose.seeds) == 2
    assert compose.seeds[0] == compose.seeds[1]


def test_colors_leave_boxes_as_they_were(record: dict, register: dict) -> None:
    register["darker"] = [darker, T.NoOpTransform()]
    plain, dark = mapped(record), mapped(record, "darker")
    assert (dark["image"] == plain["image"] // 2).all()
    assert (dark["instances"].gt_masks.bits == plain["instances"].gt_masks.bits).all()
    assert (dark["instances"].gt_boxes.tensor == plain["instances"].gt_boxes.tensor).all()


def test_augmentations_of_detectron2_in_their_order(record: dict, register: dict) -> None:
    register["crop"] = T.CropTransform(0, 0, 60, 50)
    register["turn"] = TurnAndShift()
    register["flip"] = T.HFlipTransform(50)
    example = mapped(record, "crop", "turn", "flip")
    bright = example["image"][2].numpy() > 125
    assert bright.shape == (60, 50)
    assert bright.any()
    assert (example["instances"].gt_masks.to_bool()[0].numpy() == bright).all()


def test_objects_that_leave_the_image_are_dropped(record: dict, register: dict) -> None:
    register["corner"] = lambda image, mask: {"image": image[-8:], "mask": mask[-8:]}
    assert len(mapped(record, "corner")["instances"]) == 0
    assert len(mapped(record, "corner", masks=False)["instances"]) == 0


@pytest.mark.parametrize(
    ("compose", "message"),
    [
        (lambda image, mask: {"image": image / 255.0, "mask": mask}, "leave normalization"),
        (lambda image, mask: {"image": image, "mask": mask * 0.5}, "nearest interpolation"),
        (lambda image, mask: {"image": image[:-1], "mask": mask}, "another size"),
    ],
)
def test_unfit_results_are_named(
    record: dict, register: dict, compose: object, message: str
) -> None:
    register["wrong"] = compose
    with pytest.raises(DataError, match=message):
        mapped(record, "wrong")


def test_unknown_and_unfit_names(register: dict) -> None:
    cfg = load_config(None, ["INPUT.AUGMENTATIONS", "['rain']"])
    register["snow"] = 3
    with pytest.raises(ValueError, match="INPUT.AUGMENTATIONS names 'rain'.* snow.*--import"):
        own_augmentations(cfg)
    cfg.INPUT.AUGMENTATIONS = ["snow"]
    with pytest.raises(TypeError, match="snow of INPUT.AUGMENTATIONS returned 3"):
        own_augmentations(cfg)


def test_albumentations_itself() -> None:
    """Its own treatment of a mask and ours are the same, pixel by pixel."""
    albumentations = pytest.importorskip("albumentations")
    compose = albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Affine(rotate=(-40, 40), scale=(0.7, 1.3), p=1),
            albumentations.ElasticTransform(alpha=40, p=1),
            albumentations.RandomCrop(40, 50, p=1),
            albumentations.RandomBrightnessContrast(p=1),
        ]
    )
    image = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[SQUARE], labels[30:44, 5:30] = 1, 2
    for seed in range(5):
        np.random.seed(seed)
        transform = PixelAugmentation(compose, "RGB").get_transform(image)
        np.random.seed(seed)
        compose.set_random_seed(int(np.random.randint(2**31)))
        expected = compose(image=image, mask=labels)
        assert isinstance(transform, PixelTransform)
        assert (transform.apply_image(image) == expected["image"]).all()
        assert (transform.apply_segmentation(labels) == expected["mask"]).all()
        box = transform.apply_box(np.array([BOX]))[0]
        rows, columns = np.nonzero(expected["mask"] == 1)
        if len(rows):
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == seen
    colors = albumentations.Compose([albumentations.HueSaturationValue(p=1)])
    assert type(PixelAugmentation(colors, "BGR").get_transform(image)) is ImageTransform


def test_pixels_whose_centers_lie_on_an_edge_are_in_one_of_two_boxes() -> None:
    rows, columns = np.meshgrid(np.arange(6), np.arange(8), indexing="ij")
    transform = PixelTransform(np.zeros((6, 8, 3), np.uint8), np.stack([rows, columns], -1), (6, 8))
    boxes = np.array([[0.5, 1.5, 2.5, 4.5], [2.5, 1.5, 5, 4.5]])
    assert transform.apply_box(boxes).tolist() == [[0, 1, 2, 4], [2, 1, 5, 4]]
