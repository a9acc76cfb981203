"""Tests of maskdino.evaluation.build and maskdino.evaluation.coco."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from maskdino.config import load_config
from maskdino.evaluation import coco as coco_evaluation
from maskdino.evaluation.build import build_evaluator
from maskdino.evaluation.coco import (
    COCOInstanceEvaluator,
    average_precision,
    instances_to_records,
)
from maskdino.ops.rle import encode_mask, to_json
from tests.pretend_device import PretendDevice, missing_api

SIZE = (40, 60)
# Category ids as users have them: neither from 0, nor dense, nor in order.
CATEGORIES = {7: "nut", 3: "date", 90: "fig"}


def rectangle(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def annotation(number: int, image: int, category: int, box: tuple, masks: bool) -> dict:
    result = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [float(x) for x in box],
        "area": float(box[2] * box[3]),
        "iscrowd": 0,
    }
    if masks:
        rle = mask_util.encode(np.asfortranarray(rectangle(*box)))
        result["segmentation"] = {"size": list(SIZE), "counts": rle["counts"].decode()}
    return result


OBJECTS = [
    (1, 7, (2, 2, 10, 8)),
    (1, 3, (20, 10, 30, 20)),
    (2, 7, (5, 5, 20, 20)),
    (2, 90, (0, 0, 3, 3)),
]


@pytest.fixture(params=[True, False], ids=["masks", "boxes"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, bool]:
    """A dataset of two images and four objects: (name, has masks)."""
    content = {
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"} for i in (1, 2)
        ],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "annotations": [
            annotation(i + 1, *entry, request.param) for i, entry in enumerate(OBJECTS)
        ],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    name = f"fruits_{request.param}"
    register_coco_instances(name, {}, str(path), str(tmp_path))
    DatasetCatalog.get(name)  # fills in the map of category ids
    return name, request.param


def predictions(image: int, classes: dict[int, int], with_masks: bool) -> Instances:
    """What a perfect model says of an image."""
    found = [(classes[category], box) for at, category, box in OBJECTS if at == image]
    result = Instances(SIZE)
    result.scores = torch.linspace(0.9, 0.5, len(found))
    result.pred_classes = torch.tensor([label for label, _ in found])
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in found], dtype=torch.float32)
    result.pred_boxes = Boxes(boxes)
    if with_masks:
        masks = np.stack([rectangle(*box) for _, box in found]).astype(bool)
        result.pred_masks = torch.from_numpy(masks)
    return result


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("model_has_masks", [True, False])
def test_perfect_predictions(
    dataset: tuple[str, bool], tmp_path: Path, fast: bool, model_has_masks: bool
) -> None:
    name, data_has_masks = dataset
    classes = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    evaluator = COCOInstanceEvaluator(
        name, str(tmp_path / "out"), with_masks=model_has_masks, fast=fast
    )
    evaluator.reset()
    for image in (1, 2):
        outputs = {"instances": predictions(image, classes, model_has_masks)}
        evaluator.process([{"image_id": image}], [outputs])
    results = evaluator.evaluate()
    expected = {"bbox", "segm"} if model_has_masks and data_has_masks else {"bbox"}
    assert results.keys() == expected
    for values in results.values():
        assert values["AP"] == pytest.approx(100.0)
        assert {f"AP-{fruit}" for fruit in CATEGORIES.values()} <= values.keys()
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {record["category_id"] for record in written} == set(CATEGORIES)


@pytest.mark.skipif(bool(missing_api()), reason=missing_api())
@pytest.mark.parametrize("masks_at_once", [1, 3, 100, None])
def test_records_are_those_of_masks_one_by_one(
    masks_at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of an image comes to the host in one copy, or in a few where masks are large."""
    at_once = (masks_at_once or 1) * 40 * 60 // 8
    monkeypatch.setattr(coco_evaluation, "MASK_BYTES_AT_ONCE", at_once)
    found, number = Instances(SIZE), 7
    found.scores, found.pred_classes = torch.rand(number), torch.arange(number)
    found.pred_boxes = Boxes(torch.rand(number, 4).cumsum(1) * 10)
    found.pred_masks = torch.rand(number, *SIZE) > torch.linspace(0, 1, number).view(-1, 1, 1)
    if masks_at_once is None:  # on the host
        records = instances_to_records(found, 3)
    else:
        with PretendDevice() as device:
            given = {name: device.put(found.get(name)) for name in ("scores", "pred_classes")}
            given["pred_boxes"] = Boxes(device.put(found.pred_boxes.tensor))
            given["pred_masks"] = device.put(found.pred_masks)
            records = instances_to_records(Instances(SIZE, **given), 3)
        assert sum(device.waits.values()) == -(-number // masks_at_once)
    assert [record["category_id"] for record in records] == list(range(number))
    for record, score, box, mask in zip(
        records, found.scores, found.pred_boxes.tensor, found.pred_masks, strict=True
    ):
        assert record["image_id"] == 3 and record["score"] == score.item()
        x0, y0, x1, y1 = box.tolist()
        assert record["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
        rle = mask_util.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
        assert record["segmentation"]["counts"].encode() == rle["counts"]
        assert record["segmentation"]["size"] == list(SIZE)
    assert instances_to_records(found[found.scores > 1], 3) == []


@pytest.mark.parametrize("fast", [True, False])
def test_precision_of_each_class_by_hand(dataset: tuple[str, bool], fast: bool) -> None:
    """Of nuts, one of two is found: precision 1 up to recall 0.5, the first 51 of 101 recalls.

    Two dates lie in one image, and both are found. Of figs, none is found.
    """
    metadata = MetadataCatalog.get(dataset[0])
    content = json.loads(Path(metadata.json_file).read_text())
    content["annotations"].append(annotation(5, 1, 3, (40, 30, 8, 6), dataset[1]))
    Path(metadata.json_file).write_text(json.dumps(content))
    evaluator = COCOInstanceEvaluator(dataset[0], None, with_masks=False, fast=fast)
    found = predictions(1, metadata.thing_dataset_id_to_contiguous_id, False)
    another = copy.deepcopy(found[found.pred_classes == found.pred_classes[1]])
    another.pred_boxes = Boxes(torch.tensor([[40.0, 30, 48, 36]]))
    evaluator.process([{"image_id": 1}], [{"instances": Instances.cat([found, another])}])
    results = evaluator.evaluate()["bbox"]
    half = 100 * 51 / 101
    expected = {"AP-nut": half, "AP-date": 100.0, "AP-fig": 0.0, "AP": (half + 100) / 3}
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    assert np.isnan(results["APl"])  # nothing is as large as 96 x 96 pixels
    evaluator.reset()
    assert evaluator.evaluate()["bbox"]["AP"] == 0.0


def test_what_annotations_leave_out_is_filled_in(tmp_path: Path) -> None:
    whole = {"id": 1, "bbox": [1, 2, 3, 4], "area": 5.0, "iscrowd": 1}
    content = {"images": [], "annotations": [whole, {"id": 2, "bbox": [1, 2, 3, 4]}]}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    filled = {"id": 2, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
    expected = {"info": {}, "images": [], "annotations": [whole, filled]}
    assert coco_evaluation.read_annotations(str(path), Metadata()) == expected


def test_annotations_are_converted_for_each_evaluation(tmp_path: Path) -> None:
    """Those that stand in the folder may be of other data."""
    name, boxes = "fruits_without_a_file", [[5, 5, 20, 10]]
    image = {"file_name": "1.png", "image_id": 1, "height": SIZE[0], "width": SIZE[1]}
    kind = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    DatasetCatalog.register(
        name, lambda: [image | {"annotations": [kind | {"bbox": box} for box in boxes]}]
    )
    MetadataCatalog.get(name).thing_classes = ["apple"]
    for number in (1, 2):
        COCOInstanceEvaluator(name, str(tmp_path), with_masks=False, fast=False)
        (path,) = tmp_path.glob("*.json")
        assert len(json.loads(path.read_text())["annotations"]) == number
        boxes.append([8, 8, 5, 5])


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_more_keys_of_annotations_may_hold_anything(task: str) -> None:
    box = (5, 5, 20, 10)
    content = {
        "info": "made by hand",
        "licenses": 3,
        "images": [{"id": 1, "height": SIZE[0], "width": SIZE[1], "coco_url": 3}],
        "categories": [{"id": 1, "name": "cell", "supercategory": None}],
        "annotations": [annotation(1, 1, 1, box, masks=True) | {"score": "high", "caption": 3}],
    }
    record = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": list(box)}
    record["segmentation"] = to_json(encode_mask(rectangle(*box)))
    stats, *_ = average_precision(content, [record], task, fast=True)
    assert stats[0] == pytest.approx(100)


@pytest.mark.parametrize("fast", [True, False])
def test_objects_without_masks_are_neither_found_nor_missed(fast: bool) -> None:
    boxes = [(5, 5, 20, 10), (30, 15, 20, 20)]
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [annotation(i, 1, 1, box, masks=True) for i, box in enumerate(boxes, 1)],
    }
    records = [
        {
            "image_id": 1,
            "category_id": 1,
            "score": score,
            "segmentation": to_json(encode_mask(mask)),
        }
        for score, mask in ((0.9, rectangle(5, 5, 20, 10)), (0.95, rectangle(32, 17, 10, 10)))
    ]
    both = average_precision(content, records, "segm", fast=fast)[0][1]
    content["annotations"][1]["segmentation"] = []
    with_one = average_precision(content, records, "segm", fast=fast)[0][1]
    assert both < 60 and with_one == pytest.approx(100)


def test_no_prediction_is_no_precision(dataset: tuple[str, bool]) -> None:
    evaluator = COCOInstanceEvaluator(dataset[0], None, with_masks=False, fast=False)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": predictions(3, {}, False)}])
    assert evaluator.evaluate()["bbox"]["AP"] == 0.0


def test_class_that_the_dataset_lacks(dataset: tuple[str, bool]) -> None:
    evaluator = COCOInstanceEvaluator(dataset[0], None, with_masks=False, fast=False)
    with pytest.raises(ValueError, match=r"predicts class 5, but .* has 3 classes"):
        evaluator.process([{"image_id": 1}], [{"instances": predictions(1, {7: 5, 3: 0}, False)}])


def test_missing_fast_evaluator(dataset: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_evaluation, "FAST", ())
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        COCOInstanceEvaluator(dataset[0], None, with_masks=False, fast=True)


def jittered_results(ground_truth: dict, generator: np.random.Generator) -> list[dict]:
    """Shifted, relabelled, dropped and doubled annotations, as a mediocre model predicts them."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    categories = [category["id"] for category in ground_truth["categories"]]
    records = []
    for entry in ground_truth["annotations"]:
        for _ in range(generator.integers(0, 3)):
            shift = generator.integers(-3, 4, 2)
            mask = _decode(entry["segmentation"], *sizes[entry["image_id"]])
            rle = mask_util.encode(np.asfortranarray(np.roll(mask, shift, (0, 1))))
            wrong = generator.random() < 0.1
            records.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": int(generator.choice(categories))
                    if wrong
                    else entry["category_id"],
                    "bbox": [float(value) for value in mask_util.toBbox(rle)],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "score": round(float(generator.random()), 2),  # with ties
                }
            )
    return records


def _decode(segmentation: dict | list, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation)


@pytest.fixture(params=coco_evaluation.FAST)
def assert_fast_equals_pycocotools(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Compares the numbers of an optional library with those of pycocotools."""
    pytest.importorskip(request.param, reason="optional, see requirements.txt")
    monkeypatch.setattr(coco_evaluation, "FAST", (request.param,))

    def compare(ground_truth: dict, records: list[dict] | None = None, most: int = 100) -> None:
        if records is None:
            records = jittered_results(ground_truth, np.random.default_rng(0))
        before = copy.deepcopy((ground_truth, records))
        for task in ("bbox", "segm"):
            fast = average_precision(ground_truth, records, task, fast=True, detections=most)
            plain = average_precision(ground_truth, records, task, fast=False, detections=most)
            assert (ground_truth, records) == before
            assert (5 if most > 1 else 0) < plain[0][0] < 95
            np.testing.assert_allclose(fast[0], plain[0], rtol=0, atol=1e-9)
            np.testing.assert_allclose(fast[1], plain[1], rtol=0, atol=1e-12)
            assert fast[2] == plain[2]

    return compare


@pytest.mark.parametrize("most", [1, 10, 100, 300, 1 << 20])
def test_fast_numbers_are_pycocotools_on_random_data(
    assert_fast_equals_pycocotools: Callable[..., None], most: int
) -> None:
    """Crowds, equal scores, more than 100 detections of an image, images and classes without."""
    generator = np.random.default_rng(most)

    def box() -> tuple[int, int, int, int]:
        left, top = generator.integers(0, 40), generator.integers(0, 25)
        return int(left), int(top), *(int(x) for x in generator.integers(1, 20, 2))

    truth, records = [], []
    for number in range(60):
        image, category, crowd = number % 4, (3, 7)[number % 2], number % 9 == 0
        entry = annotation(number, image, category, box(), masks=True) | {"iscrowd": int(crowd)}
        # As large as in other images, so that all of the sizes are there.
        truth.append(entry | {"area": entry["area"] * (1, 10, 100)[number % 3]})
        for _ in range(8):  # more than 100 of each image
            x, y, w, h = entry["bbox"]
            near = (x + generator.integers(0, 3), y + generator.integers(0, 3), w, h)
            found = annotation(0, image, category, [int(v) for v in near], masks=True)
            records.append(found | {"score": round(float(generator.random()), 1)})
    content = {
        "info": {},
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"}
            for i in range(6)
        ],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "annotations": truth,
    }
    assert_fast_equals_pycocotools(content, records, most)


def test_fast_numbers_are_pycocotools_on_nuclei(
    assert_fast_equals_pycocotools: Callable[..., None], repository: Path
) -> None:
    path = repository / "datasets" / "nuclei" / "annotations" / "instances_val.json"
    assert_fast_equals_pycocotools(json.loads(path.read_text()))


def test_fast_numbers_are_pycocotools_on_coco(
    assert_fast_equals_pycocotools: Callable[..., None], shared: Callable[..., Path]
) -> None:
    paths = sorted(shared("data", "coco_mini", "annotations").glob("instances_val*.json"))
    assert paths
    ground_truth = json.loads(paths[0].read_text())
    assert any(entry["iscrowd"] for entry in ground_truth["annotations"])
    assert_fast_equals_pycocotools(ground_truth)


@pytest.mark.parametrize(("choice", "named"), [("auto", "faster_coco_eval"), ("pycocotools",) * 2])
def test_who_computes_is_chosen_and_said(
    dataset: tuple[str, bool],
    choice: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("faster_coco_eval", reason="optional, see requirements.txt")
    monkeypatch.setattr(coco_evaluation, "FAST", ("none_such", "faster_coco_eval"))
    cfg = load_config(None, ["TEST.COCO_EVALUATOR", choice])
    evaluator = build_evaluator(cfg, dataset[0])
    classes = MetadataCatalog.get(dataset[0]).thing_dataset_id_to_contiguous_id
    evaluator.process([{"image_id": 1}], [{"instances": predictions(1, classes, True)}])
    with caplog.at_level("INFO"):
        evaluator.evaluate()
    assert f"bbox of COCO by {named}." in caplog.text


def test_a_library_that_is_installed_but_broken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would else be seen after all images."""
    (tmp_path / "broken_evaluator.py").write_text("raise ImportError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    for names, chosen in (((), None), (("pycocotools",), "pycocotools")):
        monkeypatch.setattr(coco_evaluation, "FAST", ("broken_evaluator", *names))
        assert coco_evaluation.fast_library() == chosen


def test_predictions_are_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_evaluation, "RECORDS_AT_ONCE", 2)
    records = [{"score": number, "name": "], ["} for number in range(5)]
    for some in (records, records[:4], records[:1], []):
        assert json.loads("".join(coco_evaluation._json_of(some))) == some


def test_evaluators_of_a_dataset(dataset: tuple[str, bool], tmp_path: Path) -> None:
    evaluators = build_evaluator(load_config(None, ["OUTPUT_DIR", str(tmp_path)]), dataset[0])
    assert [type(e) for e in evaluators._evaluators] == [COCOInstanceEvaluator]


def test_unknown_type_and_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="evaluator type None; known types are coco, "):
        build_evaluator(load_config(), "untyped")
    MetadataCatalog.get("typed").evaluator_type = "sem_seg"
    with pytest.raises(ValueError, match=r"serves semantic, the model does \['instance'\]"):
        build_evaluator(load_config(), "typed")


@pytest.mark.parametrize("fast", [False, True])
def test_image_ids_may_be_names(fast: bool, repository: Path) -> None:
    """As ADE20K's; "007" and "7" are different images."""
    path = repository / "datasets" / "nuclei" / "annotations" / "instances_val.json"
    ground_truth = json.loads(path.read_text())
    for annotation in ground_truth["annotations"]:
        annotation.setdefault("iscrowd", 0)
    ground_truth.setdefault("info", {})
    records = jittered_results(ground_truth, np.random.default_rng(0))
    expected = average_precision(ground_truth, records, "segm", fast=fast)
    images = ground_truth["images"]
    names = {image["id"]: "0" * number + "7" for number, image in enumerate(images)}
    for image in images:
        image["id"] = names[image["id"]]
    for entry in (*ground_truth["annotations"], *records):
        entry["image_id"] = names[entry["image_id"]]
    found = average_precision(ground_truth, records, "segm", fast=fast)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-9)
    assert images[3]["id"] == "0007" and records[0]["image_id"] in names.values()
