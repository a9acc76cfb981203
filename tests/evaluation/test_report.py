"""The report of an evaluation: its numbers, its curves, and what it calls best and worst."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from maskdino.data import register_coco_folder
from maskdino.evaluation.charts import bars, curves, matrix
from maskdino.evaluation.report import precision_recall, report_paths, write_report
from maskdino.visualization.ground_truth import ground_truth_of
from maskdino.visualization.results import Categories, ImageResult

SVG = "{http://www.w3.org/2000/svg}"
CATEGORIES = Categories(("nucleus",), (True,), (1,))


@pytest.fixture(scope="module")
def truths() -> list[tuple[int, ImageResult]]:
    """Image ids and annotations of six validation images."""
    entries = DatasetCatalog.get("nuclei_val")[:6]
    return [(entry["image_id"], ground_truth_of(entry, CATEGORIES)) for entry in entries]


@pytest.fixture(scope="module")
def records(truths: list[tuple[int, ImageResult]]) -> list[dict]:
    """Predictions: the first image perfect, the second not at all, of the others every second."""
    found = []
    for number, (image_id, truth) in enumerate(truths):
        entries = truth.to_coco(image_id)
        kept = entries if number == 0 else entries[::2] if number > 1 else []
        found += [entry | {"score": 0.9 - 0.001 * i} for i, entry in enumerate(kept)]
    return found


def test_report_shows_numbers_curves_and_images(tmp_path: Path, records: list[dict]) -> None:
    folder = tmp_path / "inference" / "nuclei_val"
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(records))
    metrics = {
        "bbox": {"AP": 40.0},
        "segm": {"AP": 43.21, "APl": float("nan"), "AP-cat & dog": 12.5, "AP-owl": float("nan")},
        "sem_seg": {"mIoU": 65.43, "IoU-a": 70.0, "IoU-b": 30.0, "ACC-a": 81.0, "ACC-b": 82.0},
    }
    (tmp_path / "inference" / "results.json").write_text(json.dumps(metrics))
    page = write_report(tmp_path / "r.html", "nuclei_val", tmp_path, num_images=2).read_text()
    assert "43.2" in page
    assert "cat &amp; dog" in page
    tables = "".join(re.findall("(?s)<table>.*?</table>", page))
    assert "65.4" in tables
    assert "ACC-a" not in tables  # classes have bars
    assert page.count('class="bars"') == 3
    assert "segm: AP of each class in percent (1 could not be measured)" in page
    assert "owl" not in page
    assert page.index("segm: precision over recall") < page.index("Results: sem_seg")
    assert (
        len(re.findall(r">IoU 0\.\d+: [\d.]+<", page)) == 6
    )  # boxes and masks at three thresholds
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    embedded = re.findall(r'base64,([^"]+)"', page)
    assert len(embedded) == 4
    assert Image.open(io.BytesIO(base64.b64decode(embedded[0]))).size[0] > 500
    captions = re.findall(r"<figcaption>\S+\.png: ([\d.]+) %</figcaption>", page)
    assert captions[0] == "100.0"
    assert captions[-2:] == ["0.0", "0.0"]
    assert page.index("Best") < page.index("Worst")
    assert "over 24 of 24 images" in page


def test_report_shows_errors(tmp_path: Path, records: list[dict]) -> None:
    pytest.importorskip("hotcoco", reason="hotcoco is optional, see requirements.txt")
    twice = records[0] | {"score": 0.3}
    page = page_of(tmp_path, [*records, twice])
    errors = page[page.index("Errors: segm") : page.index("Images: instance")]
    kinds = dict(re.findall(r"<tr><td>([a-z ]+)</td><td>(\d+)</td><td>[\d.]+</td>", errors))
    assert kinds["duplicate"] == "1"
    chart = re.search(r"(?s)<svg.*?</svg>", errors)
    assert chart
    texts = [text.text for text in ElementTree.fromstring(chart[0]).iter(f"{SVG}text")]
    assert texts.count("nucleus") == texts.count("nothing") == 2
    annotated = sum(len(entry["annotations"]) for entry in DatasetCatalog.get("nuclei_val"))
    assert kinds["missed"] == str(annotated - len(records))
    assert {str(len(records)), kinds["missed"]} <= set(texts)
    assert "21 to 100" in errors
    assert "annotations to look at" not in errors  # every prediction is an object


def test_report_says_how_errors_are_shown(
    tmp_path: Path, records: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskdino.evaluation.errors.hotcoco", None)
    page = page_of(tmp_path, records)
    assert "Errors: segm" not in page
    assert page.count('pip install "maskdino[analysis]"') == 2


def test_masks_that_were_not_measured_are_left_out(tmp_path: Path, records: list[dict]) -> None:
    height, width = records[0]["segmentation"]["size"]
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": height, "width": width}],
        "categories": [{"id": 1, "name": "nucleus"}],
        "annotations": [{**box, "id": 1, "area": 81.0, "iscrowd": 0}],  # has no mask
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_folder("bare", tmp_path / "a.json", tmp_path)
    found = [{**box, "score": 0.9, "segmentation": records[0]["segmentation"]}]
    page = page_of(tmp_path, found, "bare", {"bbox": {"AP": 100.0}})
    assert "bbox: precision over recall" in page


def page_of(
    folder: Path, records: list[dict], dataset: str = "nuclei_val", results: dict | None = None
) -> str:
    """The report of predictions."""
    inference = folder / "inference" / dataset
    inference.mkdir(parents=True)
    (inference / "coco_instances_results.json").write_text(json.dumps(records))
    results = results or {"bbox": {"AP": 40.0}, "segm": {"AP": 43.21}}
    (folder / "inference" / "results.json").write_text(json.dumps(results))
    return write_report(folder / "r.html", dataset, folder, num_images=1).read_text()


def test_curves_leave_out_classes_without_objects() -> None:
    precision = np.full((10, 101, 3, 4, 3), -1.0)
    precision[:, :, 0], precision[:, :, 2] = 1.0, 0.5
    found = precision_recall(precision)
    assert list(found) == ["IoU 0.5", "IoU 0.75", "IoU 0.9"]
    np.testing.assert_allclose(found["IoU 0.5"], np.full(101, 0.75))
    assert precision_recall(np.full((10, 101, 3, 4, 3), -1.0)) == {}


def drawn(chart: str, style: str) -> list[np.ndarray]:
    """Corners (N, 2) of all shapes of a style in an SVG, in pixels, y downwards."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="{style}', chart)
    numbers = (re.findall(r"-?[\d.]+", path) for path in paths)
    return [np.array(found, float).reshape(-1, 2) for found in numbers]


def test_bars_are_ordered_and_in_proportion() -> None:
    chart = bars({"$b$": 20.0, "a & <b>": 80.0, "c": 0.0})
    texts = [text.text for text in ElementTree.fromstring(chart).iter(f"{SVG}text")]
    assert texts == ["a & <b>", "$b$", "c", "80.0", "20.0", "0.0"]
    corners = drawn(chart, "fill: #1f77b4")
    widths = [np.ptp(found[:, 0]) for found in corners]
    assert widths == pytest.approx([4 * widths[1], widths[1], 0], abs=1e-3)
    assert widths[1] > 50
    assert corners[0][:, 1].max() < corners[1][:, 1].min()  # the longest is on top


def test_curves_fall_from_left_to_right() -> None:
    chart = curves({"one": np.array([1.0, 0.0]), "two": np.full(2, 0.25)})
    texts = {text.text for text in ElementTree.fromstring(chart).iter(f"{SVG}text")}
    assert {"recall", "precision", "one: 50.0", "two: 25.0"} <= texts
    (x0, y0), (x1, y1) = drawn(chart, "fill: none; stroke: #1f77b4")[0]
    assert x0 < x1 and y0 < y1
    level = drawn(chart, "fill: none; stroke: #ff7f0e")[0]
    np.testing.assert_allclose(level, [[x0, (y0 + 3 * y1) / 4], [x1, (y0 + 3 * y1) / 4]], rtol=1e-4)


def test_a_matrix_has_its_numbers_in_place() -> None:
    chart = matrix(np.array([[7, 0, 1], [2, 5, 3]]), ["$r$", "s"], ["x", "y", "z"])
    found = {}
    for text in ElementTree.fromstring(chart).iter(f"{SVG}text"):
        place = re.search(r"translate\(([\d.]+) ([\d.]+)\)|^$", text.get("transform", ""))
        x, y = place.groups() if place and place[0] else (text.get("x"), text.get("y"))
        found[text.text] = (float(x or 0), float(y or 0))
    assert {"$r$", "s", "predicted", "annotated"} <= set(found)
    columns, rows = [["7", "2"], ["0", "5"], ["1", "3"]], [["7", "0", "1"], ["2", "5", "3"]]
    lefts = [{round(found[number][0], 1) for number in column} for column in columns]
    tops = [{round(found[number][1], 1) for number in row} for row in rows]
    assert [len(x) for x in lefts + tops] == [1] * 5
    assert min(lefts[0]) < min(lefts[1]) < min(lefts[2])
    assert max(tops[0]) < min(tops[1])  # the first row is on top


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    (tmp_path / "inference").mkdir()
    results = {"<i>": {"<b>AP</b>": 1.0, "AP-<script>": 50.0, "AP-</svg>": 20.0}}
    (tmp_path / "inference" / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path / "r.html", "<u>&", tmp_path).read_text()
    for text in ("<i>", "<b>", "<script>", "<u>"):
        assert text not in page
        assert html.escape(text) in page
    assert page.count("</svg>") == 1


def test_without_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        write_report(tmp_path / "r.html", "nuclei_val", tmp_path)


def test_the_one_dataset_that_was_evaluated_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "inference" / "nuclei_val").mkdir(parents=True)
    (tmp_path / "inference" / "results.json").write_text(json.dumps({"bbox": {"AP": 11.1}}))
    with pytest.raises(ValueError, match="holds results of nuclei_val, not of nuclei_train: eval"):
        write_report(tmp_path / "r.html", "nuclei_train", tmp_path)


def test_several_datasets(tmp_path: Path) -> None:
    assert report_paths(["a"], tmp_path) == {"a": tmp_path / "report.html"}
    paths = report_paths(["a", "b"], tmp_path)
    assert paths == {name: tmp_path / f"report_{name}.html" for name in "ab"}
    (tmp_path / "inference").mkdir()
    results = {"a": {"bbox": {"AP": 11.1}}, "b": {"bbox": {"AP": 22.2}}}
    (tmp_path / "inference" / "results.json").write_text(json.dumps(results))
    pages = [write_report(path, name, tmp_path).read_text() for name, path in paths.items()]
    assert ["11.1" in page for page in pages] == [True, False]
    with pytest.raises(ValueError, match="holds results of a, b, not of nuclei_val: evaluate"):
        write_report(tmp_path / "r.html", "nuclei_val", tmp_path)
