"""Mappers: masks and boxes follow the image, and bad input is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from maskdino.data import (
    DataError,
    InstanceMapper,
    PanopticMapper,
    SemanticMapper,
    build_test_mapper,
    build_train_mapper,
)
from tests.data.synthetic import draw

PLAIN = ("INPUT.LSJ.ENABLED", False, "INPUT.RANDOM_FLIP", "none")
UNCHANGED = (*PLAIN, "INPUT.MIN_SIZE_TRAIN", (0,))


def triangle() -> list[list[float]]:
    return [[10.0, 8.0, 70.0, 20.0, 30.0, 50.0]]


def area() -> int:
    """Pixels of the triangle."""
    return int(draw(np.array(triangle()).reshape(-1, 2), (60, 80)).sum())


def annotation(**changes: object) -> dict:
    common = {"category_id": 0, "bbox": [10, 8, 60, 42], "bbox_mode": BoxMode.XYWH_ABS}
    return {**common, "segmentation": triangle(), **changes}


@pytest.fixture
def make_dict(save_image: Callable) -> Callable[..., dict]:
    """Makes a dataset dict of an image with a white triangle on black."""

    def make(*annotations: dict, **more: object) -> dict:
        mask = draw(np.array(triangle()).reshape(-1, 2), (60, 80))
        path = save_image(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
        return {"file_name": path, "image_id": 7, "annotations": list(annotations), **more}

    return make


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """(N, 4) boxes of (N, H, W) masks, by a slow loop."""
    boxes = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize("flip", ["none", "dihedral"])
@pytest.mark.parametrize(
    "resizing",
    [
        ("INPUT.LSJ.MIN_SCALE", 0.6),
        ("INPUT.LSJ.ENABLED", False, "INPUT.MIN_SIZE_TRAIN", (70, 90), "INPUT.CROP.ENABLED", True),
    ],
)
def test_masks_and_boxes_follow_the_image(
    make_cfg: Callable, make_dict: Callable, flip: str, resizing: tuple
) -> None:
    mapper = build_train_mapper(make_cfg("INPUT.RANDOM_FLIP", flip, *resizing))
    for seed in range(12):
        np.random.seed(seed)
        example = mapper(make_dict(annotation()))
        instances, bright = example["instances"], example["image"][0] > 127
        assert instances.image_size == tuple(bright.shape)
        padding = (example["image"] == 128).all(0)
        bright &= ~padding
        if not len(instances):
            assert bright.sum() < 10
            continue
        (mask,) = instances.gt_masks.to_bool()
        assert (mask & bright).sum() > 0.9 * (mask | bright).sum()
        assert torch.equal(instances.gt_boxes.tensor, boxes_of(mask[None]))


def test_example_of_an_instance(make_cfg: Callable, make_dict: Callable) -> None:
    given = make_dict(annotation(), annotation(iscrowd=1))
    example = build_train_mapper(make_cfg(*UNCHANGED))(given)
    assert (example["height"], example["width"], example["image_id"]) == (60, 80, 7)
    assert example["image"].dtype == torch.uint8 and tuple(example["image"].shape) == (3, 60, 80)
    instances = example["instances"]
    assert instances.gt_classes.tolist() == [0] and instances.gt_classes.dtype == torch.int64
    (mask,) = instances.gt_masks.to_bool()
    assert (mask == (example["image"][0] > 0)).all()
    assert not instances.has("gt_has_mask") and "annotations" not in example
    assert len(given["annotations"]) == 2


def test_loaders_pin_images_and_masks(
    make_cfg: Callable, make_dict: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is large reaches pinned memory in the loader's thread, not in the training."""
    mapper = build_train_mapper(make_cfg(*UNCHANGED))
    copied = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, _=None: copied.append(x) or x.clone())
    given = (annotation(), annotation()), (annotation(segmentation=[]),)
    examples = [mapper(make_dict(*annotations)) for annotations in given]
    loaded = pin_memory(examples)
    sources = [examples[0]["image"], examples[0]["instances"].gt_masks.bits, examples[1]["image"]]
    assert sorted(map(id, copied)) == sorted(map(id, sources))
    assert loaded[0]["instances"].gt_masks.size == (60, 80)
    assert len(loaded[0]["instances"]) == 2 and not loaded[1]["instances"].has("gt_masks")


def test_boxes_without_masks(make_cfg: Callable, make_dict: Callable) -> None:
    mapper = build_train_mapper(make_cfg(*PLAIN, "INPUT.MIN_SIZE_TRAIN", (120,)))
    boxes = [annotation(segmentation=[]), annotation(bbox=[3, 4, 1, 1], segmentation=None)]
    instances = mapper(make_dict(*boxes))["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[20, 16, 140, 100], [6, 8, 8, 10]]
    assert not instances.has("gt_masks")
    assert instances.gt_has_mask.tolist() == [False, False]


def test_some_masks(make_cfg: Callable, make_dict: Callable) -> None:
    given = make_dict(annotation(segmentation=[], bbox=[1, 2, 3, 4]), annotation())
    instances = build_train_mapper(make_cfg(*UNCHANGED))(given)["instances"]
    assert instances.gt_has_mask.tolist() == [False, True]
    assert instances.gt_masks.to_bool().sum((1, 2)).tolist() == [0, area()]
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 4, 6], [10, 8, 69, 50]]


def test_masks_can_be_switched_off(make_cfg: Callable, make_dict: Callable) -> None:
    mapper = build_train_mapper(make_cfg(*UNCHANGED, "MODEL.MASK_DINO.MASK_ON", False))
    instances = mapper(make_dict(annotation()))["instances"]
    assert not instances.has("gt_masks")
    assert instances.gt_boxes.tensor.tolist() == [[10, 8, 70, 50]]


def test_what_is_outside_or_empty_is_dropped(make_cfg: Callable, make_dict: Callable) -> None:
    outside = annotation(segmentation=[], bbox=[200, 200, 5, 5])
    flat = annotation(segmentation=[], bbox=[5, 5, 0, 5])
    degenerate = annotation(segmentation=[[1.0, 1.0, 5.0, 5.0]])
    nothing = annotation(segmentation={"size": [60, 80], "counts": [4800]})
    given = make_dict(outside, flat, degenerate, nothing)
    instances = build_train_mapper(make_cfg(*UNCHANGED))(given)["instances"]
    assert len(instances) == 0 and len(instances.gt_masks) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4) and instances.gt_classes.shape == (0,)


def test_zero_and_a_thousand_objects(make_cfg: Callable, make_dict: Callable) -> None:
    mapper = build_train_mapper(make_cfg(*UNCHANGED))
    assert len(mapper(make_dict())["instances"]) == 0
    instances = mapper(make_dict(*[annotation()] * 1000))["instances"]
    assert len(instances) == 1000 and instances.gt_masks.to_bool().sum() == 1000 * area()


@pytest.mark.parametrize("size", [(1, 1), (3, 31)])
def test_tiny_images(make_cfg: Callable, save_image: Callable, size: tuple[int, int]) -> None:
    rle = {"size": list(size), "counts": [0, size[0] * size[1]]}
    path = save_image(np.full((*size, 3), 200, np.uint8))
    given = {"file_name": path, "annotations": [annotation(segmentation=rle)]}
    example = build_train_mapper(make_cfg("INPUT.LSJ.MIN_SCALE", 1.0))(given)
    assert tuple(example["image"].shape) == (3, 64, 96) and len(example["instances"]) == 1


def test_photos_are_turned_upright(make_cfg: Callable, tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    given = {"file_name": str(tmp_path / "turned.jpg"), "annotations": []}
    assert build_train_mapper(make_cfg(*UNCHANGED))(given)["image"].shape == (3, 30, 20)


def test_errors_name_the_file(make_cfg: Callable, make_dict: Callable, tmp_path: Path) -> None:
    mapper = build_train_mapper(make_cfg(*UNCHANGED))
    for wrong, message in (
        (annotation(category_id=1), "category 1 is outside of the model's 1 class"),
        (annotation(segmentation={"size": [9, 9], "counts": [81]}), r"\[9, 9\].*\(60, 80\)"),
        (annotation(segmentation=[], bbox=[0, 0, float("nan"), 5]), "not finite"),
        ({"category_id": 0}, "bbox"),
        (annotation(segmentation=[], bbox=[1, 2, 3]), "4"),
        (annotation(segmentation=[["a"]]), "'a'"),
    ):
        with pytest.raises(DataError, match=rf"image\.png.*{message}"):
            mapper(make_dict(wrong))
    with pytest.raises(DataError, match=r"image\.png, got \(80, 60\), expect \(81, 60\)"):
        mapper(make_dict(height=60, width=81))
    with pytest.raises(DataError, match="missing.png does not exist"):
        mapper({"file_name": str(tmp_path / "missing.png"), "annotations": []})

    whole = Path(make_dict()["file_name"]).read_bytes()
    for name, content in (("truncated.png", whole[: len(whole) // 2]), ("text.png", b"no image")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read image .*{name}"):
            mapper({"file_name": str(tmp_path / name), "annotations": []})
    with pytest.raises(DataError, match="'annotations'.*InstanceMapper.*DATASET_MAPPER_NAME"):
        mapper({"file_name": "some.jpg"})


@pytest.fixture
def panoptic_cfg(make_cfg: Callable) -> CfgNode:
    name = "mapper_test_panoptic"
    if "thing_dataset_id_to_contiguous_id" not in MetadataCatalog.get(name).as_dict():
        MetadataCatalog.get(name).set(thing_dataset_id_to_contiguous_id={10: 0})
    options = ("DATASETS.TRAIN", (name,), "MODEL.MASK_DINO.NUM_CLASSES", 3)
    return make_cfg(*UNCHANGED, *options, "INPUT.DATASET_MAPPER_NAME", "panoptic")


@pytest.fixture
def panoptic_dict(save_image: Callable) -> dict:
    """Left a thing (id 300), right stuff (id 70000), below a crowd (id 5) and nothing."""
    colors = np.zeros((20, 30, 3), np.uint8)
    colors[:10, :15] = [44, 1, 0]
    colors[:10, 15:] = [112, 17, 1]
    colors[10:, :3] = [5, 0, 0]
    return {
        "file_name": save_image(np.zeros((20, 30, 3), np.uint8)),
        "pan_seg_file_name": save_image(colors, "segments.png"),
        "segments_info": [
            {"id": 300, "category_id": 0},
            {"id": 70000, "category_id": 2, "iscrowd": 0},
            {"id": 5, "category_id": 0, "iscrowd": 1},
        ],
    }


def test_panoptic_segments(panoptic_cfg: CfgNode, panoptic_dict: dict) -> None:
    example = build_train_mapper(panoptic_cfg)(panoptic_dict)
    instances = example["instances"]
    assert instances.gt_classes.tolist() == [0, 2]
    assert instances.gt_is_thing.tolist() == [True, False]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 15, 10], [15, 0, 30, 10]]
    assert instances.gt_masks.to_bool().sum((1, 2)).tolist() == [150, 150]
    assert (example["height"], example["width"]) == (20, 30)


def test_panoptic_segments_follow_the_crop(panoptic_cfg: CfgNode, panoptic_dict: dict) -> None:
    panoptic_cfg.INPUT.LSJ.ENABLED = True
    mapper = build_train_mapper(panoptic_cfg)
    for seed in range(10):
        np.random.seed(seed)
        instances = mapper(panoptic_dict)["instances"]
        masks = instances.gt_masks.to_bool()
        assert masks.any(dim=(1, 2)).all() and masks.sum(0).max() <= 1
        assert torch.equal(instances.gt_boxes.tensor, boxes_of(masks))


def test_panoptic_errors(panoptic_cfg: CfgNode, panoptic_dict: dict, save_image: Callable) -> None:
    mapper = build_train_mapper(panoptic_cfg)
    segments = panoptic_dict["segments_info"]
    small = save_image(np.zeros((20, 29, 3), np.uint8), "small.png")
    for changes, message in (
        ({"segments_info": [*segments, {"id": 9, "category_id": 1}]}, r"segments.png.*\[9\]"),
        ({"segments_info": [{"id": 300, "category_id": 3}]}, r"segments.png.*category 3"),
        ({"segments_info": [segments[0]] * 2}, r"segments.png must differ"),
        ({"segments_info": [{"id": 0, "category_id": 0}]}, r"lie in \[1, 2\*\*24\): \[0\]"),
        ({"pan_seg_file_name": small}, r"small.png has .*\(20, 29\).*image.png \(20, 30\)"),
    ):
        with pytest.raises(DataError, match=message):
            mapper({**panoptic_dict, **changes})


@pytest.fixture
def semantic_cfg(make_cfg: Callable) -> CfgNode:
    options = ("DATASETS.TRAIN", ("mapper_test_semantic",), "MODEL.MASK_DINO.NUM_CLASSES", 3)
    return make_cfg(*UNCHANGED, *options, "INPUT.DATASET_MAPPER_NAME", "semantic")


@pytest.fixture
def semantic_dict(save_image: Callable) -> dict:
    labels = np.full((20, 30), 255, np.uint8)
    labels[:10, :15] = 0
    labels[:10, 15:] = 2
    return {
        "file_name": save_image(np.zeros((20, 30, 3), np.uint8)),
        "sem_seg_file_name": save_image(labels, "labels.png"),
    }


def test_semantic_regions(semantic_cfg: CfgNode, semantic_dict: dict) -> None:
    example = build_train_mapper(semantic_cfg)(semantic_dict)
    instances = example["instances"]
    assert instances.gt_classes.tolist() == [0, 2]
    assert not instances.has("gt_is_thing")  # a semantic map does not tell
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 15, 10], [15, 0, 30, 10]]
    expected = np.zeros((2, 20, 30), bool)
    expected[0, :10, :15], expected[1, :10, 15:] = True, True
    assert (instances.gt_masks.to_bool().numpy() == expected).all()
    assert set(example) == set(semantic_dict) | {"image", "instances", "height", "width"}


@pytest.mark.parametrize("constrained", [True, False])
def test_padding_of_semantic_maps_is_ignored(
    semantic_cfg: CfgNode, semantic_dict: dict, constrained: bool
) -> None:
    if constrained:
        semantic_cfg.INPUT.CROP.merge_from_list(
            ["ENABLED", True, "TYPE", "absolute", "SIZE", [8, 8], "SINGLE_CATEGORY_MAX_AREA", 0.75]
        )
    else:
        semantic_cfg.INPUT.LSJ.ENABLED = True
    mapper, covered = build_train_mapper(semantic_cfg), 0
    for seed in range(10):
        np.random.seed(seed)
        example = mapper(semantic_dict)
        masks = example["instances"].gt_masks.to_bool()
        assert masks.shape[1:] == example["image"].shape[1:]
        of_image = example["image"][0] == 0  # it is black; its upper half has classes
        assert masks.sum(0).max() <= 1 and not masks[:, ~of_image].any()
        covered += masks.sum().item()
    assert covered > 0


def test_semantic_map_of_nothing(semantic_cfg: CfgNode, save_image: Callable) -> None:
    pixels = np.full((20, 30), 255, np.uint8)
    given = {"file_name": save_image(pixels), "sem_seg_file_name": save_image(pixels, "l.png")}
    example = build_train_mapper(semantic_cfg)(given)
    assert len(example["instances"]) == 0


def test_semantic_errors(semantic_cfg: CfgNode, semantic_dict: dict, save_image: Callable) -> None:
    mapper = build_train_mapper(semantic_cfg)
    for pixels, message in (
        (np.full((20, 30), 3, np.uint8), r"wrong.png holds the values \[3\]; classes are 0 to 2"),
        (np.full((20, 29), 0, np.uint8), r"wrong.png has .*\(20, 29\).*image.png \(20, 30\)"),
        (np.zeros((20, 30, 3), np.uint8), r"wrong.png.*one channel"),
        (np.zeros((20, 30), np.uint16), r"wrong.png.*8 bits"),
    ):
        wrong = {**semantic_dict, "sem_seg_file_name": save_image(pixels, "wrong.png")}
        with pytest.raises(DataError, match=message):
            mapper(wrong)


def test_another_ignored_label(save_image: Callable) -> None:
    mapper = SemanticMapper(augmentations=[], image_format="RGB", num_classes=3, ignore_label=1)
    path = save_image(np.array([[0, 1, 2]], np.uint8))
    example = mapper({"file_name": path, "sem_seg_file_name": path})
    assert example["instances"].gt_classes.tolist() == [0, 2]
    masks = example["instances"].gt_masks.to_bool()
    assert masks[:, 0].tolist() == [[True, False, False], [False, False, True]]


def test_as_many_classes_as_8_bits_can_tell(save_image: Callable) -> None:
    """A class of the value 255 would be ignored, and nobody told."""
    path = save_image(np.array([[0, 254, 255]], np.uint8))
    example = {"file_name": path, "sem_seg_file_name": path}
    common = {"augmentations": [], "image_format": "RGB", "ignore_label": 255}
    classes = SemanticMapper(num_classes=255, **common)(example)["instances"].gt_classes
    assert classes.tolist() == [0, 254]
    with pytest.raises(DataError, match="256 classes are too many: .* at most 255") as caught:
        SemanticMapper(num_classes=256, **common)(example)
    assert "\n" not in str(caught.value)


def test_panoptic_data_without_things(panoptic_cfg: CfgNode, panoptic_dict: dict) -> None:
    MetadataCatalog.get("mapper_test_without_things").thing_dataset_id_to_contiguous_id = {}
    panoptic_cfg.DATASETS.TRAIN = ("mapper_test_without_things",)
    instances = build_train_mapper(panoptic_cfg)(panoptic_dict)["instances"]
    assert instances.gt_is_thing.tolist() == [False, False]


def test_evaluation_reads_images_only(make_cfg: Callable, make_dict: Callable) -> None:
    mapper = build_test_mapper(make_cfg("INPUT.MIN_SIZE_TEST", 30))
    given = make_dict(annotation(), sem_seg_file_name="never read")
    example = mapper(given)
    assert tuple(example["image"].shape) == (3, 30, 40) and "annotations" not in example
    assert (example["height"], example["width"], example["image_id"]) == (60, 80, 7)
    Path(given["file_name"]).write_bytes(Path(given["file_name"]).read_bytes()[:90])
    with pytest.raises(DataError, match=r"cannot read image .*image\.png"):
        mapper(given)


def test_mapper_names(make_cfg: Callable) -> None:
    for name, kind in (
        ("instance", InstanceMapper),
        ("panoptic", PanopticMapper),
        ("semantic", SemanticMapper),
    ):
        cfg = make_cfg("DATASETS.TRAIN", ("x",), "INPUT.DATASET_MAPPER_NAME", name)
        assert isinstance(build_train_mapper(cfg), kind)
    with pytest.raises(ValueError, match="'keypoints'.*instance, panoptic, semantic"):
        build_train_mapper(make_cfg("INPUT.DATASET_MAPPER_NAME", "keypoints"))


def test_mappers_travel_to_data_workers_that_are_started_anew(make_cfg: Callable) -> None:
    options = ("INPUT.COLOR_AUG_SSD", True, "INPUT.RANDOM_FLIP", "dihedral")
    mapper = build_train_mapper(make_cfg(*options))
    sent = pickle.loads(pickle.dumps(mapper))
    kinds = [[type(a).__name__ for a in m.augmentations.augs] for m in (mapper, sent)]
    assert kinds[0] == kinds[1] and "Always" in kinds[0]
