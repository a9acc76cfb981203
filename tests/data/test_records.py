"""The data of a run, known to whatever reads its configuration."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.categories import Categories
from maskdino.config import load_config
from maskdino.custom.prepare import prepare_data, register_prepared
from maskdino.custom.request import Request
from maskdino.data import DataError, check_datasets, register_coco_folder
from maskdino.data.checks import check_known
from maskdino.data.records import RECORD, copy_record, register_beside
from tests.custom.drawn import write_drawn
from tests.custom.labeled import write_modes

NAMES = ("custom_train", "custom_val")


NAME = "a" * 300  # longer than a file may be called
LONG = json.dumps({"custom_train": {"json_file": NAME, "image_root": NAME, "categories": []}})
SEGMENTS = {"json_file": "a", "image_root": "a", "map_root": "a", "task": "panoptic"}
KINDLESS = json.dumps(dict.fromkeys(NAMES, SEGMENTS | {"categories": [{"id": 1, "name": "a"}]}))


def forget() -> None:
    """As in a process that has just begun."""
    for name in NAMES:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that is prepared, in a folder with its data."""
    forget()
    project = tmp_path / "project"
    drawn, out = write_drawn(project / "drawn"), project / "out"
    prepare_data(Request(train_json=drawn.json_file, train_images=drawn.images, output=out))
    text = load_config(None, ["MODEL.MASK_DINO.NUM_CLASSES", "2"]).dump()
    (out / "config.yaml").write_text(text)
    yield out
    forget()


def known() -> list[int]:
    return [len(DatasetCatalog.get(name)) for name in NAMES]


def test_reading_the_configuration_is_enough(run: Path) -> None:
    assert not set(NAMES) & set(DatasetCatalog.list())
    load_config(str(run / "config.yaml"))
    metadata = MetadataCatalog.get("custom_val")
    # Before annotations are read: `maskdino predict` writes classes with their numbers, too.
    assert Categories.from_metadata(metadata, 2).dataset_ids == (3, 70)
    assert known() == [5, 1]
    assert metadata.thing_classes == ["car", "person"]
    # What reading the data has completed stays when the same configuration is read once more.
    load_config(str(run / "config.yaml"))
    assert metadata is MetadataCatalog.get("custom_val")
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 70: 1}


def test_nothing_of_the_annotations_is_read_before_they_are_used(run: Path) -> None:
    (run / "data" / "custom_val.json").write_text("no JSON")
    load_config(str(run / "config.yaml"))
    with pytest.raises(DataError, match=r"custom_val\.json cannot be read as JSON"):
        check_known("custom_val")
    (run / "data" / "custom_val.json").write_text("{}")
    with pytest.raises(DataError, match=r"custom_val\.json is not in COCO's format: it lacks im"):
        check_known("custom_val")


@pytest.mark.parametrize("moved", ["run", "both", "data"])
def test_moved_folders(run: Path, tmp_path: Path, moved: str) -> None:
    """A run may move, also together with its data; of data that moved away, the folder is named."""
    images = run.parent / "drawn" / "images"
    if moved == "run":
        run = shutil.move(run, tmp_path / "elsewhere")
    elif moved == "both":
        shutil.move(run.parent, tmp_path / "elsewhere")
        run = tmp_path / "elsewhere" / "out"
    else:
        shutil.move(images.parent, tmp_path / "elsewhere")
    cfg = load_config(str(run / "config.yaml"), ["DATASETS.TRAIN", "('custom_train',)"])
    if moved != "data":
        check_datasets(cfg)
        assert all(Path(x["file_name"]).is_file() for x in DatasetCatalog.get("custom_val"))
        return
    message = rf"'custom_train': {images} does not exist\. {run / RECORD} says where the data"
    with pytest.raises(DataError, match=message):
        check_datasets(cfg)
    with pytest.raises(DataError, match=message):
        check_known("custom_train")
    check_known("custom_train", images=False)


def test_label_images_that_were_converted_move_with_the_run(run: Path, tmp_path: Path) -> None:
    write_modes(tmp_path / "data")
    prepare_data(Request(data=tmp_path / "data", output=run))
    assert json.loads((run / RECORD).read_text())["custom_val"]["map_root"] == "custom_val"
    shutil.move(run, tmp_path / "elsewhere")
    load_config(str(tmp_path / "elsewhere" / "config.yaml"))
    assert MetadataCatalog.get("custom_val").stuff_classes == ["background", "apple", "nut"]
    records = [x for name in NAMES for x in DatasetCatalog.get(name)]
    assert len(records) == 5
    assert all(Path(x["sem_seg_file_name"]).is_file() for x in records)


def test_runs_of_earlier_versions(run: Path) -> None:
    """Their records have one path of each folder, and no classes."""
    content = json.loads((run / RECORD).read_text())
    for entry in content.values():
        for key in ("categories", "task", "image_root_from_here"):
            del entry[key]
    (run / RECORD).write_text(json.dumps(content))
    load_config(str(run / "config.yaml"))
    assert known() == [5, 1]
    assert MetadataCatalog.get("custom_train").thing_classes == ["car", "person"]


def test_a_dataset_of_the_user_stays(run: Path) -> None:
    register_coco_folder("custom_val", "mine.json", "mine")
    load_config(str(run / "config.yaml"))
    assert MetadataCatalog.get("custom_val").json_file == "mine.json"
    assert MetadataCatalog.get("custom_train").image_root.endswith("drawn/images")
    register_prepared(run)  # which a training says
    assert known() == [5, 1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"custom_train": 3}',
        '{"custom_train": {"json_file": 3}}',
        LONG,
        KINDLESS,
        "[]",
        "3",
        "{}",
        '{"coco": {"json_file": "train.json"}}',
    ],
    ids=range(9),
)
def test_other_files_of_the_name(
    run: Path, content: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever predicts needs no data: their record must not keep anybody from it."""
    monkeypatch.setattr(logging.getLogger("maskdino"), "propagate", True)
    (run / RECORD).write_text(content)
    assert load_config(str(run / "config.yaml")).MODEL.MASK_DINO.NUM_CLASSES == 2
    is_broken = content == "" or "custom" in content
    assert ("The data of the run are not known" in caplog.text) == is_broken
    with pytest.raises(DataError, match="'custom_val' is that of a run of train-custom, .*give"):
        check_known("custom_val")
    with pytest.raises(DataError, match=r"datasets\.json"):
        register_prepared(run)


def test_a_folder_that_cannot_be_read_keeps_nobody_from_predicting(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def refused(path: str | Path, **options: object) -> os.stat_result:
        if str(path) == str(run / RECORD):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert load_config(str(run / "config.yaml")).MODEL.MASK_DINO.NUM_CLASSES == 2
    assert not set(NAMES) & set(DatasetCatalog.list())


def test_the_run_that_was_read_last_counts(run: Path, tmp_path: Path) -> None:
    drawn, other = write_drawn(tmp_path / "drawn", 9), tmp_path / "other"
    prepare_data(Request(train_json=drawn.json_file, train_images=drawn.images, output=other))
    for folder, counts in ((run, [5, 1]), (other, [7, 2]), (run, [5, 1])):
        register_beside(folder / "config.yaml")
        assert known() == counts


def test_folders_of_evaluations_know_the_data_too(run: Path, tmp_path: Path) -> None:
    copy_record(NAMES, tmp_path / "nothing is known yet")
    assert not (tmp_path / "nothing is known yet").exists()
    register_beside(run / "config.yaml")
    before = (run / RECORD).read_text()
    copy_record(NAMES, run)
    assert (run / RECORD).read_text() == before
    copy_record(["coco_2017_val"], tmp_path / "other data")
    assert not (tmp_path / "other data").exists()
    copy_record(["custom_val"], tmp_path / "again")
    forget()
    register_beside(tmp_path / "again" / "config.yaml")
    assert known() == [5, 1]
