"""Copy-paste and mosaic: against slow loops over pixels, and as a part of the stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from maskdino.config import load_config
from maskdino.config.checks import check_values
from maskdino.data import DataError, build_train_mapper
from maskdino.data.mixing import (
    MixingMapper,
    assemble,
    build_mixing,
    check_mixing,
    finish,
    paste,
    scene_of,
)
from maskdino.data.stream import build_training_data
from maskdino.engine.plain_detectron2 import adapt_to_detectron2
from maskdino.structures import PackedMasks

PASTE = ("INPUT.COPY_PASTE.PROBABILITY", 1.0)
MOSAIC = ("INPUT.MOSAIC.PROBABILITY", 1.0)
KINDS = ("masks", "boxes", "both")


def drawn_example(
    generator: np.random.Generator, size: tuple[int, int], number: int, kind: str
) -> dict:
    """An image of noise with objects that overlap; of "both", every other one has a mask."""
    has_mask = np.array([kind == "masks" or (kind == "both" and i % 2 == 0) for i in range(number)])
    masks, boxes = np.zeros((number, *size), bool), np.zeros((number, 4), np.float32)
    for i in range(number):
        corners = generator.uniform(0, (size[1], size[0]), (2, 2))
        low, high = corners.min(0), corners.max(0) + 0.1
        boxes[i] = [*low, *np.minimum(high, (size[1], size[0]))]
        if has_mask[i]:
            masks[i] = generator.random(size) < 0.1
            masks[i, generator.integers(size[0]), generator.integers(size[1])] = True
            masks[i, :, : int(low[0])] = masks[i].any(axis=1, keepdims=True) & masks[i, :, :1]
            masks[i, 0, 0] |= not masks[i].any()
            boxes[i] = slow_box(masks[i])
    objects = Instances(size)
    objects.gt_classes = torch.arange(number)
    objects.gt_boxes = Boxes(torch.from_numpy(boxes))
    if kind != "boxes":
        objects.gt_masks = PackedMasks.from_bool(masks)
        if not has_mask.all():
            objects.gt_has_mask = torch.from_numpy(has_mask)
    image = torch.from_numpy(generator.integers(0, 256, (3, *size), np.uint8))
    return {"image": image, "instances": objects, "file_name": "a.png"}


def slow_box(region: np.ndarray) -> list[int]:
    rows = [y for y in range(region.shape[0]) if region[y].any()]
    columns = [x for x in range(region.shape[1]) if region[:, x].any()]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def slow_objects(example: dict) -> list[dict]:
    """Each object with the pixels that it takes, one pixel after the other."""
    objects, (height, width) = example["instances"], example["instances"].image_size
    found = []
    for i in range(len(objects)):
        region = np.zeros((height, width), bool)
        x0, y0, x1, y1 = box = objects.gt_boxes.tensor[i].tolist()
        has_mask = objects.has("gt_masks")
        if objects.has("gt_has_mask"):
            has_mask = bool(objects.gt_has_mask[i])
        for y, x in itertools.product(range(height), range(width)):
            touches = min(x + 1, x1) > max(x, x0) and min(y + 1, y1) > max(y, y0)
            region[y, x] = objects.gt_masks.to_bool()[i, y, x] if has_mask else touches
        found.append(
            {"label": int(objects.gt_classes[i]), "box": box, "region": region, "mask": has_mask}
        )
        found[-1]["area"] = region.sum()
    return found


def assert_same(example: dict, expected: list[dict], min_visible: float) -> None:
    """The objects of an example are those expected that are visible enough."""
    expected = [
        o for o in expected if o["region"].any() and o["region"].sum() / o["area"] >= min_visible
    ]
    objects = example["instances"]
    assert objects.gt_classes.tolist() == [o["label"] for o in expected]
    for i, wanted in enumerate(expected):
        box = list(wanted["box"])
        if wanted["region"].sum() < wanted["area"]:
            left = slow_box(wanted["region"])
            pairs = list(zip(left, box, strict=True))
            inside = [max(pair) for pair in pairs[:2]] + [min(pair) for pair in pairs[2:]]
            box = left if wanted["mask"] else inside
        assert objects.gt_boxes.tensor[i].tolist() == pytest.approx(box)
        assert box[0] < box[2] and box[1] < box[3]
        if objects.has("gt_masks"):
            mask = objects.gt_masks.to_bool()[i].numpy()
            assert (mask == (wanted["region"] & wanted["mask"])).all()
    if any(not o["mask"] for o in expected) and objects.has("gt_masks"):
        assert objects.gt_has_mask.tolist() == [o["mask"] for o in expected]


@pytest.mark.parametrize("kinds", [*zip(KINDS, KINDS, strict=True), ("boxes", "masks")])
@pytest.mark.parametrize("sizes", [((13, 19), (13, 19)), ((13, 19), (9, 27)), ((16, 8), (20, 5))])
def test_pasting_is_that_of_a_slow_loop(kinds: tuple[str, str], sizes: tuple) -> None:
    generator = np.random.default_rng(3)
    (height, width), chosen, share = sizes[0], np.array([3, 1]), 0.5
    below = drawn_example(generator, sizes[0], 6, kinds[0])
    above = drawn_example(generator, sizes[1], 4, kinds[1])
    image, expected = below["image"].clone(), slow_objects(below)
    given = slow_objects(above)
    pasted = [given[i] for i in chosen]
    for entry in pasted:
        region = np.zeros((height, width), bool)
        for y, x in itertools.product(range(height), range(width)):
            if y < sizes[1][0] and x < sizes[1][1] and entry["region"][y, x]:
                region[y, x] = True
                image[:, y, x] = above["image"][:, y, x]
                for hidden in expected:
                    hidden["region"][y, x] = False
        entry["region"] = region
    kept = below["instances"]
    parts = [kept.gt_boxes.tensor, *([kept.gt_masks.bits] if kept.has("gt_masks") else [])]
    before = [part.clone() for part in parts]
    result = finish(paste(scene_of(below), scene_of(above), chosen), below, share)
    assert torch.equal(result["image"], image)
    assert_same(result, expected + pasted, share)
    assert result["file_name"] == "a.png"
    assert all(map(torch.equal, parts, before))  # the mapper's stay as they are


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_those_of_a_slow_loop(kind: str) -> None:
    generator = np.random.default_rng(5)
    size, row, column, share = (14, 21), 6, 8, 0.3
    cells = [((0, 0), (6, 8)), ((0, 8), (6, 13)), ((6, 0), (8, 8)), ((6, 8), (8, 13))]
    examples = [
        drawn_example(generator, given, 4, kind) for given in ((6, 8), (9, 17), (5, 5), (8, 13))
    ]
    image, expected = torch.full((3, *size), 128, dtype=torch.uint8), []
    for ((top, left), (height, width)), example in zip(cells, examples, strict=True):
        for entry in slow_objects(example):
            region = np.zeros(size, bool)
            for y, x in itertools.product(range(height), range(width)):
                if y < entry["region"].shape[0] and x < entry["region"].shape[1]:
                    region[top + y, left + x] = entry["region"][y, x]
            x0, y0, x1, y1 = entry["box"]
            box = [x0 + left, y0 + top, x1 + left, y1 + top]
            expected.append(entry | {"region": region, "box": box})
        for y, x in itertools.product(range(height), range(width)):
            if y < example["image"].shape[1] and x < example["image"].shape[2]:
                image[:, top + y, left + x] = example["image"][:, y, x]
    tiles = [
        (scene_of(example).fitted(cell), *place)
        for (place, cell), example in zip(cells, examples, strict=True)
    ]
    assert cells[3][0] == (row, column)
    result = finish(assemble(tiles, size), examples[0], share)
    assert torch.equal(result["image"], image)
    assert_same(result, expected, share)


@pytest.fixture
def make_records(tmp_path: Path) -> Callable[[int, str], list[dict]]:
    """Makes records of black images, each with two white objects and a crowd."""

    def make(number: int, form: str) -> list[dict]:
        records = []
        generator = np.random.default_rng(number)
        for i in range(number):
            size = (50 + 7 * i, 70 - 3 * i)
            pixels, annotations = np.zeros((*size, 3), np.uint8), []
            for _ in range(2):
                x, y = generator.uniform(0, (size[1] - 25, size[0] - 20))
                box, triangle = [x, y, x + 24, y + 18], [x, y, x + 24, y, x + 12, y + 18]
                corners = [x, y, x + 24, y, x + 24, y + 18, x, y + 18]
                outline = [corners if form == "boxes" else triangle]
                rle = mask_util.merge(mask_util.frPyObjects(outline, *size))
                pixels[mask_util.decode(rle) > 0] = 255
                kind = {"polygons": outline, "run lengths": rle, "boxes": []}[form]
                common = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
                annotations.append({**common, "bbox": box, "segmentation": kind})
            crowd = {**common, "bbox": [0, 0, size[1], size[0]], "iscrowd": 1}
            annotations.append({**crowd, "segmentation": [[0, 0, 99, 0, 99, 99, 0, 99]]})
            path = tmp_path / f"{i}.png"
            Image.fromarray(pixels).save(path)
            records.append(
                {"file_name": str(path), "image_id": i, "height": size[0], "width": size[1]}
                | {"annotations": annotations}
            )
        return records

    return make


def mixing(cfg: CfgNode, records: list[dict], factors: list[float] | None = None) -> MixingMapper:
    weights = torch.ones(len(records)) if factors is None else torch.tensor(factors)
    result = build_mixing(cfg, build_train_mapper(cfg), records, weights)
    assert isinstance(result, MixingMapper)
    return result


@pytest.mark.parametrize("options", [PASTE, MOSAIC, (*PASTE, *MOSAIC)])
@pytest.mark.parametrize("form", ["polygons", "run lengths", "boxes"])
def test_masks_and_boxes_show_what_the_image_shows(
    make_cfg: Callable, make_records: Callable, form: str, options: tuple
) -> None:
    """White pixels are those of the objects, whatever was laid where; the crowd is nowhere."""
    cfg = make_cfg(*options, "INPUT.RANDOM_FLIP", "dihedral", "INPUT.LSJ.MIN_SCALE", 0.6)
    cfg.INPUT.COPY_PASTE.MIN_VISIBLE = cfg.INPUT.MOSAIC.MIN_VISIBLE = 0.0
    records = make_records(3, form)
    mapper, numbers = mixing(cfg, records), set()
    for seed in range(8):
        np.random.seed(seed)
        example = mapper(records[seed % 3])
        objects, bright = example["instances"], example["image"][0].numpy() > 128
        assert objects.image_size == bright.shape == (64, 96)
        numbers.add(len(objects))
        seen = np.zeros_like(bright)
        if form != "boxes":
            seen |= objects.gt_masks.to_bool().any(0).numpy()
            boxes = [slow_box(mask.numpy()) for mask in objects.gt_masks.to_bool()]
            assert objects.gt_boxes.tensor.tolist() == boxes
        for x0, y0, x1, y1 in objects.gt_boxes.tensor.round().int().tolist():
            if form == "boxes":
                seen[y0:y1, x0:x1] = True
        assert (seen & bright).sum() >= 0.85 * (seen | bright).sum()
    assert max(numbers) > 2


def test_as_many_objects_as_asked_for(make_cfg: Callable, make_records: Callable) -> None:
    scales = ("INPUT.LSJ.MIN_SCALE", 1.0, "INPUT.LSJ.MAX_SCALE", 1.0, "INPUT.RANDOM_FLIP", "none")
    for most, expected in ((1, {3}), (2, {3, 4}), (100, {3, 4})):
        cfg = make_cfg(*PASTE, *scales, "INPUT.COPY_PASTE.MAX_OBJECTS", most)
        records = make_records(2, "polygons")
        mapper = mixing(cfg, records, [0.0, 1.0])
        plain = len(build_train_mapper(cfg)(records[0])["instances"])
        cfg.INPUT.COPY_PASTE.MIN_VISIBLE = 0.0
        numbers = set()
        for seed in range(12):
            np.random.seed(seed)
            numbers.add(len(mapper(records[0])["instances"]))
        assert plain == 2 and max(numbers) == max(expected) and numbers <= {2, *expected}


@pytest.mark.parametrize("options", [PASTE, MOSAIC])
def test_one_image_and_images_without_objects(
    make_cfg: Callable, make_records: Callable, options: tuple
) -> None:
    records = make_records(2, "polygons")
    empty = records[1] | {"annotations": []}
    scales = ("INPUT.LSJ.MIN_SCALE", 1.0, "INPUT.LSJ.MAX_SCALE", 1.0)
    cfg = make_cfg(*options, *scales)
    for given, of_all in (([records[0]], True), ([empty], False), ([records[0], empty], True)):
        mapper = mixing(cfg, given)
        examples = [mapper(record)["instances"] for record in given for _ in range(4)]
        assert any(len(objects) for objects in examples) == of_all
        assert all(objects.image_size == (64, 96) for objects in examples)
    alone = mixing(cfg, [records[0], empty], [0.0, 1.0])
    if options is PASTE:
        assert {len(alone(records[0])["instances"]) for _ in range(4)} == {2}


def test_images_are_drawn_as_often_as_they_are_trained_on(make_cfg: Callable) -> None:
    records = [{"index": i} for i in range(5)]
    mapper = mixing(make_cfg(*PASTE), records, [1.0, 0.0, 2.5, 0.0, 0.5])
    np.random.seed(0)
    counts = np.bincount([mapper._another()["index"] for _ in range(4000)], minlength=5) / 1000
    np.testing.assert_allclose(counts, [1.0, 0.0, 2.5, 0.0, 0.5], atol=0.1)


@pytest.fixture
def registered(make_records: Callable) -> str:
    records = make_records(5, "polygons")
    DatasetCatalog.register("mixing_test", lambda: records)
    MetadataCatalog.get("mixing_test").thing_classes = ["triangle"]
    return "mixing_test"


def test_what_is_mixed_depends_on_the_position_alone(make_cfg: Callable, registered: str) -> None:
    """Not on workers, nor on where a run was killed; and it is another mix each time."""

    def batches(num_workers: int, start: int, number: int) -> list[tuple]:
        halves = ("INPUT.COPY_PASTE.PROBABILITY", 0.5, "INPUT.MOSAIC.PROBABILITY", 0.5)
        cfg = make_cfg(*halves, "DATASETS.TRAIN", (registered,), "SOLVER.IMS_PER_BATCH", 3)
        cfg.DATALOADER.NUM_WORKERS, cfg.MODEL.DEVICE = num_workers, "cpu"
        data = build_training_data(cfg, build_train_mapper(cfg))
        found = []
        for batch in itertools.islice(data.start(9, start), number):
            for example in batch:
                objects = example["instances"]
                parts = (example["image"], objects.gt_boxes.tensor, objects.gt_masks.bits)
                found.append((example["image_id"], *(part.numpy().tobytes() for part in parts)))
        return found

    whole = batches(0, 0, 6)
    assert batches(2, 0, 6) == whole
    assert batches(1, 4, 2) == whole[12:]
    assert len(set(whole)) == len(whole) == 18


def test_tiles_are_as_large_as_asked_for(make_cfg: Callable, make_records: Callable) -> None:
    """At 0.5, an image is half as large as if it had the whole mosaic; tiles cut it off."""
    scales = ("INPUT.MOSAIC.MIN_SCALE", 0.5, "INPUT.MOSAIC.MAX_SCALE", 0.5)
    cfg = make_cfg(*MOSAIC, *scales, "INPUT.LSJ.SIZE", [200, 280], "INPUT.RANDOM_FLIP", "none")
    records = make_records(1, "polygons")  # of 50 x 70 pixels: fits at a factor of 4
    image = mixing(cfg, records)._for_tiles((120, 90))(records[0])["image"][0]
    assert image.shape == (120, 90)
    assert (image[:100] == 128).float().mean() < 0.05 and (image[100:] == 128).all()


def test_nothing_is_changed_where_nothing_is_mixed(
    make_cfg: Callable, make_records: Callable
) -> None:
    records, cfg = make_records(2, "polygons"), make_cfg()
    mapper = build_train_mapper(cfg)
    assert build_mixing(cfg, mapper, records, torch.ones(2)) is mapper


def test_stuff_is_joined_and_never_pasted(make_cfg: Callable) -> None:
    """Of two things, and sky that both images have: of the mapper of panoptic data."""

    def example(seed: int) -> dict:
        masks = np.zeros((3, 16, 24), bool)
        lower = 4 * (seed % 2)
        masks[0, 2 + lower : 5 + lower, 2:6] = True
        masks[1, 8 + lower : 12 + lower, 10:20] = True
        masks[2] = ~masks.any(0)
        objects = Instances((16, 24))
        objects.gt_classes = torch.tensor([0, 1, 2])
        objects.gt_boxes = Boxes(torch.tensor([slow_box(mask) for mask in masks]).float())
        objects.gt_masks = PackedMasks.from_bool(masks)
        objects.gt_is_thing = torch.tensor([True, True, False])
        return {"image": torch.full((3, 16, 24), seed, dtype=torch.uint8), "instances": objects}

    cells = [(example(i), top, left) for i, (top, left) in enumerate([(0, 0), (0, 24), (16, 0)])]
    tiles = [(scene_of(given), top, left) for given, top, left in cells]
    objects = finish(assemble(tiles, (32, 48)), cells[0][0], 1.0)["instances"]
    assert sorted(objects.gt_classes.tolist()) == [0, 0, 0, 1, 1, 1, 2]
    stuff = objects.gt_classes.tolist().index(2)
    assert objects.gt_is_thing.tolist() == [i != stuff for i in range(7)]
    masks = objects.gt_masks.to_bool()
    assert masks.sum(0).max() == 1
    assert masks[stuff].sum() == 3 * (16 * 24 - 12 - 40)
    assert objects.gt_boxes.tensor[stuff].tolist() == slow_box(masks[stuff].numpy())

    numbers = iter(range(8))
    cfg = make_cfg(*PASTE, "INPUT.COPY_PASTE.MIN_VISIBLE", 1.0)
    mapper = MixingMapper(cfg, lambda _: example(next(numbers)), [{}], torch.ones(1))
    for seed in range(0, 8, 2):
        mixed = mapper({})
        objects = mixed["instances"]
        assert objects.gt_classes.tolist()[:3] == [0, 1, 2]
        assert len(objects) in (4, 5) and objects.gt_is_thing.tolist().count(False) == 1
        assert (objects.gt_masks.to_bool().sum(0) == 1).all()
        things = objects.gt_masks.to_bool()[3:].any(0)
        assert torch.equal(mixed["image"][0], torch.where(things, seed + 1, seed).byte())


def test_what_cannot_be_mixed_is_refused(make_cfg: Callable, make_records: Callable) -> None:
    for options, message in (
        ((*PASTE, "INPUT.DATASET_MAPPER_NAME", "semantic"), "INPUT.COPY_PASTE.PROB.* semantic"),
        ((*MOSAIC, "INPUT.DATASET_MAPPER_NAME", "semantic"), "INPUT.MOSAIC.PROB.* semantic"),
        ((*MOSAIC, "INPUT.LSJ.ENABLED", False), "INPUT.MOSAIC.PROB.*INPUT.LSJ.ENABLED False"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            check_mixing(make_cfg(*options))
        assert "\n" not in str(caught.value)
    check_mixing(make_cfg(*PASTE, "INPUT.LSJ.ENABLED", False))
    check_mixing(make_cfg("INPUT.LSJ.ENABLED", False, "INPUT.DATASET_MAPPER_NAME", "semantic"))
    with pytest.raises(ValueError, match="large-scale jitter, but function has none"):
        MixingMapper(make_cfg(*MOSAIC), lambda record: record, [{}], torch.ones(1))
    with pytest.raises(ValueError, match=r"INPUT.MOSAIC.MIN_SCALE is 3.0; it must be at most"):
        check_values(make_cfg("INPUT.MOSAIC.MIN_SCALE", 3.0))

    cfg = make_cfg(*PASTE)
    plain = build_train_mapper(cfg)

    def with_points(record: dict) -> dict:
        example = plain(record)
        example["instances"].gt_keypoints = torch.zeros(len(example["instances"]), 17, 3)
        return example

    records = make_records(1, "polygons")
    with pytest.raises(DataError, match=r"0\.png: INPUT.COPY_PASTE .* cannot mix .*gt_keypoints"):
        MixingMapper(cfg, with_points, records, torch.ones(1))(records[0])


def test_trainers_of_others_mix_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """They have a stream of their own, and are told."""
    words = ("INPUT.COPY_PASTE.PROBABILITY", "0.5", "MODEL.DEVICE", "cpu")
    cfg = load_config(None, list(words))
    with caplog.at_level("WARNING"):
        adapt_to_detectron2(cfg)
    assert cfg.INPUT.COPY_PASTE.PROBABILITY == 0
    assert "INPUT.COPY_PASTE.PROBABILITY 0.0" in caplog.text
