"""Tests of maskdino.evaluation.semantic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils import comm
from PIL import Image

from maskdino.data.datasets import register_semantic_folder
from maskdino.data.reading import DataError, read_map
from maskdino.evaluation.semantic import SemanticEvaluator, semantic_metrics

NAMES = ["sky", "road", "tree", "boat", "moon"]
KINDS = {"file_name": "images", "sem_seg_file_name": "labels"}
SIZES = [(12, 20), (9, 7), (16, 16)]


@pytest.fixture
def maps(tmp_path: Path) -> list[np.ndarray]:
    """Label maps of three images; nowhere is a boat or a moon, some pixels are ignored."""
    generator = np.random.default_rng(0)
    drawn = [generator.choice([0, 1, 2, 255], size).astype(np.uint8) for size in SIZES]
    for number, labels in enumerate(drawn):
        for folder, pixels in (("labels", labels), ("images", labels)):
            path = tmp_path / folder / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
    return drawn


@pytest.fixture
def dataset(tmp_path: Path, maps: list[np.ndarray]) -> str:  # noqa: ARG001 - files
    name = "drawn_labels"
    register_semantic_folder(name, tmp_path / "labels", tmp_path / "images", NAMES, image_ext="png")
    return name


def scores(labels: np.ndarray) -> torch.Tensor:
    """A prediction (5, H, W): right at most places; some pixels are boats, none are moons."""
    generator = np.random.default_rng(labels.size)
    wrong = generator.random(labels.shape) < 0.3
    predicted = np.where(wrong | (labels == 255), generator.integers(0, 4, labels.shape), labels)
    return F.one_hot(torch.from_numpy(predicted.astype(np.int64)), 5).permute(2, 0, 1).float()


def run(evaluator: object, folder: Path, predictions: list[torch.Tensor]) -> dict[str, float]:
    evaluator.reset()
    for number, prediction in enumerate(predictions):
        path = folder / "images" / f"{number}.png"
        evaluator.process([{"file_name": str(path)}], [{"sem_seg": prediction}])
    return evaluator.evaluate()["sem_seg"]


def test_same_numbers_as_detectron2(dataset: str, tmp_path: Path, maps: list[np.ndarray]) -> None:
    predictions = [scores(labels) for labels in maps]
    ours = run(SemanticEvaluator(dataset, str(tmp_path / "out")), tmp_path, predictions)
    theirs = run(SemSegEvaluator(dataset, distributed=False), tmp_path, predictions)
    assert 20 < ours["mIoU"] < 80
    for name, value in theirs.items():
        if "BoundaryIoU" in name or "B-Iou" in name:  # newer releases, where OpenCV is installed
            continue
        # Detectron2 leaves out what the predictions alone have; for us its IoU is 0.
        expected = 0.0 if name == "IoU-boat" else value
        assert ours[name] == pytest.approx(expected, nan_ok=True), name
    assert np.isnan(ours["IoU-moon"])
    written = json.loads((tmp_path / "out" / "confusion_matrix.json").read_text())
    assert sum(map(sum, written["counts"])) == sum((labels < 255).sum() for labels in maps)


def test_label_maps_stay_also_of_several_processes(
    dataset: str, tmp_path: Path, maps: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = [scores(labels) for labels in maps]
    whole = run(SemanticEvaluator(dataset, None), tmp_path, predictions)
    out = tmp_path / "out"
    paths = [str(tmp_path / "images" / f"{number}.png") for number in range(3)]
    gathered: list = []
    monkeypatch.setattr(comm, "gather", lambda part: gathered.append(part) or gathered)
    for numbers in ([2], [0, 1]):  # two processes; the second is the main one, which gathers both
        evaluator = SemanticEvaluator(dataset, str(out))
        for number in numbers:
            evaluator.process([{"file_name": paths[number]}], [{"sem_seg": predictions[number]}])
        results = evaluator.evaluate()["sem_seg"]
    assert results == pytest.approx(whole, nan_ok=True)
    files = json.loads((out / "sem_seg.json").read_text())
    assert files.keys() == set(paths)
    for path, prediction in zip(paths, predictions, strict=True):
        written = np.array(Image.open(out / "sem_seg" / files[path]))
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written, prediction.argmax(0))


def test_pictures_of_one_name_and_many_classes(tmp_path: Path) -> None:
    names = [str(number) for number in range(255)]
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        for city in ("aachen", "bonn"):
            path = tmp_path / folder / city / "same.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(generator.integers(0, 250, (8, 9), np.uint8)).save(path)
    pairs = [
        {key: str(tmp_path / kind / city / "same.png") for key, kind in KINDS.items()}
        for city in ("aachen", "bonn")
    ]
    DatasetCatalog.register("large", lambda: pairs)
    MetadataCatalog.get("large").set(stuff_classes=names)
    evaluator = SemanticEvaluator("large", str(tmp_path / "out"))
    predicted = torch.zeros(2, 255, 8, 9)
    predicted[0, 254], predicted[1, 7] = 1, 1
    for pair, prediction in zip(pairs, predicted, strict=True):
        evaluator.process([{"file_name": pair["file_name"]}], [{"sem_seg": prediction}])
    evaluator.evaluate()
    files = json.loads((tmp_path / "out" / "sem_seg.json").read_text())
    written = [read_map(str(tmp_path / "out/sem_seg" / files[p["file_name"]]), None) for p in pairs]
    assert [(m.dtype, m.min(), m.max()) for m in written] == [
        (np.uint8, 254, 254),
        (np.uint8, 7, 7),
    ]
    MetadataCatalog.get("large").stuff_classes.append("one too many")
    with pytest.raises(DataError, match="256 classes are too many"):
        SemanticEvaluator("large", None).process(
            [{"file_name": pairs[0]["file_name"]}], [{"sem_seg": torch.zeros(256, 8, 9)}]
        )


def test_perfect_and_nothing_known() -> None:
    perfect = semantic_metrics(np.diag([5, 0, 7]), ["a", "b", "c"])
    assert [perfect[k] for k in ("mIoU", "fwIoU", "mACC", "pACC", "IoU-a")] == [100.0] * 5
    nothing = semantic_metrics(np.zeros((3, 3), np.int64), ["a", "b", "c"])
    assert all(np.isnan(value) for value in nothing.values())


def test_bad_files_are_named(dataset: str, tmp_path: Path, maps: list[np.ndarray]) -> None:
    evaluator = SemanticEvaluator(dataset, None)
    example = [{"file_name": str(tmp_path / "images" / "0.png")}]
    with pytest.raises(ValueError, match="predicts 4 classes, but the dataset has 5"):
        evaluator.process(example, [{"sem_seg": scores(maps[0])[:4]}])
    with pytest.raises(DataError, match=r"labels/0\.png has .* \(12, 20\), but .* \(12, 19\)"):
        evaluator.process(example, [{"sem_seg": scores(maps[0])[..., :19]}])
    maps[0][3, 3] = 77
    Image.fromarray(maps[0]).save(tmp_path / "labels" / "0.png")
    with pytest.raises(DataError, match=r"labels/0\.png holds the values \[77\]"):
        evaluator.process(example, [{"sem_seg": scores(maps[0] % 5)}])
