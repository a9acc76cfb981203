"""Tests of maskdino.custom.annotations and maskdino.custom.checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from maskdino.custom.annotations import read_annotations, summarize, write_annotations
from maskdino.custom.checks import check, check_pair, drop, file_problem
from maskdino.data import DataError
from maskdino.data.annotation_checks import Finding, describe
from tests.custom.drawn import Drawn, write_drawn


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    return write_drawn(tmp_path / "drawn")


def fatal_kinds(drawn: Drawn) -> set[str]:
    findings = check(read_annotations(drawn.write().json_file, drawn.images))
    return {finding.kind for finding in findings if finding.fatal}


def warnings_of(drawn: Drawn) -> set[str]:
    findings = check(read_annotations(drawn.write().json_file, drawn.images))
    assert not any(finding.fatal for finding in findings)
    return {finding.kind for finding in findings}


def test_good_data_have_no_errors(drawn: Drawn) -> None:
    assert fatal_kinds(drawn) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("3", "a single int"),
        ("[3]", "a bare list"),
        ("[" * 200_000, "nested too deeply"),
        ('[{"score": 1}]', "results of a model"),
        ('{"shapes": []}', "labelme"),
        ('{"images": []}', "lacks annotations, categories; it has images"),
        ('{"images": [1], "annotations": [], "categories": []}', "'images' must be a list"),
        (
            '{"images": [], "annotations": [{"segments_info": []}], "categories": []}',
            "panoptic format",
        ),
    ],
)
def test_files_of_other_formats(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_annotations(path, tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file .*lost\.json"):
        read_annotations(tmp_path / "lost.json", tmp_path)


def first_annotation(**values: object) -> Callable[[Drawn], None]:
    return lambda drawn: drawn.content["annotations"][0].update(values)


def first_image(**values: object) -> Callable[[Drawn], None]:
    return lambda drawn: drawn.content["images"][0].update(values)


def repeat(name: str) -> Callable[[Drawn], None]:
    return lambda drawn: drawn.content[name].append(dict(drawn.content[name][0]))


def write_image(content: bytes) -> Callable[[Drawn], None]:
    return lambda drawn: (drawn.images / "scene_0.png").write_bytes(content) and None


ERRORS: list[tuple[Callable[[Drawn], None], str]] = [
    (lambda drawn: drawn.content["categories"].clear(), "there are no classes"),
    (lambda drawn: drawn.content["images"].clear(), "there are no images"),
    (lambda drawn: drawn.content["annotations"].clear(), "there are no objects"),
    (repeat("categories"), "several categories with one id"),
    (lambda d: d.content["categories"][0].update(name="car"), "several categories with one name"),
    (repeat("images"), "several images with one id"),
    (lambda d: d.content["images"][0].update(file_name="scene_1.png"), "several images with one"),
    (repeat("annotations"), "several annotations with one id"),
    (first_image(id=None), "image without id"),
    (first_image(file_name=""), "image without file name"),
    (first_image(width=0), "image without height and width"),
    (first_image(width=65), "image has another size"),
    (lambda drawn: (drawn.images / "scene_0.png").unlink(), "image file is missing"),
    (write_image(b"no image"), "image cannot be read"),
    (first_annotation(id=None), "annotation without id"),
    (first_annotation(image_id=99), "annotation of an unknown image"),
    (first_annotation(image_id=[]), "annotation of an unknown image"),
    (first_annotation(category_id=1), "annotation of an unknown category"),
    (first_annotation(category_id=True), "annotation of an unknown category"),
    (first_annotation(bbox=[], segmentation=[]), "neither box nor mask"),
    (first_annotation(bbox=[1, 2, 3]), "box is not four numbers"),
    (first_annotation(bbox=[1, 2, 3, float("nan")]), "box is not four numbers"),
    (first_annotation(bbox=[1, 2, 3, 10**400]), "box is not four numbers"),
    (first_annotation(iscrowd="no"), "iscrowd is neither 0 nor 1"),
    (first_annotation(bbox=[1, 2, 0, 4]), "box of zero or negative size"),
    (first_annotation(bbox=[64, 2, 4, 4]), "box outside of its image"),
    (first_annotation(bbox=[2, -9, 4, 9]), "box outside of its image"),
    (first_annotation(segmentation=[1, 1, 9, 1, 9, 9]), "mask is malformed"),
    (first_annotation(segmentation=[[1, 1, 9, 1]]), "polygon without 3 whole points"),
    (first_annotation(segmentation=[[1, 1, 9, 1, 9, 9, 9]]), "polygon without 3 whole points"),
    (first_annotation(segmentation=[[1, 1, 9, 1, 9, 1e9]]), "mask is malformed"),
    (first_annotation(segmentation="polygon"), "mask is malformed"),
    (first_annotation(segmentation={"size": [48, 64]}), "mask is malformed"),
    (first_annotation(segmentation={"size": [64, 48], "counts": [3072]}), "mask is malformed"),
    (first_annotation(segmentation={"size": [48, 64], "counts": [3071]}), "mask is malformed"),
    (first_annotation(segmentation={"size": [48, 64], "counts": "abcdef"}), "mask is malformed"),
    (first_annotation(segmentation={"size": [48, 64], "counts": [3072]}), "empty mask"),
    (first_annotation(segmentation=[[70, 1, 80, 1, 80, 9]]), "empty mask"),
]


@pytest.mark.parametrize(("spoil", "kind"), ERRORS, ids=[kind for _, kind in ERRORS])
def test_errors_are_found_and_can_be_left_out(
    drawn: Drawn, spoil: Callable[[Drawn], None], kind: str
) -> None:
    spoil(drawn)
    data = read_annotations(drawn.write().json_file, drawn.images)
    findings = [finding for finding in check(data) if finding.fatal]
    assert any(finding.kind.startswith(kind) for finding in findings), findings
    if all(finding.droppable for finding in findings):
        rest = drop(data, findings)
        assert not any(finding.fatal for finding in check(rest))
        assert rest.objects()


def test_cut_off_image_is_found(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.effect_noise((400, 300), 50).save(path)
    assert file_problem(path, (300, 400)) is None
    path.write_bytes(path.read_bytes()[:-2000])
    assert file_problem(path, (300, 400))[0] == "image cannot be read"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_image_has_its_upright_size(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    upright = (40, 30) if orientation >= 5 else (30, 40)
    assert file_problem(path, upright) is None
    kind, detail = file_problem(path, upright[::-1])
    assert kind.startswith("image has another size")
    assert ("EXIF" in detail) == ("exiftool -Orientation=" in kind) == (orientation >= 5)
    assert "exiftool" not in file_problem(path, (9, 9))[0]
    del exif[0x0112]  # as the advice says
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert file_problem(path, (30, 40)) is None


def test_one_pixel_image(tmp_path: Path) -> None:
    for name in ("one.jpg", "one.png"):
        Image.new("L", (1, 1)).save(tmp_path / name)
        assert file_problem(tmp_path / name, (1, 1)) is None


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (first_annotation(bbox=[-5, 2, 20, 20]), "box reaches beyond its image"),
        (first_annotation(bbox=[5, 2, 2, 20]), "tiny object"),
        (first_annotation(bbox=[40, 30, 4, 4], segmentation=[[1, 1, 9, 1, 9, 9]]), "box and mask"),
        (first_annotation(segmentation=[]), "object without a mask"),
        (lambda d: d.content["categories"].append({"id": 1, "name": "tree"}), "class without"),
        (
            lambda d: d.content["annotations"].append({**d.content["annotations"][0], "id": 99}),
            "the same object more than once",
        ),
    ],
)
def test_warnings_are_no_errors(drawn: Drawn, spoil: Callable[[Drawn], None], kind: str) -> None:
    before = warnings_of(drawn)
    spoil(drawn)
    new = warnings_of(drawn) - before
    assert any(found.startswith(kind) for found in new), new


def test_images_without_objects_and_imbalance(drawn: Drawn) -> None:
    annotations = drawn.content["annotations"]
    car = next(a for a in annotations if a["category_id"] == 3)
    person = next(a for a in annotations if a["category_id"] == 70)
    annotations[:] = [{**person, "id": i, "image_id": 0} for i in range(30)] + [{**car, "id": 99}]
    kinds = warnings_of(drawn)
    assert {"image without objects", "unbalanced classes", "rare class"} <= kinds


def test_masks_must_be_complete_where_mask_ap_is_measured(drawn: Drawn) -> None:
    first_annotation(segmentation=[])(drawn)
    data = read_annotations(drawn.write().json_file, drawn.images)
    (wrong,) = (x for x in check(data, need_all_masks=True) if x.fatal)
    assert "mask AP cannot be measured" in wrong.kind
    assert len(drop(data, [wrong]).annotations) == len(data.annotations) - 1


def test_findings_name_file_and_annotation(drawn: Drawn) -> None:
    first_annotation(bbox=[1, 2, 0, 4])(drawn)
    data = read_annotations(drawn.write().json_file, drawn.images)
    lines = describe([finding for finding in check(data) if finding.fatal])
    expected = "  annotation 0 of image 0 (scene_0.png): [1, 2, 0, 4]"
    assert lines == ["box of zero or negative size", expected]


def test_findings_of_a_kind_are_counted_and_shown_in_part() -> None:
    findings = [Finding("no box", f"annotation {number}") for number in range(3)]
    lines = ["no box (3)", "  annotation 0", "  annotation 1", "  annotation 2"]
    assert (
        describe(findings) == describe(findings, most=None) == describe(findings, most=3) == lines
    )
    assert describe(findings, most=1) == [*lines[:2], "  ... and 2 more"]


def test_pairs(tmp_path: Path) -> None:
    first, second = (write_drawn(tmp_path / name) for name in "ab")
    data = [read_annotations(x.json_file, x.images) for x in (first, second)]
    assert not check_pair(*data)
    same = check_pair(data[0], data[0])
    assert len(same) == 6
    assert not any(finding.fatal for finding in same)
    second.content["categories"][0]["name"] = "dog"
    other = read_annotations(second.write().json_file, second.images)
    (finding,) = check_pair(data[0], other)
    assert finding.fatal
    assert "'dog'" in finding.detail
    assert "'person'" in finding.detail


@pytest.mark.parametrize("ids", ["integers", "texts"])
def test_written_annotations_mean_the_same(drawn: Drawn, tmp_path: Path, ids: str) -> None:
    if ids == "texts":
        for image in drawn.content["images"]:
            image["id"] = f"image-{image['id']}"
        for category in drawn.content["categories"]:
            category["id"] = f"category-{category['id']}"
        for annotation in drawn.content["annotations"]:
            annotation["image_id"] = f"image-{annotation['image_id']}"
            annotation["category_id"] = f"category-{annotation['category_id']}"
    first_annotation(bbox=None, area=None)(drawn)
    data = read_annotations(drawn.write().json_file, drawn.images)
    assert not any(finding.fatal for finding in check(data))
    path = tmp_path / "written.json"
    write_annotations(data, path)
    content = json.loads(path.read_text())
    expected_ids = {3, 70} if ids == "integers" else {1, 2}
    assert {category["id"] for category in content["categories"]} == expected_ids
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(data.annotations) + 1))
    again = read_annotations(path, drawn.images)
    assert summarize(again) == summarize(data)
    filled = content["annotations"][0]
    polygon = filled["segmentation"][0]
    x, y = polygon[::2], polygon[1::2]
    outline = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    assert filled["bbox"] == pytest.approx(outline, abs=1.5)
    assert 0 < filled["area"] <= filled["bbox"][2] * filled["bbox"][3]
