"""Own data of other tasks than objects: label images of classes, and COCO's panoptic format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.categories import Categories
from maskdino.config import load_config
from maskdino.custom import plan
from maskdino.custom.annotations import summarize
from maskdino.custom.formats import OwnData, read_dataset, read_own_data
from maskdino.custom.formats.class_names import asked_classes, read_classes
from maskdino.custom.plan import Machine
from maskdino.custom.prepare import prepare_data, register_prepared
from maskdino.custom.request import Request
from maskdino.data import DataError, check_datasets
from maskdino.data.reading import colors_of_ids, read_label_map
from maskdino.data.records import RECORD, read_record
from maskdino.ops.rle import decode_segmentation
from tests.custom.labeled import (
    NAMES,
    SIZE,
    colored,
    label,
    save,
    write_cvat,
    write_modes,
    write_palette,
    write_panoptic,
    write_roboflow,
    write_semantic,
    write_sparse,
)


def read(root: Path, **more: object) -> OwnData:
    return read_own_data(Request(data=root, output=root.parent / "out", **more))


@pytest.mark.parametrize(
    ("write", "in_place"),
    [
        (write_semantic, True),
        (write_palette, True),
        (write_modes, False),
        (write_cvat, False),
        (write_roboflow, True),
        (write_sparse, False),
    ],
)
def test_label_images_of_other_programs(
    tmp_path: Path, write: Callable[[Path], None], in_place: bool
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write(root)
    data = prepare_data(Request(data=root, output=out))
    assert "holds label images (semantic segmentation): " in data.notes[0]
    assert data.was_split == (write not in (write_cvat, write_roboflow))
    assert (data.train.task, tuple(data.train.counts)) == ("semantic", NAMES)
    assert data.train.most_objects == 3
    seen = set()
    register_prepared(out)
    cfg = load_config(None)
    plan.apply_data(cfg, data.train, Machine("cpu", 8000.0, 1), Request(data=root, output=out))
    check_datasets(cfg)  # as training does
    for name, files in read_record(out / RECORD).items():
        assert (files.map_root == root.resolve()) == in_place
        assert MetadataCatalog.get(name).stuff_classes == list(NAMES)
        for record in DatasetCatalog.get(name):
            number = int(Path(record["file_name"]).stem.removeprefix("photo_"))
            seen.add(number)
            found = read_label_map(record["sem_seg_file_name"], 3, 255)
            np.testing.assert_array_equal(found, label(number) + np.uint8(1))
            assert (record["height"], record["width"]) == SIZE
    assert seen == set(range(5))


def test_named_folders_and_classes(tmp_path: Path) -> None:
    """Folders of any name, and names of the command line."""
    write_semantic(tmp_path / "a")
    (tmp_path / "a" / "classes.txt").unlink()
    shutil.move(tmp_path / "a" / "labels", tmp_path / "b")
    request = Request(
        train_json=tmp_path / "b",
        train_images=tmp_path / "a" / "images",
        classes="background, apple,nut",
        output=tmp_path,
    )
    summary = summarize(read_own_data(request).train.data)
    assert (summary.images, list(summary.counts)) == (5, list(NAMES))


def test_panoptic_data(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_panoptic(root)
    request = Request(data=root, output=out)
    data = prepare_data(request)
    assert "COCO's panoptic segmentation: train: 5 images, 15 segments" in data.notes[0]
    assert (data.train.task, data.train.stuff) == ("panoptic", ("background",))
    assert data.train.counts == {"apple": 4, "nut": 4, "background": 4}
    register_prepared(out)
    records = [x for name in read_record(out / RECORD) for x in DatasetCatalog.get(name)]
    assert len(records) == 5
    for record in records:
        assert Path(record["file_name"]).parent == root / "train"
        assert Path(record["pan_seg_file_name"]).is_relative_to(root / "annotations")
        number = int(Path(record["file_name"]).stem.removeprefix("photo_"))
        segments = {x["category_id"]: x["area"] for x in record["segments_info"]}
        wanted = [(label(number) == value).sum() for value in (1, 2, 0)]
        assert [segments[i] for i in range(3)] == wanted  # whatever the file said
    # Whoever loads the model elsewhere, where the data are unknown, still tells things from stuff.
    cfg = load_config(None)
    plan.apply_data(cfg, data.train, Machine("cpu", 8000.0, 1), request)
    check_datasets(cfg)
    assert Categories.from_config(cfg).names == ("apple", "nut", "background")
    assert Categories.from_config(cfg).is_thing == (True, True, False)


def test_real_panoptic_data(shared: Callable[..., Path], tmp_path: Path) -> None:
    """COCO's own: its segments have the areas that its file says."""
    root = shared("data", "coco_panoptic_pair")
    part = read_dataset(root, None, Request(output=tmp_path)).parts["val"]
    assert part.findings == []
    (path,) = root.rglob("panoptic*.json")
    content = json.loads(path.read_text())
    wanted = {s["id"]: s["area"] for x in content["annotations"] for s in x["segments_info"]}
    assert {x["segment"]: x["area"] for x in part.data.annotations} == wanted


def test_plan_of_semantic_data(tmp_path: Path) -> None:
    write_semantic(tmp_path / "data")
    summary = summarize(read(tmp_path / "data").train.data)
    request = Request(data=tmp_path, output=tmp_path)
    cfg = load_config(None)
    plan.apply_data(cfg, summary, Machine("cpu", 8000.0, 1), request)
    node = cfg.MODEL.MASK_DINO
    assert (node.TEST.INSTANCE_ON, node.TEST.SEMANTIC_ON, node.TEST.PANOPTIC_ON) == (
        False,
        True,
        False,
    )
    assert (cfg.INPUT.DATASET_MAPPER_NAME, node.QUERY_SELECTION.NUM_QUERIES) == ("semantic", 100)
    assert not node.LOSS.DECOUPLE_STUFF_BOXES
    with pytest.raises(DataError, match="--boxes-only is of objects"):
        plan.apply_data(
            cfg, summary, Machine("cpu", 1.0, 1), Request(output=tmp_path, boxes_only=True)
        )


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("classes.txt", "sky\nroad 2\n\n", {"sky": 0, "road 2": 1}),
        ("classes.txt", "0 sky\n7: the road\n", {"sky": 0, "the road": 7}),
        ("classes.txt", "__ignore__\n_background_\nnut\n", {"_background_": 0, "nut": 1}),
        ("labels.txt", "sky: 4\nroad: 2\n", {"road": 2, "sky": 4}),
        ("classes.json", '["sky", "road"]', {"sky": 0, "road": 1}),
        ("classes.json", '{"classes": [{"id": 3, "name": "sky"}]}', {"sky": 3}),
        ("classes.yaml", "0: background\n255: nut\n", {"background": 0, "nut": 255}),
    ],
)
def test_files_of_class_names(tmp_path: Path, name: str, text: str, values: dict) -> None:
    (tmp_path / name).write_text(text)
    classes = read_classes(tmp_path / name)
    assert {c.name: c.value for c in classes if not c.ignored} == values


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("class_dict.csv", "name,r,g,b\nsky,1,2,3\nroad,4,5,6"),
        ("labelmap.txt", "sky:1,2,3::\nroad:4,5,6:wheel:"),
        ("label_colors.txt", "1 2 3\tsky\n4 5 6\troad"),
        ("classes.json", '{"sky": [1, 2, 3], "road": [4, 5, 6]}'),
        (
            "classes.yaml",
            "classes:\n- {name: sky, color: '#010203'}\n- {name: road, color: [4, 5, 6]}",
        ),
    ],
)
def test_files_of_colors(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = {c.name: c.color for c in read_classes(tmp_path / name)}
    assert found == {"sky": (1, 2, 3), "road": (4, 5, 6)}


def test_colors_of_classes_that_are_called_by_numbers(tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text("7:1,2,3::\n8:4,5,6::")
    found = {c.name: c.color for c in read_classes(tmp_path / "labelmap.txt")}
    assert found == {"7": (1, 2, 3), "8": (4, 5, 6)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "names with commas between them"),
        ("a,b,a", "several classes have the name a"),
        ("lost.txt", "there is no file lost.txt"),
        ("void", "0 classes: label images have 1 to 255"),
        (",".join(map(str, range(256))), "256 classes"),
    ],
)
def test_classes_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    write_semantic(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data", classes=text)


def put(name: str, content: np.ndarray | str | bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        if isinstance(content, np.ndarray):
            save(root / name, content)
        elif isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            (root / name).write_text(content)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


# Of which data, what is done to them, what is said, and whether --skip-invalid helps.
WRONG = [
    (write_semantic, remove("labels/photo_1.png"), "images/photo_1.jpg$", True),
    (write_semantic, remove("images/photo_1.jpg"), "labels/photo_1.png$", True),
    (
        write_semantic,
        put("labels/photo_1.png", label(1)[:, :-2]),
        r"photo_1.png has \(height, width\) \(24, 30\), .*photo_1.jpg \(24, 32\)$",
        True,
    ),
    (
        write_semantic,
        put("labels/photo_1.png", label(1) + np.uint8(7)),
        "photo_1.png holds 6, 7, 8, 9; the classes are 0, 1, 2, and 255 is ignored$",
        True,
    ),
    (write_semantic, put("labels/photo_1.png", b"\x89PNG"), "photo_1.png: cannot identify", True),
    (
        write_semantic,
        put("labels/photo_1.png", colored(label(1))),
        r"photo_1.png holds \(0, 0, 0\), .*",
        True,
    ),
    (write_semantic, put("images/photo_1.jpg", b"GIF"), "photo_1.jpg: the image cannot", True),
    (
        write_semantic,
        remove("classes.txt"),
        "with the values 0, 1, 2, 255, but no names of the classes: write them into classes.txt",
        False,
    ),
    (write_semantic, put("labels.txt", "a\nb"), "name different classes", False),
    (
        write_cvat,
        put("SegmentationClass/photo_1.png", np.full((*SIZE, 3), 9, np.uint8)),
        "photo_1.png holds",
        True,
    ),
]


@pytest.mark.parametrize(("write", "change", "message", "skippable"), WRONG)
def test_one_line_says_what_is_wrong(
    tmp_path: Path,
    write: Callable[[Path], None],
    change: Callable[[Path], None],
    message: str,
    skippable: bool,
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write(root)
    change(root)
    with pytest.raises(DataError, match=f"(?m)^.*{message}"):
        prepare_data(Request(data=root, output=out))
    if skippable:
        data = prepare_data(Request(data=root, output=out, skip_invalid=True))
        assert data.train.images + data.validation.images == 4


def test_masks_of_0_and_255(tmp_path: Path) -> None:
    """As many programs write them: what 255 means must be said."""
    root = tmp_path / "data"
    write_semantic(root)
    for i in range(5):
        save(root / "labels" / f"photo_{i}.png", np.where(label(i) == 1, 255, 0).astype(np.uint8))
    (root / "classes.txt").write_text("background\nnut")
    with pytest.raises(DataError, match="0 or 255, and 255 is ignored: .*'255 nut' .--classes"):
        read(root)
    (root / "classes.txt").write_text("0 background\n255 nut")
    assert summarize(read(root).train.data).counts == {"background": 5, "nut": 5}


def segment(number: int, **values: object) -> Callable[[dict], None]:
    return lambda content: content["annotations"][1]["segments_info"][number].update(values)


WRONG_PANOPTIC = [
    (segment(1, id=701), r"ids \[701\]"),
    (segment(1, id=0), "photo_1.png: 0"),
    (segment(1, id=3), "photo_1.png: 3"),
    (segment(1, category_id=77), "photo_1.png: category 77"),
    (lambda c: c["annotations"][1]["segments_info"].pop(), r"photo_1.png: ids \[70000\]"),
    (lambda c: c["annotations"][1].update(segments_info=None), "no list of segments"),
    (lambda c: c["annotations"][1].update(file_name="lost.png"), "there is no .*lost.png"),
    (
        lambda c: c["annotations"][1].update(file_name="../a.png"),
        "file name '../a.png' leads out of .*panoptic_train: name files of the folder alone\n",
    ),
    (segment(1, iscrowd=2), r"photo_1.png: segment \d+: 2"),
    (lambda c: c["annotations"][1].update(file_name="a" * 300), "a{300}: .*name too long"),
    (lambda c: c["images"][1].update(file_name="a" * 300), "a{300}"),
    (lambda c: c["annotations"].pop(1), r"image 1 \(photo_1.png\): no annotation"),
    (lambda c: c["images"][1].update(height=25), r"\(24, 32\), not \(25, 32\)"),
    (lambda c: c["annotations"].append(c["annotations"][1]), r"image 1 \(photo_1.png\): 2"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_PANOPTIC)
def test_segments_that_are_wrong(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    content = write_panoptic(root)
    change(content)
    write_panoptic(root, content)
    with pytest.raises(DataError, match=f"(?m)^.*{message}"):
        prepare_data(Request(data=root, output=out))
    data = prepare_data(Request(data=root, output=out, skip_invalid=True))
    assert data.train.images + data.validation.images == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"][1].pop("isthing"), "'apple' has isthing None: write 1 for"),
        (lambda c: c.pop("categories"), "it lacks categories"),
        (lambda c: c.update(images=[]), r"there are no images\n.*is empty\n(?!.*unknown image)"),
        (
            lambda c: [x.update(file_name="x.png") for x in c["annotations"]],
            "none of the PNG files",
        ),
    ],
)
def test_panoptic_files_that_are_wrong(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    root = tmp_path / "data"
    content = write_panoptic(root)
    change(content)
    write_panoptic(root, content)
    with pytest.raises(DataError, match=message):
        prepare_data(Request(data=root, output=tmp_path / "out"))


def test_data_of_several_tasks(tmp_path: Path) -> None:
    """Objects come first, and what else there is is said; --task chooses."""
    root = tmp_path / "data"
    content = write_panoptic(root)
    box = {"id": 1, "image_id": 0, "category_id": 2, "bbox": [4, 4, 6, 8]}
    objects = {**content, "annotations": [{**box, "image_id": i, "id": i + 1} for i in range(5)]}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(objects))
    own = read(root)
    assert own.train.data.task == "instance"
    assert any("--task panoptic trains on" in note for note in own.notes)
    assert read(root, task="panoptic").train.data.task == "panoptic"
    with pytest.raises(DataError, match="--classes names those of label images"):
        read(root, classes="a,b")
    (root / "annotations" / "instances_train.json").unlink()
    with pytest.raises(DataError, match="--task instance: .* holds COCO's panoptic"):
        read(root, task="instance")


def test_nuclei_as_classes(tmp_path: Path) -> None:
    """Real images, with their instance masks as label images: pixels are counted alike."""
    folder = Path(__file__).parents[2] / "datasets" / "nuclei"
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    total = 0
    for image in content["images"][:3]:
        size = image["height"], image["width"]
        labels = np.zeros(size, np.uint8)
        for x in content["annotations"]:
            if x["image_id"] == image["id"]:
                labels |= decode_segmentation(x["segmentation"], size).astype(np.uint8)
        total += int(labels.sum())
        save(tmp_path / "data" / "masks" / image["file_name"], labels)
        (tmp_path / "data" / "images").mkdir(exist_ok=True)
        shutil.copy(folder / "val" / image["file_name"], tmp_path / "data" / "images")
    data = read(tmp_path / "data", classes="background,nucleus").train.data
    assert sum(x["area"] for x in data.annotations if x["category_id"] == 1) == total
    assert asked_classes("background,nucleus")[1].value == 1


def one_class_too_few(root: Path) -> None:
    write_semantic(root)
    (root / "classes.txt").write_text("background\napple")


def other_segments(root: Path) -> None:
    write_panoptic(root)
    for path in (root / "annotations" / "panoptic_train").iterdir():
        save(path, colors_of_ids(np.full(SIZE, 2)))


def cut_images(root: Path) -> None:
    save(root / "photo_4.png", np.zeros((*SIZE, 3), np.uint8))
    (root / "photo_4.png").write_bytes((root / "photo_4.png").read_bytes()[:20])
    (root / "photo_4.txt").write_text("0 0.5 0.5 0.2 0.2")
    (root / "classes.txt").write_text("apple")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (one_class_too_few, "photo_4.png holds 2"),
        (other_segments, r"photo_4.png: ids \[3, 700, 70000\]"),
        (cut_images, "image cannot be read"),
    ],
)
def test_where_all_is_wrong_nothing_else_is_said(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        prepare_data(Request(data=tmp_path / "data", output=tmp_path / "out"))
    assert "there are no images" not in str(caught.value)
    assert "--skip-invalid" in str(caught.value)
    with pytest.raises(DataError, match="nothing is left"):
        skipping = Request(data=tmp_path / "data", output=tmp_path / "out", skip_invalid=True)
        prepare_data(skipping)
