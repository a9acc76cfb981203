"""From the files that somebody brings to data that a training can be started on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from maskdino.custom.annotations import (
    Annotations,
    Summary,
    ordered_categories,
    read_annotations,
    summarize,
    write_annotations,
)
from maskdino.custom.checks import Finding, check, check_pair, drop
from maskdino.custom.formats import Part, read_own_data
from maskdino.custom.formats.panoptic import with_flat_segments
from maskdino.custom.maps import Maps
from maskdino.custom.plan import TRAIN_NAME, VALIDATION_NAME
from maskdino.custom.request import Request
from maskdino.custom.split import split
from maskdino.data import (
    DataError,
    register_coco_folder,
    register_panoptic_folder,
    register_semantic_folder,
)
from maskdino.data.annotation_checks import describe
from maskdino.data.reading import read_json

DATA_FOLDER, INDEX_NAME, FINDINGS_NAME = "data", "datasets.json", "check.txt"
MODULE_NAME = "own_data.py"
_MODULE = '''"""Makes the data of this run known: maskdino evaluate --import FILE ..."""

from pathlib import Path

from maskdino.custom import register_prepared

register_prepared(Path(__file__).parent)
'''


@dataclass(frozen=True)
class PreparedData:
    """Data in order."""

    # train, validation: what they hold.
    train: Summary
    validation: Summary
    was_split: bool  # whether the validation data were set aside from the training data
    notes: list[str]  # warnings, and what was left out, as lines of text


def prepare_data(request: Request) -> PreparedData:
    """Reads, checks and, if need be, splits data, and writes what training reads.

    ``<output>/data`` gets the annotations, their index, and all findings of the checks;
    ``<output>/own_data.py`` registers them wherever it is imported.

    Raises:
        DataError: the data cannot be used; the message lists all that is wrong.
    """
    output, skip = request.output, request.skip_invalid
    own = read_own_data(request)
    notes = own.notes
    (output / DATA_FOLDER / FINDINGS_NAME).unlink(missing_ok=True)  # of an earlier attempt
    train = _checked(own.train.data, _findings(own.train), skip, output, notes)
    if own.validation is None:
        train, validation = split(train)
    else:
        validation = own.validation.data
        findings = _findings(own.validation, need_all_masks=summarize(train).has_masks)
        validation = _checked(validation, findings, skip, output, notes)
        validation = _checked(validation, check_pair(train, validation), False, output, notes)
    # Equal lists give equal class indices.
    validation = replace(validation, categories=train.categories)
    index = {}
    for name, data in ((TRAIN_NAME, train), (VALIDATION_NAME, validation)):
        path = output / DATA_FOLDER / f"{name}.json"
        index[name] = {"json_file": path.name, "image_root": str(data.image_root.resolve())}
        if data.maps is not None:
            maps, images = data.maps.converted(data.images, path.with_suffix(""))
            data = replace(data, maps=maps, images=images)
            index[name] |= {"task": maps.task, "map_root": str(maps.root.resolve())}
        write_annotations(data, path)
    (output / DATA_FOLDER / INDEX_NAME).write_text(json.dumps(index, indent=1))
    (output / MODULE_NAME).write_text(_MODULE)
    summaries = summarize(train), summarize(validation)
    if summaries[0].has_masks and not summaries[1].has_masks:
        notes.append("no mask in the validation data: only box AP can be measured")
    return PreparedData(*summaries, own.validation is None, notes)


def _findings(part: Part, *, need_all_masks: bool = False) -> list[Finding]:
    """What is wrong with the files, and with what they hold."""
    if part.findings and part.data.task == "semantic" and not part.data.images:
        return part.findings  # images are those whose files are in order: they are there
    return [*part.findings, *check(part.data, need_all_masks=need_all_masks)]


def _checked(
    data: Annotations, findings: Sequence[Finding], skip: bool, output: Path, notes: list[str]
) -> Annotations:
    """The data without what is wrong; appends what was found to a file and to the notes."""
    if not findings:
        return data
    fatal = [finding for finding in findings if finding.fatal]
    warnings = [finding for finding in findings if not finding.fatal]
    path = output / DATA_FOLDER / FINDINGS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for title, part in (("errors", fatal), ("warnings", warnings)):
            if part:
                file.write(f"{data.json_file}, {title}:\n")
            file.writelines(f"  {line}\n" for line in describe(part, most=None))
    can_skip = all(finding.droppable for finding in fatal)
    if fatal and not (skip and can_skip):
        lines = [f"{data.json_file} cannot be trained on as it is. Errors:"]
        lines += [f"  {line}" for line in describe(fatal)]
        if warnings:
            lines += ["Warnings:", *(f"  {line}" for line in describe(warnings))]
        lines.append(f"The whole list is in {path}.")
        if can_skip:
            lines.append("Mend the data, or leave out what is wrong with --skip-invalid.")
        raise DataError("\n".join(lines))
    if fatal:
        data = drop(data, fatal)
        notes.append(f"{data.json_file}: left out because it is wrong:")
        notes += [f"  {line}" for line in describe(fatal)]
        if not data.images or not data.objects():
            raise DataError(f"{data.json_file}: nothing is left; all that is wrong is in {path}")
    if warnings:
        notes.append(f"{data.json_file}: warnings:")
        notes += [f"  {line}" for line in describe(warnings)]
    return data


@dataclass(frozen=True)
class PreparedFiles:
    """Where a dataset of a run is; the map root is the folder of label images, if there are any."""

    json_file: Path
    image_root: Path
    task: str
    map_root: Path | None

    def read(self) -> Annotations:
        """The annotations; DataError if the file is missing, or not as it was written."""
        if self.task == "panoptic":
            return with_flat_segments(self.json_file, self.image_root, self.maps)
        return replace(
            read_annotations(self.json_file, self.image_root),
            maps=None if self.map_root is None else self.maps,
        )

    @property
    def maps(self) -> Maps:
        """The label images, of other tasks than "instance"."""
        assert self.map_root is not None
        return Maps(self.task, self.map_root)

    def register(self, name: str) -> None:
        """Registers the dataset with detectron2."""
        categories = ordered_categories(self.read())  # as the classes are numbered
        names = [x["name"] for x in categories]
        files = self.json_file, self.image_root
        if self.map_root is None:
            register_coco_folder(name, *files, thing_classes=names)
        elif self.task == "panoptic":
            register_panoptic_folder(name, *files, self.map_root, categories)
        else:
            register_semantic_folder(
                name, self.map_root, self.image_root, names, json_file=self.json_file
            )


def prepared_files(output: Path) -> dict[str, PreparedFiles]:
    """The datasets of a run, by name; DataError if the folder holds no prepared data."""
    folder = output / DATA_FOLDER
    if not (folder / INDEX_NAME).is_file():
        raise DataError(f"{folder} holds no data that were prepared for training")
    index = read_json(str(folder / INDEX_NAME))
    try:
        files = {
            name: PreparedFiles(
                folder / entry["json_file"],
                Path(entry["image_root"]),
                entry.get("task", "instance"),  # which earlier versions do not say
                Path(entry["map_root"]) if "map_root" in entry else None,
            )
            for name, entry in index.items()
        }
        return {name: files[name] for name in (TRAIN_NAME, VALIDATION_NAME)}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / INDEX_NAME} does not name the data that were prepared: give another "
            "--output, or begin anew"
        ) from error


def register_prepared(output: Path) -> None:
    """Registers the data of a run with detectron2, in place of another run's."""
    for name, files in prepared_files(output).items():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        files.register(name)
