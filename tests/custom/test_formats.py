"""Tests of maskdino.custom.formats: real data in every format, and what is wrong with data."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdino.custom.annotations import read_annotations
from maskdino.custom.checks import check
from maskdino.custom.formats import OwnData, read_own_data
from maskdino.custom.formats.files import Tree
from maskdino.custom.formats.shapes import ellipse, turned
from maskdino.custom.prepare import prepare_data
from maskdino.custom.request import Request
from maskdino.data import DataError
from maskdino.ops.rle import decode_segmentation
from tests.custom import written
from tests.custom.drawn import write_drawn
from tests.custom.written import Sample

SIX_DIGITS = 1e-3  # pixels: YOLO's shares have six digits


def read(root: Path, **more: object) -> OwnData:
    return read_own_data(Request(data=root, output=root.parent / "out", **more))


@pytest.fixture(params=["fruits_nuts", "bccd_boxes", "nuclei_mini"])
def real(request: pytest.FixtureRequest, shared: Callable[..., Path]) -> Sample:
    """Polygons, boxes, and run lengths."""
    root = shared("data", request.param)
    files = {split: root / "annotations" / f"instances_{split}.json" for split in ("train", "val")}
    content = {split: json.loads(path.read_text()) for split, path in files.items()}
    return written.shorten(Sample({split: root / split for split in files}, content), 6)


@pytest.fixture
def drawn(tmp_path: Path) -> Sample:
    return drawn_sample(tmp_path / "drawn")


def drawn_sample(folder: Path, masks: bool = True) -> Sample:
    """Polygons in images of 64 x 48 pixels, without splits."""
    drawn = write_drawn(folder, 4, masks=masks)
    drawn.content["categories"].sort(key=lambda x: x["name"])
    return Sample({"train": drawn.images}, {"train": drawn.content})


def assert_same(own: OwnData, sample: Sample, near: float, pixels: bool = False) -> None:
    """Compares all images, classes, boxes and masks.

    Args:
        near: pixels by which coordinates may differ.
        pixels: compare masks as pixels, whatever their form.
    """
    parts = {"train": own.train, "val": own.validation}
    for split in sample.content:
        part = parts[split]
        assert part is not None and part.findings == []
        names = {x["id"]: x["name"] for x in part.data.categories}
        images = {Path(x["file_name"]).name: x for x in part.data.images}
        expected = [(image, objects) for s, image, objects in sample.each() if s == split]
        assert set(images) == {image["file_name"] for image, _ in expected}
        for image, objects in expected:
            found = images[image["file_name"]]
            size = image["height"], image["width"]
            assert (found["height"], found["width"]) == size
            assert part.data.path_of(found).is_file()
            own_objects = [x for x in part.data.annotations if x["image_id"] == found["id"]]
            assert [names[x["category_id"]] for x in own_objects] == [name for name, _ in objects]
            for x, (_, wanted) in zip(own_objects, objects, strict=True):
                assert_same_object(x, wanted, size, near, pixels)


def assert_same_object(
    x: dict, wanted: dict, size: tuple[int, int], near: float, pixels: bool
) -> None:
    segmentation = wanted.get("segmentation")
    if not segmentation:
        assert not x.get("segmentation")
    if isinstance(segmentation, list) and segmentation and not pixels:
        for own, polygon in zip(x["segmentation"], segmentation, strict=True):
            np.testing.assert_allclose(own, polygon, atol=near)
    elif segmentation:
        masks = [decode_segmentation(s, size) for s in (x["segmentation"], segmentation)]
        np.testing.assert_array_equal(*masks)
    if not isinstance(segmentation, list) or not segmentation:
        np.testing.assert_allclose(x["bbox"], wanted["bbox"], atol=near)


@pytest.mark.parametrize(
    ("write", "kind", "near"),
    [
        (written.write_coco, "COCO", 0),
        (written.write_roboflow, "COCO", 0),
        (written.write_yolo, "YOLO", SIX_DIGITS),
        (written.write_voc, "Pascal VOC", 1e-9),
        (written.write_labelme, "LabelMe", 1e-9),
        (written.write_cvat, "CVAT", 0.006),
    ],
)
def test_real_data_come_back(
    tmp_path: Path, real: Sample, write: Callable, kind: str, near: float
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    if write in (written.write_yolo, written.write_voc):  # no run lengths; VOC has boxes alone
        for content in real.content.values():
            for x in content["annotations"]:
                if write is written.write_voc or isinstance(x["segmentation"], dict):
                    x.pop("segmentation")
    write(real, root)
    own = read(root)
    assert own.notes[0].startswith(f"{root} is in the format of {kind}: ") or kind in (
        "YOLO",
        "CVAT",
    )
    assert f" is in the format of {kind}: train: 6 images" in own.notes[0]
    assert_same(own, real, near)
    classes = {x["name"] for x in own.train.data.categories}
    used = {name for *_, objects in real.each() for name, _ in objects}
    assert used <= classes <= set(real.names)


@pytest.mark.parametrize("write", [written.write_label_studio_yolo, written.write_darknet])
def test_yolo_without_yaml(tmp_path: Path, drawn: Sample, write: Callable) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(drawn, root)
    assert_same(read(root), drawn, SIX_DIGITS)


def test_labels_and_images_that_are_named(tmp_path: Path, drawn: Sample) -> None:
    """Each of the two folders, as before each file of COCO's."""
    root = tmp_path / "data"
    root.mkdir()
    written.write_yolo(drawn, root)
    request = Request(
        train_json=root / "labels" / "train", train_images=root / "images" / "train", output=root
    )
    assert_same(read_own_data(request), drawn, SIX_DIGITS)


def test_classes_of_named_parts_are_numbered_alike(tmp_path: Path, drawn: Sample) -> None:
    """Names alone are in the files, and a part may lack some."""
    parts = {}
    for split in ("train", "val"):
        parts[split] = tmp_path / split
        parts[split].mkdir()
        written.write_voc(boxes_only(drawn), parts[split])
    for path in parts["val"].glob("Annotations/*.xml"):
        path.write_text(path.read_text().replace(">car<", ">person<"))
    own = read_own_data(
        Request(
            train_json=parts["train"] / "Annotations",
            train_images=parts["train"] / "JPEGImages",
            val_json=parts["val"] / "Annotations",
            val_images=parts["val"] / "JPEGImages",
            output=tmp_path / "out",
        )
    )
    assert own.validation is not None
    assert {x["category_id"] for x in own.validation.data.annotations} == {2}
    by_number = {x["id"]: x["name"] for x in own.validation.data.categories}
    assert by_number == {1: "car", 2: "person"}


def boxes_only(sample: Sample) -> Sample:
    for content in sample.content.values():
        for x in content["annotations"]:
            x.pop("segmentation", None)
    return sample


def test_parent_class_of_roboflow_is_left_out(tmp_path: Path, drawn: Sample) -> None:
    written.write_roboflow(drawn, tmp_path / "data")
    own = read(tmp_path / "data")
    assert [x["name"] for x in own.train.data.categories] == ["car", "person"]
    assert "class 0 'things' is Roboflow's name for all classes: left out" in own.notes
    # One that has objects is a class like any other.
    path = tmp_path / "data" / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    assert len(read(tmp_path / "data").train.data.categories) == 3


def test_an_image_that_is_missing_is_named_where_the_others_are(
    tmp_path: Path, drawn: Sample
) -> None:
    written.write_roboflow(drawn, tmp_path / "data")
    lost = next((tmp_path / "data" / "train").glob("*.png"))
    lost.unlink()
    (wrong,) = [x for x in check(read(tmp_path / "data").train.data) if x.fatal]
    assert wrong.detail.endswith(f"({lost}): no such file")


def test_images_of_label_studio_and_of_other_machines(tmp_path: Path, drawn: Sample) -> None:
    """result.json names images by paths of the server."""
    root = tmp_path / "data"
    drawn.copy_images(lambda _: root / "images")
    for i, image in enumerate(drawn.content["train"]["images"]):
        folder = ("..\\media\\upload\\1\\", "/data/upload/1/", "images/", "")[i % 4]
        image["file_name"] = folder + image["file_name"]
    (root / "result.json").write_text(json.dumps(drawn.content["train"]))
    data = read(root).train.data
    assert all(data.path_of(image).is_file() for image in data.images)


def test_voc_that_counts_from_zero(tmp_path: Path, drawn: Sample) -> None:
    """A box that begins at 0 gives it away; Roboflow's polygons are read."""
    root = tmp_path / "data"
    drawn.copy_images(lambda _: root)
    boxes_only(drawn).content["train"]["annotations"][0]["bbox"] = [0, 3, 8, 9]
    for _, image, objects in drawn.each():
        text = written.voc_file(image, objects, first=0)
        (root / image["file_name"]).with_suffix(".xml").write_text(text)
    own = read(root)
    assert_same(own, drawn, 1e-9)
    assert "boxes are taken as counted from 0, since some begin there" in own.notes
    path = root / "scene_0.xml"
    corner = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, x, y in ((1, 0, 3), (2, 8, 3)))
    polygon = f"<polygon>{corner}<x3>8</x3><y3>12</y3></polygon></object>"
    path.write_text(path.read_text().replace("</object>", polygon, 1))
    first = read(root).train.data.annotations[0]
    assert first["segmentation"] == [[0, 3, 8, 3, 8, 12]]


def test_yolo_keypoints_absent_labels_and_lists(tmp_path: Path, drawn: Sample) -> None:
    root = tmp_path / "data"
    root.mkdir()
    written.write_yolo(drawn, root)
    label = root / "labels" / "train" / "scene_0.txt"
    (root / "data.yaml").write_text(
        "path: .\ntrain: train.txt\nkpt_shape: [1, 3]\nnames: {1: nut, 0: fig}\n"
    )
    names = [f"images/train/scene_{i}.png" for i in range(3)]
    (root / "train.txt").write_text("\n".join(names))
    label.write_text("1 0.5 0.5 0.25 0.5 0.1 0.1 2\n")
    (root / "labels" / "train" / "scene_1.txt").unlink()
    own = read(root)
    assert [x["file_name"] for x in own.train.data.images] == names
    first = own.train.data.annotations[0]
    assert (first["bbox"], first["category_id"]) == ([24.0, 12.0, 16.0, 24.0], 1)
    assert first["id"] == "labels/train/scene_0.txt:1"
    assert "1 image without a file of labels: taken as without objects" in own.notes
    assert [x["name"] for x in own.train.data.categories] == ["fig", "nut"]


def test_shapes_of_labelme(tmp_path: Path) -> None:
    """Circles become polygons, groups one object; what has no area is counted and left out."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    triangle = [[1, 1], [9, 1], [9, 9]]
    shapes = [
        {"label": "disk", "shape_type": "circle", "points": [[30, 20], [40, 20]]},
        {"label": "pair", "shape_type": "polygon", "points": triangle, "group_id": 3},
        {"label": "pair", "points": [[21, 1], [29, 1], [29, 9]], "group_id": 3},
        {"label": "dot", "shape_type": "point", "points": [[3, 3]]},
        {"label": "__ignore__", "points": triangle},
    ]
    content = {"shapes": shapes, "imagePath": "..\\pictures\\a.png", "imageHeight": 48}
    (tmp_path / "a.json").write_text(json.dumps(content))
    own = read(tmp_path)
    disk, pair = own.train.data.annotations
    area = decode_segmentation(disk["segmentation"], (48, 64)).sum()
    assert abs(area - np.pi * 100) < 4
    assert pair["segmentation"] == [[1, 1, 9, 1, 9, 9], [21, 1, 29, 1, 29, 9]]
    assert pair["bbox"] == [1, 1, 28, 8]
    assert "1 shape of type 'point': left out" in own.notes
    assert "1 shape of label '__ignore__': left out" in own.notes


def test_shapes_of_cvat(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "annotations.xml").write_text(
        '<annotations><image id="0" name="a.png" width="64" height="48">\n'
        '<box label="bar" xtl="20" ytl="10" xbr="40" ybr="14" rotation="90"/>\n'
        '<ellipse label="egg" cx="30" cy="20" rx="12" ry="4" rotation="90"/>\n'
        '<points label="dot" points="1,2"/></image></annotations>'
    )
    own = read(tmp_path)
    bar, egg = own.train.data.annotations
    np.testing.assert_allclose(bar["bbox"], [28, 2, 4, 20], atol=1e-9)
    np.testing.assert_allclose(egg["bbox"], [26, 8, 8, 24], atol=0.2)
    assert "1 shape of type 'points': left out" in own.notes


def test_ellipses_and_turns() -> None:
    points = np.array(ellipse((5, 7), (30, 10))).reshape(-1, 2)
    np.testing.assert_allclose(((points - [5, 7]) / [30, 10]).__pow__(2).sum(1), 1)
    middle = (points + np.roll(points, 1, 0)) / 2
    assert np.linalg.norm(points - middle, axis=1).max() < 5
    assert turned([3, 0], (0, 0), 90) == pytest.approx([0, 3])  # clockwise, as y points down


def test_splits_set_aside_and_left_alone(tmp_path: Path, real: Sample) -> None:
    """Without validation data some are set aside; test data are not touched."""
    root = tmp_path / "data"
    root.mkdir()
    real.content["test"], real.images["test"] = real.content.pop("val"), real.images.pop("val")
    written.write_labelme(real, root)
    data = prepare_data(Request(data=root, output=tmp_path / "out"))
    assert data.was_split
    assert data.train.images + data.validation.images == 6
    assert "test: " in data.notes[0] and data.notes[0].endswith(", not used")
    assert sorted(x.suffix for x in root.rglob("*.json")) == [".json"] * len(real.each())


def test_what_is_wrong_can_be_left_out(tmp_path: Path, drawn: Sample) -> None:
    root = tmp_path / "data"
    root.mkdir()
    written.write_yolo(drawn, root)
    label = root / "labels" / "train" / "scene_0.txt"
    good = label.read_text().splitlines()
    label.write_text("\n".join(["7 0.5 0.5 0.1 0.1", *good, "0 0.5"]))
    request = Request(data=root, output=tmp_path / "out")
    with pytest.raises(DataError) as caught:
        prepare_data(request)
    for part in (
        "line is no YOLO label (2)\n    labels/train/scene_0.txt:1: class 7, but",
        f"labels/train/scene_0.txt:{len(good) + 2}: 2 values, but a class and 4 for a box",
        "--skip-invalid",
    ):
        assert part in str(caught.value)
    data = prepare_data(Request(data=root, output=tmp_path / "out", skip_invalid=True))
    objects = len(drawn.content["train"]["annotations"])
    assert data.train.objects + data.validation.objects == objects


def test_errors_of_checks_name_file_and_line(tmp_path: Path, drawn: Sample) -> None:
    root = tmp_path / "data"
    root.mkdir()
    written.write_yolo(boxes_only(drawn), root)
    (root / "labels" / "train" / "scene_2.txt").write_text("0 0.5 0.5 0.2 0.2\n\n0 0.5 0.5 0 0.1")
    with pytest.raises(DataError, match=r"zero or negative size\n.*'labels/train/scene_2\.txt:3'"):
        prepare_data(Request(data=root, output=tmp_path / "out"))


def put(name: str, text: str | bytes) -> Callable[[Path], None]:
    """Writes a file into a folder of data."""

    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda root: [path.unlink() for path in root.rglob(pattern)] and None


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>\n<annotation>&b;</annotation>'
OUTER = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'
LABEL = "labels/train/scene_0.txt"
XML = "Annotations/scene_0.xml"
# Format, what happens to it, and what the line that tells of it says.
WRONG: list[tuple[Callable, Callable[[Path], None], str]] = [
    (
        written.write_yolo,
        put("data.yaml", "names: [a\nb: c"),
        r"data\.yaml, line 2: cannot be read as YAML",
    ),
    (
        written.write_yolo,
        put("data.yaml", "names: !!python/name:os.system"),
        "cannot be read as YAML",
    ),
    (written.write_yolo, put("data.yaml", "names: 3"), "'names' must list the classes"),
    (written.write_yolo, put("data.yaml", "names: {a: 1}"), "must be class numbers"),
    (written.write_yolo, put("data.yaml", "names: [[a], b]"), "must be a single word"),
    (written.write_yolo, put("data.yaml", "names: [a]\nnc: 2"), "nc is 2, but 'names' has 1"),
    (written.write_yolo, put("data.yaml", "names: [a]\ntrain: lost"), "train: there is no lost"),
    (
        written.write_yolo,
        lambda root: [
            put("data.yaml", "names: [a]\ntrain: train.txt")(root),
            put("train.txt", "a" * 300 + ".png")(root),
        ],
        r"train\.txt: there is no image a{200}",
    ),
    (written.write_yolo, remove("data.yaml"), r"no names: write them into .*classes\.txt"),
    (written.write_yolo, put(LABEL, "0 0.5 0.5 0.1 0.1 0.9"), "6 values.*score .* be removed"),
    (written.write_yolo, put(LABEL, "0 32 20 9 9"), r"scene_0\.txt:1: 32 is no share .* divide"),
    (written.write_yolo, put(LABEL, "car 0.5 0.5 0.1 0.1"), "'car' is no finite number"),
    (written.write_yolo, put(LABEL, "0 nan 0.5 0.1 0.1"), "'nan' is no finite number"),
    (written.write_yolo, put(LABEL, "0.5 0.5 0.5 0.1 0.1"), "class 0.5, but the classes are 0 to"),
    (written.write_yolo, put(LABEL, b"\xff\xfe0"), "is no text in UTF-8"),
    (written.write_yolo, put("images/train/scene_0.png", b"no"), "the image cannot be read"),
    (written.write_yolo, remove("*.png"), "there is no image of them"),
    (written.write_voc, put(XML, LAUGHS), r"scene_0\.xml, line 1: .* document type or entities"),
    (written.write_voc, put(XML, OUTER), "document type or entities, which are not read"),
    (written.write_voc, put(XML, LAUGHS.encode("utf-16")), "document type or entities"),
    (written.write_voc, put(XML, "<annotation>\n<object>"), r"line 2: no well-formed XML"),
    (written.write_voc, put(XML, ""), "no well-formed XML: no element found"),
    (written.write_voc, put(XML, "<a/>"), "its element is <a>, not <annotation>"),
    (written.write_voc, put(XML, "<annotation>\n<object/></annotation>"), "0.xml:2: .*no <name>"),
    (
        written.write_voc,
        put(XML, "<annotation><object><name>a</name></object></annotation>"),
        "'a' has no <bndbox>",
    ),
    (
        written.write_voc,
        put(
            XML,
            "<annotation><object><name>a</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>3</xmax>"
            "<ymax>8</ymax></bndbox></object></annotation>",
        ),
        "ends before it begins",
    ),
    (written.write_voc, remove("scene_0.png"), "there is no image 'scene_0.png' in"),
    (
        written.write_labelme,
        put("train/scene_0.json", "{\n,"),
        r"scene_0\.json cannot be read as JSON: .*line 2",
    ),
    (written.write_labelme, put("train/scene_0.json", "{}"), "no list 'shapes'"),
    (
        written.write_labelme,
        put("train/scene_0.json", '{"shapes": [{"label": "a", "points": [1, 2]}]}'),
        r"train/scene_0\.json, shape 1: its points must be a list of pairs",
    ),
    (
        written.write_labelme,
        put("train/scene_0.json", '{"shapes": [{"label": "a", "points": [[1, 2], [2, 3]]}]}'),
        "a polygon has at least 3 points, not 2",
    ),
    (
        written.write_labelme,
        put("train/lost.json", '{"shapes": [], "imageData": "iVBOR"}'),
        "no image 'lost'; it is inside of the file: write it out",
    ),
    (
        written.write_cvat,
        put("annotations.xml", "<annotations><track/></annotations>"),
        "format for videos.*'CVAT for images'",
    ),
    (
        written.write_cvat,
        put(
            "annotations.xml",
            '<annotations><image name="scene_0.png" width="64" height="48">\n'
            '<mask label="a" rle="3, 4" left="1" top="1" width="2" height="3"/>'
            "</image></annotations>",
        ),
        r"annotations\.xml:2: run lengths do not add up to 2 x 3",
    ),
    (written.write_coco, put("annotations/instances_train.json", "{"), "JSON"),
    (
        written.write_coco,
        lambda root: put(
            "annotations/instances_train.json",
            (root / "annotations" / "instances_train2017.json").read_text(),
        )(root),
        "both .* are annotations for 'train'",
    ),
    (written.write_coco, remove("*.png"), "there is no image in"),
    (written.write_coco, put("data.yaml", "a: 1\nnames: [a]"), "more than one format: COCO .*YOLO"),
    (written.write_labelme, put("train/scene_0.xml", "<annotation/>"), "format: LabelMe .* VOC"),
]


@pytest.mark.parametrize(("write", "change", "message"), WRONG)
def test_one_line_says_what_is_wrong(
    tmp_path: Path, drawn: Sample, write: Callable, change: Callable[[Path], None], message: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(boxes_only(drawn), root)
    change(root)
    with pytest.raises(DataError, match=f"(?m)^.*{message}.*$"):
        prepare_data(Request(data=root, output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"image_id": 1, "score": 0.5}]', "results of a model"),
        ("a.json", '[{"id": 1, "data": {}, "annotations": []}]', "Label Studio's own.*export"),
        ("a.json", '[{"image": "a.png", "annotations": []}]', "CreateML's format: convert"),
        ("a.json", '{"a.png": {"filename": "a.png", "regions": []}}', "VGG Image Annotator"),
        ("a.json", '{"size": {}, "objects": []}', "Supervisely"),
        (
            "panoptic.json",
            '{"images": [], "categories": [], "annotations": [{"segments_info": []}]}',
            "holds COCO's panoptic segmentation annotations, but there is no image in",
        ),
        ("a.png", "", "1 image, but no annotations.*in folders named labels or masks"),
        ("a.csv", "a.png,1,2,3,4", r"tables: convert them"),
        ("a.zip", "", r"archives: unpack them \(a\.zip\)"),
        (
            "a.txt",
            "notes of mine",
            r"no images and no annotations of a known format \(COCO, YOLO, Pascal VOC,",
        ),
        ("val/_annotations.coco.json", "", "cannot be read as JSON: .*line 1"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    put(name, text)(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_that_grow_without_end(tmp_path: Path, drawn: Sample) -> None:
    """A YAML file of 400 bytes that would be a text of gigabytes."""
    root = tmp_path / "data"
    root.mkdir()
    written.write_yolo(drawn, root)
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (root / "data.yaml").write_text("\n".join([*lines, "names: *a11", "train: *a11"]))
    begin = time.process_time()
    with pytest.raises(DataError, match="must be a single word"):
        read(root)
    assert time.process_time() - begin < 60  # not a speed: without care it would never end


def test_links_in_a_circle_hidden_and_lost_folders(tmp_path: Path, drawn: Sample) -> None:
    root = tmp_path / "data"
    root.mkdir()
    written.write_yolo(drawn, root)
    (root / "again").symlink_to(root, target_is_directory=True)
    put(".cache/a.json", "{")(root)
    assert_same(read(root), drawn, SIX_DIGITS)
    with pytest.raises(DataError, match="lost: there is no such file or folder"):
        read(tmp_path / "lost")


def test_several_images_of_one_name(tmp_path: Path, drawn: Sample) -> None:
    """The nearest is taken: the one in the folder, or of the split, of the labels."""
    root = tmp_path / "data"
    for split in ("train", "val"):
        drawn.copy_images(lambda _, split=split: root / "images" / split)
        for _, image, objects in boxes_only(drawn).each():
            text = written.voc_file(image, objects)
            put(f"xml/{split}/{Path(image['file_name']).stem}.xml", text)(root)
    own = read(root)
    assert own.validation is not None
    assert {Path(x["file_name"]).parent.name for x in own.train.data.images} == {"train"}
    assert {Path(x["file_name"]).parent.name for x in own.validation.data.images} == {"val"}
    (root / "xml" / "val").rename(root / "xml" / "more")
    with pytest.raises(DataError, match=r"'scene_0' may be .* and .*: rename or remove one"):
        prepare_data(Request(data=root, output=tmp_path / "out"))


def test_written_data_read_as_before(tmp_path: Path, drawn: Sample) -> None:
    """What a run writes of any format is what its training reads."""
    root = tmp_path / "data"
    root.mkdir()
    written.write_cvat(drawn, root)
    prepare_data(Request(data=root, output=tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "data" / "datasets.json").read_text())
    for name, entry in content.items():
        data = read_annotations(tmp_path / "out" / "data" / f"{name}.json", entry["image_root"])
        assert data.images and all(data.path_of(image).is_file() for image in data.images)


@pytest.mark.parametrize(
    ("annotations", "right", "wrong", "is_told"),
    [
        ("all.json", "shots", "copies", False),
        ("labels/all.json", "images/small", "images/large", False),
        ("all.json", "images", "copies", True),
        ("train.json", "train", "other", True),
        ("one/labels/all.json", "one/photos", "a/photos", True),
    ],
)
def test_folders_that_hold_the_same_names(
    tmp_path: Path, annotations: str, right: str, wrong: str, is_told: bool
) -> None:
    """What they are called counts, then which is nearer; where neither tells, none is chosen."""
    drawn, root = write_drawn(tmp_path / "drawn", 4), tmp_path / "data"
    for folder in (right, wrong):
        shutil.copytree(drawn.images, root / folder)
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(drawn.json_file, root / annotations)
    if is_told:
        own = read(root)
    else:
        with pytest.raises(DataError, match=f"{wrong} and .*{right}: rename or .*--train-images"):
            read(root)
        named = {"train_json": root / annotations, "train_images": root / right}
        own = read_own_data(Request(output=tmp_path / "out", **named))
    assert own.train.data.image_root == root / right


def test_runs_inside_the_folder_are_no_data(tmp_path: Path) -> None:
    drawn = write_drawn(tmp_path / "drawn")
    run = drawn.images.parent / "runs" / "first"
    (run / "data").mkdir(parents=True)
    for name in ("custom_train.json", "datasets.json"):
        (run / "data" / name).write_bytes(drawn.json_file.read_bytes())
    assert Tree(drawn.images.parent).of(".json") == [drawn.json_file]
    assert len(Tree(run).of(".json")) == 2  # named by the user
