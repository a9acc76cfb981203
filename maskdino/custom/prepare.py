"""From the files that somebody brings to data that a training can be started on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maskdino.custom.annotations import (
    Annotations,
    Summary,
    read_annotations,
    summarize,
    write_annotations,
)
from maskdino.custom.checks import Finding, check, check_pair, drop
from maskdino.custom.formats import Part, read_own_data
from maskdino.custom.formats.panoptic import with_flat_segments
from maskdino.custom.maps import Maps
from maskdino.custom.request import Request
from maskdino.custom.split import split
from maskdino.data import DataError
from maskdino.data.annotation_checks import describe
from maskdino.data.records import (
    RECORD,
    TRAIN_NAME,
    VALIDATION_NAME,
    RecordedData,
    read_record,
    register_record,
    write_record,
)

DATA_FOLDER, FINDINGS_NAME = "data", "check.txt"


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

    ``<output>/data`` gets the annotations, all findings of the checks, and the record by which
    every reader of the configuration knows the data (`maskdino.data.records`).

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
    recorded = {}
    for name, data in ((TRAIN_NAME, train), (VALIDATION_NAME, validation)):
        path = output / DATA_FOLDER / f"{name}.json"
        if data.maps is not None:
            maps, images = data.maps.converted(data.images, path.with_suffix(""))
            data = replace(data, maps=maps, images=images)
        map_root = None if data.maps is None else data.maps.root
        categories = write_annotations(data, path)
        recorded[name] = RecordedData(path, data.image_root, data.task, map_root, categories)
    write_record(output, recorded)
    summaries = summarize(train), summarize(validation)
    if summaries[0].has_masks and not summaries[1].has_masks:
        notes.append("no mask in the validation data: only box AP can be measured")
    return PreparedData(*summaries, own.validation is None, notes)


def _findings(part: Part, *, need_all_masks: bool = False) -> list[Finding]:
    """What is wrong with the files, and with what they hold."""
    if not part.data.images and any(finding.fatal for finding in part.findings):
        return part.findings  # there are images: all of them were left out
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


def prepared_data(output: Path, name: str) -> Annotations:
    """A dataset of a run, as it was written; DataError if the folder does not hold it."""
    recorded = read_record(_record_of(output))[name]
    files = recorded.json_file, recorded.image_root
    if recorded.map_root is None:
        return read_annotations(*files)
    maps = Maps(recorded.task, recorded.map_root)
    if recorded.task == "panoptic":
        return with_flat_segments(*files, maps)
    return replace(read_annotations(*files), maps=maps)


def register_prepared(output: Path) -> None:
    """Registers the data of a run with detectron2, in place of whatever has their names."""
    register_record(_record_of(output), replace=True)


def _record_of(output: Path) -> Path:
    path = output.absolute() / RECORD
    if not path.is_file():
        raise DataError(f"{path.parent} holds no data that were prepared for training")
    return path
