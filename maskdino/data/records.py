"""Where the data of a run are: a file beside its configuration, which says so in plain values.

`train-custom` writes RUN/data/datasets.json. Whatever reads the configuration RUN/config.yaml
registers what the file names, so that every command knows the data. It is JSON: nothing in it is
executed, and it can give no other names than those of own data.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.data.datasets import (
    register_coco_folder,
    register_panoptic_folder,
    register_semantic_folder,
)
from maskdino.data.reading import DataError, read_json
from maskdino.integration.registration import when_configuration_is_read
from maskdino.system.files import write_text

logger = logging.getLogger(__name__)

RECORD = os.path.join("data", "datasets.json")  # in the folder of a configuration
TRAIN_NAME, VALIDATION_NAME = "custom_train", "custom_val"
KEY = "record"  # of the metadata of what is registered here: the path of the file
MOVED = "_from_here"  # ends the key of a second path, seen from the file: for both moved alike
_registered: dict[str, RecordedData] = {}


@dataclass(frozen=True)
class RecordedData:
    """A dataset of a run.

    Attributes:
        json_file: its annotations.
        image_root: folder of its images.
        task: "instance", "panoptic" or "semantic".
        map_root: folder of its label images; None: it has objects.
        categories: {"id", "name"[, "isthing"]} of each class, in their order.
    """

    json_file: Path
    image_root: Path
    task: str
    map_root: Path | None
    categories: list[dict[str, Any]]

    def register(self, name: str, record: Path, *, replace: bool) -> None:
        """Registers it with detectron2, in place of another run's, or of anything (`replace`)."""
        if name in DatasetCatalog.list():
            held = MetadataCatalog.get(name).get(KEY)
            is_same = held == str(record) and _registered.get(name) == self
            if is_same or (held is None and not replace):
                return
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        names = [x["name"] for x in self.categories]
        files = self.json_file, self.image_root
        if self.map_root is None:
            # Known before the annotations are read, as results are written with these numbers.
            ids = {x["id"]: label for label, x in enumerate(self.categories)}
            register_coco_folder(
                name, *files, thing_classes=names, thing_dataset_id_to_contiguous_id=ids
            )
        elif self.task == "panoptic":
            register_panoptic_folder(name, *files, self.map_root, self.categories)
        else:
            register_semantic_folder(
                name, self.map_root, self.image_root, names, json_file=self.json_file
            )
        MetadataCatalog.get(name).set(**{KEY: str(record)})
        _registered[name] = self


def write_record(folder: Path, datasets: Mapping[str, RecordedData]) -> None:
    """Writes the file of the datasets of a run, by name, below its folder.

    What lies below the folder moves with it. Other paths are written twice, as they are and as they
    are seen from the file: one of both holds after a move of either.
    """
    path = folder / RECORD
    content = {}
    for name, data in datasets.items():
        entry: dict[str, Any] = {}
        for key in ("json_file", "image_root", "map_root"):
            place = getattr(data, key)
            if place is not None:
                entry |= _places(key, place, path.parent, folder)
        content[name] = entry | {"task": data.task, "categories": data.categories}
    write_text(path, json.dumps(content, indent=1))


def _places(key: str, place: Path, start: Path, folder: Path) -> dict[str, str]:
    place = place.resolve()
    try:
        seen = Path(os.path.relpath(place, start.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return {key: str(place)}
    if place.is_relative_to(folder.resolve()):
        return {key: seen}
    return {key: str(place), key + MOVED: seen}


class OtherFileError(DataError):
    """A file has the name of a record, but is somebody's own."""


def read_record(path: Path) -> dict[str, RecordedData]:
    """Reads such a file; DataError if it is none, or lacks one of the two datasets."""
    index = read_json(str(path))
    if not isinstance(index, dict) or not {TRAIN_NAME, VALIDATION_NAME} & index.keys():
        raise OtherFileError(
            f"{path} is no record of data that train-custom prepared: to train on such data, begin "
            "anew, with another --output"
        )
    try:
        return {name: _read(index[name], path.parent) for name in (TRAIN_NAME, VALIDATION_NAME)}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} does not name the data that train-custom prepared: to train on them, begin "
            "anew, with another --output"
        ) from error


def _read(entry: Mapping[str, Any], folder: Path) -> RecordedData:
    start = folder.resolve()

    def place(key: str) -> Path:
        names = entry[key], entry.get(key + MOVED, entry[key])
        paths = [Path(os.path.normpath(start / name)) for name in names]
        return next((x for x in paths if os.path.exists(x)), paths[0])  # of names of any length

    json_file = place("json_file")
    task = entry.get("task", "instance")  # which earlier versions do not say
    categories = entry.get("categories")
    if categories is None:  # a run of an earlier version
        categories = read_json(str(json_file))["categories"]
    keys = ("id", "name", "isthing") if task == "panoptic" else ("id", "name")
    kept = [{key: x[key] for key in keys} for x in categories]
    if not all(isinstance(x["id"], int) and isinstance(x["name"], str) for x in kept):
        raise TypeError("categories have a number and a name")
    return RecordedData(
        json_file,
        place("image_root"),
        task,
        place("map_root") if "map_root" in entry else None,
        kept,
    )


def register_record(path: Path, *, replace: bool = False) -> None:
    """Registers the datasets of a run; DataError as `read_record` says.

    A dataset that the user registered under one of the names stays, unless it is to be replaced.
    """
    for name, data in read_record(path).items():
        data.register(name, path, replace=replace)


def register_beside(config_file: str | os.PathLike) -> None:
    """Registers the data that are recorded beside a configuration, if there is such a file.

    One that cannot be read is left out with a warning: whoever predicts needs no data. A file of
    this name that somebody else wrote is none of ours.
    """
    path = Path(config_file).parent / RECORD
    if os.path.isfile(path):  # not Path.is_file, which fails where the folder cannot be read
        try:
            register_record(path.absolute())
        except OtherFileError:
            pass
        except DataError as error:
            logger.warning("The data of the run are not known: %s", error)


def copy_record(names: Iterable[str], folder: Path) -> None:
    """Writes what is known of datasets beside the configuration of another folder.

    Where that has data of its own, or the datasets are not those of a run, nothing is written.
    """
    own = {x: _registered[x] for x in (TRAIN_NAME, VALIDATION_NAME) if x in _registered}
    recorded = [x for x in names if x in own and MetadataCatalog.get(x).get(KEY) is not None]
    if len(own) == 2 and recorded and not (folder / RECORD).exists():
        write_record(folder, own)


when_configuration_is_read(register_beside)
