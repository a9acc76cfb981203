"""The analysis of errors against slow forms: decided one by one, and mended for pycocotools."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from maskdino.evaluation import errors
from maskdino.evaluation.coco import average_precision
from maskdino.evaluation.errors import ERRORS, GROUP_METRICS, analyze

pytest.importorskip("hotcoco", reason="hotcoco is optional, see requirements.txt")

IDS, NAMES = [3, 7, 9], ["a", "b", "c"]
SIZE = 120
Box = list[float]


def drawn(seed: int, task: str = "bbox", crowds: float = 0.0) -> tuple[dict, list[dict]]:
    """Seven images with 0 to 30 objects of two classes, predicted well, badly, or again."""
    rng = np.random.default_rng(seed)
    numbers = (0, 1, 2, 3, 5, 8, 30)
    images = [
        {"id": i, "width": SIZE, "height": SIZE, "file_name": f"{i}.png"}
        for i in range(len(numbers))
    ]
    annotations, records = [], []
    for image, number in enumerate(numbers):
        objects = [(_box(rng), int(rng.choice(IDS[:2]))) for _ in range(number)]
        for box, category in objects:
            annotations.append(_record(task, image, category, box) | {"area": box[2] * box[3]})
            annotations[-1] |= {"id": len(annotations), "iscrowd": int(rng.random() < crowds)}
            for _ in range(rng.integers(0, 4)):
                moved = [float(max(1, x + rng.normal() * rng.choice([1, 6]))) for x in box]
                known = category if rng.random() < 0.7 else int(rng.choice(IDS))
                records.append(_record(task, image, known, moved))
        records += [_record(task, image, 3, _box(rng)) for _ in range(2)]
    for record in records:
        record["score"] = float(rng.random())
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, (
        records
    )


def _box(rng: np.random.Generator) -> Box:
    return [float(x) for x in (*rng.integers(0, 70, 2), *rng.integers(15, 45, 2))]


def _record(task: str, image: int, category: int, box: Box) -> dict:
    record = {"image_id": image, "category_id": category, "bbox": box}
    if task == "segm":
        x, y, w, h = box
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        rle = mask_utils.frPyObjects([corners], SIZE, SIZE)[0]
        record["segmentation"] = {**rle, "counts": rle["counts"].decode()}
    return record


def overlap(record: dict, objects: list[dict], task: str) -> list[float]:
    """IoU of a prediction with objects, as COCO defines it for crowds."""
    key = "bbox" if task == "bbox" else "segmentation"
    crowds = [x["iscrowd"] for x in objects]
    return np.asarray(mask_utils.iou([record[key]], [x[key] for x in objects], crowds))[0].tolist()


def by_image(ground_truth: dict, records: list[dict]) -> list[tuple[list[dict], list[int]]]:
    """Objects of each image that has some, and places of its predictions, best first."""
    best_first = sorted(range(len(records)), key=lambda i: -records[i]["score"])
    found = []
    for image in (x["id"] for x in ground_truth["images"]):
        objects = [x for x in ground_truth["annotations"] if x["image_id"] == image]
        found.append((objects, [i for i in best_first if records[i]["image_id"] == image]))
    return found


def judged(
    ground_truth: dict, records: list[dict], task: str
) -> tuple[dict[int, tuple[str, int | None]], set[int]]:
    """Error of each prediction with the object it is about; and the objects that are found."""
    kinds: dict[int, tuple[str, int | None]] = {}
    used: set[int] = set()
    for objects, places in by_image(ground_truth, records):
        for i in places:
            iou = overlap(records[i], objects, task) if objects else []
            pairs = list(zip(iou, objects, strict=True))
            own = [(v, x["id"], x) for v, x in pairs if _same(x, records[i])]
            other = [(v, x["id"]) for v, x in pairs if not _same(x, records[i]) and not _crowd(x)]
            free = [(v, n) for v, n, x in own if v >= 0.5 and n not in used and not _crowd(x)]
            near, about = max(((v, n) for v, n, _ in own), default=(0, None))
            wrong, taken_for = max(other, default=(0, None))
            if free:
                kinds[i] = ("", max(free)[1])
                used.add(max(free)[1])
            elif any(v >= 0.5 and _crowd(x) for v, _, x in own):
                kinds[i] = ("", None)  # neither right nor wrong
            elif 0.1 <= near <= 0.5:
                kinds[i] = ("localization", about)
            elif wrong >= 0.5:
                kinds[i] = ("class", taken_for)
            elif near >= 0.5:
                kinds[i] = ("duplicate", None)
            else:
                kinds[i] = ("class and localization" if wrong >= 0.1 else "background", None)
    return kinds, used


def _same(annotation: dict, record: dict) -> bool:
    return annotation["category_id"] == record["category_id"]


def _crowd(annotation: dict) -> bool:
    return bool(annotation["iscrowd"])


def mended(
    ground_truth: dict, records: list[dict], task: str, kind: str
) -> tuple[dict, list[dict]]:
    """Annotations and predictions without the errors of a kind."""
    kinds, used = judged(ground_truth, records, task)
    objects = {x["id"]: x for x in ground_truth["annotations"]}
    about = {n for name, n in kinds.values() if name in ("class", "localization")}
    if kind == "missed":
        kept = [x for n, x in objects.items() if n in used | about]
        return ground_truth | {"annotations": kept}, records
    result, done = [], set(used)
    for i in sorted(range(len(records)), key=lambda i: -records[i]["score"]):
        name, n = kinds[i]
        if name != kind:
            result.append(records[i])
        elif n is not None and n not in done:
            result.append({**objects[n], "score": records[i]["score"]})
        if name in ("class", "localization"):
            done.add(n)  # each object is given once, to the best prediction about it
    return ground_truth, result


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("crowds", [0.0, 0.2])
def test_errors_are_counted_as_one_by_one(task: str, crowds: float) -> None:
    total = dict.fromkeys(ERRORS.values(), 0)
    for seed in range(6):
        ground_truth, records = drawn(seed, task, crowds)
        kinds, used = judged(ground_truth, records, task)
        names = [name for name, _ in kinds.values()]
        about = {n for name, n in kinds.values() if name in ("class", "localization")}
        expected = {name: names.count(name) for name in ERRORS.values()}
        expected["missed"] = sum(
            not _crowd(x) and x["id"] not in used | about for x in ground_truth["annotations"]
        )
        found = analyze(ground_truth, records, task, threshold=0.5, detections=300).counts
        assert found == expected
        total = {name: total[name] + found[name] for name in total}
    assert min(total.values()) > 3, total  # each kind has been there


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_what_an_error_costs_is_what_ap_gains_without_it(task: str) -> None:
    for seed in range(3):
        ground_truth, records = drawn(seed, task)
        costs = analyze(ground_truth, records, task, threshold=0.5, detections=300).costs
        assert list(costs) == list(ERRORS.values())
        base = _ap50(ground_truth, records, task)
        for kind, cost in costs.items():
            gained = _ap50(*mended(ground_truth, records, task, kind), task) - base
            assert cost == pytest.approx(gained, abs=1e-9), kind


def _ap50(ground_truth: dict, records: list[dict], task: str) -> float:
    return average_precision(ground_truth, records, task, fast=False, detections=300)[0][1]


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("crowds", [0.0, 0.2])
def test_confusion_is_that_of_pairs_made_one_by_one(task: str, crowds: float) -> None:
    for seed in range(6):
        ground_truth, records = drawn(seed, task, crowds)
        expected = np.zeros((4, 4), int)
        for annotated, places in by_image(ground_truth, records):
            objects = [x for x in annotated if not _crowd(x)]
            for record in (records[i] for i in places if records[i]["score"] >= 0.3):
                iou = overlap(record, objects, task) if objects else [0.0]
                best = int(np.argmax(iou))
                row = 3
                if iou[best] >= 0.5:
                    row = IDS.index(objects.pop(best)["category_id"])
                expected[row, IDS.index(record["category_id"])] += 1
            for left in objects:
                expected[IDS.index(left["category_id"]), 3] += 1
        found = analyze(ground_truth, records, task, threshold=0.3, detections=300)
        assert found.classes == NAMES
        np.testing.assert_array_equal(found.confusion, expected)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_groups_are_evaluations_of_their_images(task: str) -> None:
    ground_truth, records = drawn(2, task)
    groups = analyze(ground_truth, records, task, threshold=0.5, detections=300).groups
    members = {"1": [1], "2 to 5": [2, 3, 4], "6 to 20": [5], "21 to 100": [6]}
    assert list(groups) == list(members)
    for name, ids in members.items():
        part = {
            key: [x for x in ground_truth[key] if x["id" if key == "images" else "image_id"] in ids]
            for key in ("images", "annotations")
        }
        own = [record for record in records if record["image_id"] in ids]
        stats, _, _ = average_precision(ground_truth | part, own, task, fast=False, detections=300)
        ap, ap50, _, small, medium, large, _ = stats
        expected = dict(zip(GROUP_METRICS, (ap, ap50, small, medium, large), strict=True))
        assert groups[name] == pytest.approx(
            {"images": len(ids), "objects": len(part["annotations"]), **expected}, nan_ok=True
        )
    assert math.isnan(groups["1"]["APl"])


def test_more_detections_than_count_are_left_out() -> None:
    ground_truth, records = drawn(0)
    best = []
    for _, places in by_image(ground_truth, records):
        for category in IDS:  # of an image and class, as in COCO's AP
            own = [i for i in places if records[i]["category_id"] == category]
            best += [records[i] for i in own[:5]]
    assert len(best) < len(records)
    few = analyze(ground_truth, records, "bbox", threshold=0.0, detections=5)
    same = analyze(ground_truth, best, "bbox", threshold=0.0, detections=300)
    assert (few.counts, few.costs) == (same.counts, same.costs)
    assert few.groups["21 to 100"] == same.groups["21 to 100"]


def test_doubted_are_a_wrong_class_and_a_missing_annotation() -> None:
    ground_truth, _ = drawn(3)
    kept = [x for x in ground_truth["annotations"] if x["image_id"] in (1, 2)]
    perfect = [{**x, "score": 0.9} for x in kept]
    extra = {"image_id": 0, "category_id": 9, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.8}
    unsure = {"image_id": 0, "category_id": 9, "bbox": [60.0, 60.0, 30.0, 40.0], "score": 0.4}
    right, wrong = ground_truth | {"annotations": kept}, dict(kept[0])
    wrong["category_id"] = 9
    relabeled = right | {"annotations": [wrong, *kept[1:]]}
    assert analyze(right, perfect, "bbox", threshold=0.5, detections=300).doubts == []
    found = analyze(relabeled, [*perfect, unsure, extra], "bbox", threshold=0.5, detections=300)
    name = NAMES[IDS.index(kept[0]["category_id"])]
    assert found.doubts == [
        errors.Doubt("1.png", kept[0]["bbox"], name, "c", 0.9),
        errors.Doubt("0.png", extra["bbox"], "c", None, 0.8),
    ]


def test_ids_may_be_of_any_kind() -> None:
    ground_truth, records = drawn(1)
    expected = analyze(ground_truth, records, "bbox", threshold=0.5, detections=300)
    for entry in ground_truth["images"]:
        entry["id"] = f"image {entry['id']}"
    for entry in (*ground_truth["annotations"], *records):
        entry["image_id"] = f"image {entry['image_id']}"
        entry.pop("id", None)
    found = analyze(ground_truth, records, "bbox", threshold=0.5, detections=300)
    assert (found.counts, found.costs, found.doubts) == (
        expected.counts,
        expected.costs,
        expected.doubts,
    )


def test_the_classes_confused_most() -> None:
    confusion = np.array([[9, 0, 1, 0, 5], [0, 8, 0, 0, 0], [3, 0, 7, 1, 0], [0, 0, 0, 6, 0]])
    confusion = np.concatenate([confusion, [[2, 4, 0, 0, 0]]])
    analysis = errors.Analysis({}, {}, list("wxyz"), confusion, {}, [])
    chosen, shown = analysis.most_confused(2)
    assert chosen == [0, 2]
    np.testing.assert_array_equal(shown, [[9, 1, 5], [3, 7, 0], [2, 0, 0]])
    assert analysis.most_confused(20)[0] == [0, 1, 2, 3]


def test_without_hotcoco_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "hotcoco", None)
    with pytest.raises(ImportError, match=r"maskdino\[analysis\]"):
        analyze(*drawn(0), "bbox", threshold=0.5, detections=300)


def test_polygons_and_plain_run_lengths_are_read_as_pycocotools_does() -> None:
    ground_truth, _ = drawn(0)
    rng = np.random.default_rng(4)
    annotations, records = [], []
    for image in range(1, 7):
        for crowd in (0, 0, 0, 1):
            polygon = rng.uniform(5, 115, 10)
            moved = mask_utils.frPyObjects([(polygon + rng.normal(0, 3, 10)).tolist()], SIZE, SIZE)
            rle = {**moved[0], "counts": moved[0]["counts"].decode()}
            shared = {"image_id": image, "category_id": int(rng.choice(IDS))}
            records.append(shared | {"segmentation": rle, "score": float(rng.random())})
            segmentation: object = [polygon.tolist()]
            if crowd:
                start = int(rng.integers(0, SIZE**2 // 2))
                counts = [start, 2000, SIZE**2 - 2000 - start]
                segmentation = {"size": [SIZE, SIZE], "counts": counts}
            box = {"bbox": [0.0, 0.0, 1.0, 1.0], "area": 900.0 + len(annotations) * 20}
            annotations.append(shared | box | {"segmentation": segmentation, "iscrowd": crowd})
    ground_truth["annotations"] = annotations
    groups = analyze(ground_truth, records, "segm", threshold=0.5, detections=300).groups
    stats, _, _ = average_precision(ground_truth, records, "segm", fast=False, detections=300)
    assert 5 < stats[0] < 95
    found = [groups["2 to 5"][key] for key in GROUP_METRICS]
    assert found == pytest.approx([*stats[:2], *stats[3:6]], nan_ok=True)
