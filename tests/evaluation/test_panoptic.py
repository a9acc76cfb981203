"""Tests of maskdino.evaluation.panoptic."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from panopticapi.evaluation import PQStat, pq_compute

from maskdino.data import DataError
from maskdino.data.datasets import register_panoptic_folder
from maskdino.evaluation.panoptic import PanopticEvaluator, panoptic_metrics
from tests.data.synthetic import COCO_IDS, Scene, make_scenes, write_coco

THINGS = {"person": 0, "car": 1}
STUFF = {"road": 2, "sky": 3}
SCENES = make_scenes(3, (48, 64), 4)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    folder = write_coco(tmp_path, {"val": SCENES})
    annotations = folder / "annotations" / "panoptic_val2017.json"
    categories = json.loads(annotations.read_text())["categories"]
    assert [c["id"] for c in categories] == [COCO_IDS[name] for name in (*THINGS, *STUFF)]
    maps = folder / "panoptic_val2017"
    register_panoptic_folder("drawn_quality", annotations, folder / "val2017", maps, categories)
    return "drawn_quality"


def shifted(scene: Scene, shift: int, kinds: dict[str, int]) -> tuple[torch.Tensor, list[dict]]:
    """The truth moved to the right, as a model predicts it."""
    ids, segments = np.zeros(scene.size, np.int32), []
    for number, (shape, mask) in enumerate(scene.visible(), start=1):
        if shape.name in kinds:
            ids[np.roll(mask, shift, axis=1)] = number
            label = kinds[shape.name]
            segments.append({"id": number, "isthing": label < 2, "category_id": label})
    present = set(np.unique(ids))
    return torch.from_numpy(ids), [s for s in segments if s["id"] in present]


def run(evaluator: COCOPanopticEvaluator, shift: int, kinds: dict[str, int]) -> dict[str, float]:
    evaluator.reset()
    for number, scene in enumerate(SCENES, start=1):
        inputs = {"image_id": number, "file_name": f"{number:012d}.jpg"}
        evaluator.process([inputs], [{"panoptic_seg": shifted(scene, shift, kinds)}])
    return evaluator.evaluate()["panoptic_seg"]


@pytest.mark.parametrize("shift", [0, 3])
def test_same_numbers_as_detectron2(dataset: str, tmp_path: Path, shift: int) -> None:
    ours = run(PanopticEvaluator(dataset, None), shift, THINGS | STUFF)
    theirs = run(COCOPanopticEvaluator(dataset, str(tmp_path)), shift, THINGS | STUFF)
    assert {name: ours[name] for name in theirs} == pytest.approx(dict(theirs))
    classes = [ours[f"PQ-{name}"] for name in (*THINGS, *STUFF)]
    assert np.mean(classes) == pytest.approx(ours["PQ"])
    assert ours["PQ"] == 100 if shift == 0 else 20 < ours["PQ"] < 95


def test_what_was_evaluated_stays(dataset: str, tmp_path: Path) -> None:
    ours = run(PanopticEvaluator(dataset, str(tmp_path / "out")), 3, THINGS | STUFF)
    metadata = MetadataCatalog.get(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        again = pq_compute(
            metadata.panoptic_json,
            str(tmp_path / "out" / "predictions.json"),
            metadata.panoptic_root,
            str(tmp_path / "out" / "panoptic"),
        )
    assert 100 * again["All"]["pq"] == pytest.approx(ours["PQ"])
    assert 100 * again["Stuff"]["sq"] == pytest.approx(ours["SQ_st"])


def test_pictures_of_one_name_stay_apart(dataset: str, tmp_path: Path) -> None:
    evaluator = PanopticEvaluator(dataset, str(tmp_path))
    evaluator.reset()
    for number, scene in enumerate(SCENES, start=1):
        inputs = {"image_id": number, "file_name": f"{number}/same.jpg"}
        evaluator.process([inputs], [{"panoptic_seg": shifted(scene, 0, THINGS | STUFF)}])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100
    files = sorted(path.name for path in (tmp_path / "panoptic").iterdir())
    assert files == ["same.png", "same_2.png", "same_3.png"]


def test_records_need_not_tell_the_size(dataset: str) -> None:
    """Those of Cityscapes do not, where slices are predicted and no mapper has read the image."""
    evaluator = PanopticEvaluator(dataset, None)
    evaluator.reset()
    for record, scene in zip(DatasetCatalog.get(dataset), SCENES, strict=True):
        ids, segments = shifted(scene, 0, THINGS | STUFF)
        known = {key: record[key] for key in record if key not in ("height", "width")}
        evaluator.process([known], [{"panoptic_seg": (ids, segments)}])
        with pytest.raises(
            DataError, match=r"\.png has \(height, width\) \(48, 64\), .* \(47, 64\)"
        ):
            evaluator.process([known], [{"panoptic_seg": (ids[1:], segments)}])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100


def test_nothing_stays_without_a_folder(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = set(tmp_path.rglob("*"))
    assert run(PanopticEvaluator(dataset, None), 0, THINGS | STUFF)["PQ"] == 100
    assert set(tmp_path.rglob("*")) == before


def test_dataset_without_stuff(dataset: str) -> None:
    path = Path(MetadataCatalog.get(dataset).panoptic_json)
    content = json.loads(path.read_text())
    ids = [COCO_IDS[name] for name in THINGS]
    content["categories"] = [c for c in content["categories"] if c["id"] in ids]
    for annotation in content["annotations"]:
        segments = annotation["segments_info"]
        annotation["segments_info"] = [s for s in segments if s["category_id"] in ids]
    # The maps still have the stuff, which panopticapi takes as unknown.
    path.write_text(json.dumps(content))
    results = run(PanopticEvaluator(dataset, None), 3, THINGS)
    assert results["PQ"] == results["PQ_th"]
    assert 20 < results["PQ"] < 95
    assert np.isnan(results["PQ_st"])


def test_classes_without_a_match_count_for_zero() -> None:
    """Things: one right, one invented; stuff: one right with IoU 0.8, one missed, one nowhere."""
    names = {1: ("right", 1), 2: ("invented", 1), 3: ("rough", 0), 4: ("missed", 0), 5: ("nil", 0)}
    categories = {i: {"id": i, "name": name, "isthing": t} for i, (name, t) in names.items()}
    quality = PQStat()
    quality.pq_per_cat[1].tp, quality.pq_per_cat[1].iou = 1, 1.0
    quality.pq_per_cat[2].fp = 1
    quality.pq_per_cat[3].tp, quality.pq_per_cat[3].iou = 2, 1.6
    quality.pq_per_cat[4].fn = 3
    found = panoptic_metrics(quality, categories)
    expected = {"PQ": 45.0, "SQ": 45.0, "RQ": 50.0, "PQ_th": 50.0, "SQ_th": 50.0, "RQ_th": 50.0}
    expected |= {"PQ_st": 40.0, "SQ_st": 40.0, "RQ_st": 50.0, "PQ-right": 100.0}
    expected |= {"PQ-invented": 0.0, "PQ-rough": 80.0, "PQ-missed": 0.0, "PQ-nil": np.nan}
    assert found == pytest.approx(expected, nan_ok=True)


def test_image_that_was_not_predicted(dataset: str) -> None:
    evaluator = PanopticEvaluator(dataset, None)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"no prediction for 3 images of .*json, .* \[1, 2, 3\]"):
        evaluator.evaluate()
