"""Scoring and drawing of an evaluation's images, for each task."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from maskdino.data.datasets import register_panoptic_folder
from maskdino.engine.evaluating import write_results
from maskdino.evaluation.coco import COCOInstanceEvaluator
from maskdino.evaluation.files import SEMANTIC_FOLDER
from maskdino.evaluation.panoptic import PanopticEvaluator
from maskdino.evaluation.report import write_report
from maskdino.evaluation.report_images import (
    EvaluatedImages,
    InstanceImages,
    f1_score,
    find_images,
    overlaps,
)
from maskdino.evaluation.semantic import SemanticEvaluator
from maskdino.visualization.drawing import Region
from maskdino.visualization.ground_truth import ground_truth_of
from maskdino.visualization.results import Categories, ImageResult
from tests.data.synthetic import Scene, box_xywh, make_scenes, write_coco

NAME = "drawn_report"
CLASSES = {"person": 0, "car": 1, "road": 2, "sky": 3}
SCENES = make_scenes(4, (48, 64), 4)
SHIFTS = (3, 0, 40, 1)  # to the right, of each image's prediction: the second is perfect
RANKING = ["000000000002.jpg", "000000000004.jpg", "000000000001.jpg", "000000000003.jpg"]
TASKS = ("panoptic", "instance", "semantic")


def shifted(scene: Scene, shift: int) -> dict:
    """The truth moved to the right, as a model predicts it for all tasks."""
    shapes = [(CLASSES[s.name], np.roll(mask, shift, axis=1)) for s, mask in scene.visible()]
    ids, segments = np.zeros(scene.size, np.int32), []
    labels = np.full(scene.size, CLASSES["sky"])
    for number, (label, mask) in enumerate(shapes, start=1):
        ids[mask], labels[mask] = number, label
        segments.append({"id": number, "isthing": label < 2, "category_id": label, "score": 0.75})
    things = [(label, mask) for label, mask in shapes if label < 2]
    boxes = np.array([box_xywh(mask) for _, mask in things], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances(scene.size)
    found.pred_boxes = Boxes(torch.from_numpy(boxes))
    found.pred_masks = torch.from_numpy(np.stack([mask for _, mask in things]))
    found.pred_classes = torch.tensor([label for label, _ in things])
    found.scores = torch.linspace(0.9, 0.6, len(things))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), len(CLASSES))
    return {
        "panoptic_seg": (torch.from_numpy(ids), segments),
        "instances": found,
        "sem_seg": one_hot.permute(2, 0, 1),
    }


def register(root: Path) -> None:
    folder = write_coco(root, {"val": SCENES})
    annotations = folder / "annotations"
    content = json.loads((annotations / "panoptic_val2017.json").read_text())
    maps = folder / "semantic"
    maps.mkdir()
    for annotation, scene in zip(content["annotations"], SCENES, strict=True):
        labels = np.full(scene.size, 255, np.uint8)
        for shape, mask in scene.visible():
            labels[mask] = CLASSES[shape.name]
        Image.fromarray(labels).save(maps / annotation["file_name"])
    order = list(CLASSES)
    register_panoptic_folder(
        NAME,
        annotations / "panoptic_val2017.json",
        folder / "val2017",
        folder / "panoptic_val2017",
        sorted(content["categories"], key=lambda category: order.index(category["name"])),
        instances_json=annotations / "instances_val2017.json",
        sem_seg_root=maps,
    )


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict]]:
    """OUTPUT_DIR of an evaluation of all tasks, and its results."""
    register(tmp_path_factory.mktemp("data"))
    output = tmp_path_factory.mktemp("output")
    folder = str(output / "inference" / NAME)
    evaluators = [
        PanopticEvaluator(NAME, folder),
        COCOInstanceEvaluator(NAME, folder, with_masks=True, fast=False),
        SemanticEvaluator(NAME, folder),
    ]
    results = {}
    for evaluator in evaluators:
        evaluator.reset()
        for record, scene, shift in zip(DatasetCatalog.get(NAME), SCENES, SHIFTS, strict=True):
            evaluator.process([record], [shifted(scene, shift)])
        results |= evaluator.evaluate()
    write_results(str(output), results)
    yield output, results
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def found(evaluation: tuple[Path, dict]) -> dict[str, EvaluatedImages]:
    """The images of each task."""
    output, results = evaluation
    images = find_images(NAME, output / "inference" / NAME, results, 0.5)
    return {part.task: part for part in images}


def test_images_of_all_tasks_are_ranked(found: dict[str, EvaluatedImages]) -> None:
    assert tuple(found) == TASKS
    for task in TASKS:
        ranked = found[task].ranked()
        assert [Path(record["file_name"]).name for _, record in ranked] == RANKING, task
        scores = [score for score, _ in ranked]
        assert scores[0] == 1
        assert scores[-1] < 0.6


def test_scores_are_those_of_an_evaluation_of_one_image(
    evaluation: tuple[Path, dict], found: dict[str, EvaluatedImages], tmp_path: Path
) -> None:
    metadata, records = MetadataCatalog.get(NAME), DatasetCatalog.get(NAME)
    content = json.loads(Path(metadata.panoptic_json).read_text())
    content["annotations"] = content["annotations"][:1]
    (tmp_path / "one.json").write_text(json.dumps(content))
    quality, semantic = PanopticEvaluator(NAME, None), SemanticEvaluator(NAME, None)
    paths = {"panoptic_json": str(tmp_path / "one.json"), "panoptic_root": metadata.panoptic_root}
    quality._metadata = Metadata(**paths)
    for evaluator, task, key, name in (
        (quality, "panoptic", "panoptic_seg", "PQ"),
        (semantic, "semantic", "sem_seg", "mIoU"),
    ):
        evaluator.reset()
        evaluator.process(records[:1], [shifted(SCENES[0], SHIFTS[0])])
        expected = evaluator.evaluate()[key][name] / 100
        assert found[task].score(records[0]) == pytest.approx(expected)
        assert 0.2 < expected < 0.99
    assert evaluation[1]["panoptic_seg"]["PQ"] < 100


def test_results_are_what_was_written(found: dict[str, EvaluatedImages]) -> None:
    record, prediction = found["panoptic"].records[0], shifted(SCENES[0], SHIFTS[0])
    truth, predicted = found["panoptic"].results(record)
    np.testing.assert_array_equal(predicted.panoptic_ids, prediction["panoptic_seg"][0])
    names = [predicted.categories.names[s["category_id"]] for s in predicted.segments]
    assert names == [shape.name for shape, _ in SCENES[0].visible()]
    assert {s["score"] for s in predicted.segments} == {0.75}
    assert (truth.panoptic_ids != predicted.panoptic_ids).any()
    _, predicted = found["semantic"].results(record)
    np.testing.assert_array_equal(predicted.label_map, prediction["sem_seg"].argmax(0))
    truth, predicted = found["instance"].results(record)
    np.testing.assert_array_equal(predicted.masks, prediction["instances"].pred_masks)
    assert set(truth.class_names) <= {"person", "car"}


def test_page_has_a_section_of_each_task_and_draws_what_it_shows(
    evaluation: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = EvaluatedImages.draw

    def spy(self: EvaluatedImages, record: dict) -> np.ndarray:
        drawn.append((self.task, Path(record["file_name"]).name))
        return draw(self, record)

    monkeypatch.setattr(EvaluatedImages, "draw", spy)
    page = write_report(tmp_path / "r.html", NAME, evaluation[0], num_images=1).read_text()
    assert re.findall("<h2>Images: (.*?)</h2>", page) == list(TASKS)
    assert drawn == [(task, name) for task in TASKS for name in (RANKING[0], RANKING[-1])]
    assert page.count("data:image/jpeg") == 6
    assert re.findall(r"<figcaption>panoptic_seg: (\w+) of each class in percent<", page) == ["PQ"]


def test_older_files_beside_the_evaluation_are_not_shown(evaluation: tuple[Path, dict]) -> None:
    folder = evaluation[0] / "inference" / NAME
    assert [i.task for i in find_images(NAME, folder, ["sem_seg"], 0.5)] == ["semantic"]
    assert find_images(NAME, folder / "nowhere", ["sem_seg"], 0.5) == []


def test_incomplete_predictions_are_named(evaluation: tuple[Path, dict], tmp_path: Path) -> None:
    (tmp_path / "sem_seg.json").write_text("{}")
    (tmp_path / "predictions.json").write_text('{"annotations": []}')
    for key, task, image in (("sem_seg", "semantic", "jpg"), ("panoptic_seg", "panoptic", "1, 2")):
        with pytest.raises(ValueError, match=f"no {task} prediction for 4 images.*{image}"):
            find_images(NAME, tmp_path, [key], 0.5)
    assert evaluation[1]


def test_large_pictures_are_made_small(found: dict[str, EvaluatedImages], tmp_path: Path) -> None:
    Image.new("RGB", (1500, 1000)).save(tmp_path / "a.png")
    images, name = found["semantic"], str(tmp_path / "a.png")
    predicted = images.folder / SEMANTIC_FOLDER / "large.png"
    Image.new("L", (1500, 1000)).save(predicted)
    images._found[name] = predicted.name
    record = {"file_name": name, "sem_seg_file_name": str(predicted)}
    height, width, _ = images.draw(record).shape
    assert 1400 < width < 1500
    assert 480 < height < 540


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_what_is_found_keeps_its_colour(
    found: dict[str, EvaluatedImages], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list = []
    make = ImageResult.regions

    def spy(self: ImageResult, task: str, colors: list[int] | None) -> list[Region]:
        regions = make(self, task, colors)
        used.append([region.color for region in regions])
        return regions

    monkeypatch.setattr(ImageResult, "regions", spy)
    perfect, worst = (found[task].records[SHIFTS.index(shift)] for shift in (0, 40))
    found[task].draw(perfect)
    assert sorted(used[0]) == sorted(used[1])
    found[task].draw(worst)
    assert sorted(used[2]) != sorted(used[3])


def test_regions_of_a_drawing_are_made_once(
    found: dict[str, EvaluatedImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = ImageResult.regions, []
    monkeypatch.setattr(ImageResult, "regions", lambda *args: made.append(args) or make(*args))
    for images in found.values():
        images.draw(images.records[0])
    assert len(made) == 2 * len(found)


def test_overlaps_of_nothing(truths: list[tuple[dict, ImageResult]]) -> None:
    truth = truths[0][1]
    nothing = truth.select(np.zeros(len(truth), bool))
    assert overlaps(nothing, truth, "instance").shape == (0, len(truth))
    assert overlaps(truth, nothing, "instance").shape == (len(truth), 0)
    np.testing.assert_array_equal(np.diag(overlaps(truth, truth, "instance")), 1)


NUCLEI = Categories(("nucleus",), (True,), (1,))


@pytest.fixture(scope="module")
def truths() -> list[tuple[dict, ImageResult]]:
    """Records and annotations of six validation images."""
    entries = DatasetCatalog.get("nuclei_val")[:6]
    return [(entry, ground_truth_of(entry, NUCLEI)) for entry in entries]


def test_instances_are_scored(truths: list[tuple[dict, ImageResult]], tmp_path: Path) -> None:
    """Predictions: the first image perfect, the second not at all, of the others every second."""
    records = []
    for number, (entry, truth) in enumerate(truths):
        entries = truth.to_coco(entry["image_id"])
        kept = entries if number == 0 else entries[::2] if number > 1 else []
        records += [entry | {"score": 0.9 - 0.001 * i} for i, entry in enumerate(kept)]
    (tmp_path / "coco_instances_results.json").write_text(json.dumps(records))
    (images,) = find_images("nuclei_val", tmp_path, ["segm"], 0.5)
    assert isinstance(images, InstanceImages)
    values = [images.score(entry) for entry, _ in truths]
    assert values[:2] == [1, 0]
    for (_, truth), value in zip(truths[2:], values[2:], strict=True):
        half = (len(truth) + 1) // 2
        assert value == pytest.approx(2 * half / (len(truth) + half))
    (images,) = find_images("nuclei_val", tmp_path, ["segm"], 0.95)
    assert not any(images.score(entry) for entry, _ in truths)


def test_an_object_is_found_once(truths: list[tuple[dict, ImageResult]]) -> None:
    truth = truths[0][1]
    scores = np.ones(len(truth), np.float32)
    perfect = replace(truth, scores=scores)
    assert f1_score(truth, perfect) == 1
    twice = perfect.select(np.repeat(np.arange(len(truth)), 2))
    assert f1_score(truth, twice) == pytest.approx(2 / 3)
    assert f1_score(replace(truth, rles=None), perfect) == 1  # by boxes
    nothing = perfect.select(np.zeros(len(truth), bool))
    assert (f1_score(truth, nothing), f1_score(nothing, truth)) == (0, 0)
    assert math.isnan(f1_score(nothing, nothing))  # neither good nor bad
