"""Which format a folder or a file is in."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from maskdino.custom.annotations import LISTS
from maskdino.custom.formats import coco, cvat, labelme, panoptic, semantic, voc, yolo
from maskdino.custom.formats.files import Tree, read_text
from maskdino.custom.formats.xml import read_xml
from maskdino.custom.request import TASKS
from maskdino.data import DataError
from maskdino.data.reading import read_json
from maskdino.system.words import counted

SNIFFED = 3  # files of a kind in a folder that are looked into
LARGE = 64 * 2**20  # bytes; only COCO has JSON files that large, which are not read twice
SEMANTIC = (
    "label images for semantic segmentation are looked for in folders named labels or masks, and "
    "by names that end with _mask"
)
# What data teach; formats that are not here have objects of their own.
TASK_OF = {panoptic.KIND: "panoptic", semantic.KIND: "semantic"}
COCO_NAMES = ("instances", "_annotations", "panoptic")  # how files of COCO's formats begin
# Formats that are known but not read, and what to do instead.
OTHERS = {
    "via": "VGG Image Annotator's format: export it as COCO",
    "createml": "CreateML's format: convert it to COCO, YOLO or Pascal VOC",
    "label studio": "Label Studio's own format: export the project as COCO or as YOLO with images",
    "supervisely": "Supervisely's format: export it as COCO",
    "results": "results of a model, no annotations",
}
UNREAD_SUFFIXES = {
    ".tfrecord": "TFRecord files: export the data as COCO",
    ".csv": "tables: convert them to COCO, YOLO or Pascal VOC",
    ".mat": "Matlab files: convert them to COCO",
    ".zip": "archives: unpack them",
    ".rar": "archives: unpack them",
}


@dataclass
class Evidence:
    """Files by the format that they speak for."""

    # Of the formats that are read: `yolo.KIND` and so on.
    files: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    # What files of other formats are, by path.
    others: dict[Path, str] = field(default_factory=dict)
    # Why files could not be looked into, by path.
    errors: dict[Path, DataError] = field(default_factory=dict)
    # What the folder holds beside the format that was chosen, as lines of text.
    unused: list[str] = field(default_factory=list)


def recognize(tree: Tree) -> Evidence:
    """Looks into some files of each folder."""
    evidence = Evidence()
    for _, group in groupby(tree.of(".json"), key=lambda path: path.parent):
        paths = list(group)
        named = [path for path in paths if path.name.startswith(COCO_NAMES)]
        for path in dict.fromkeys((*named, *paths[:SNIFFED])):
            _look(evidence, path, json_kind)
    for _, group in groupby(tree.of(".xml"), key=lambda path: path.parent):
        for path in list(group)[:SNIFFED]:
            _look(evidence, path, xml_kind)
    labels = semantic.label_images(tree)
    if labels:
        evidence.files[semantic.KIND] = labels
    if found := _yolo_files(tree, is_semantic=bool(labels)):
        evidence.files[yolo.KIND] = found
    if not evidence.files:
        for path in tree.of(*UNREAD_SUFFIXES):
            evidence.others.setdefault(path, UNREAD_SUFFIXES[path.suffix.lower()])
    return evidence


def _yolo_files(tree: Tree, *, is_semantic: bool) -> list[Path]:
    """Files of class names, and otherwise some labels."""
    labels = yolo.label_files(tree)
    if is_semantic and not labels:
        return []  # then the names are those of label images
    found = [path for path in tree.of(".yaml", ".yml") if "\nnames" in f"\n{_head(path)}"]
    found += [path for path in tree.files if path.name in yolo.NAME_FILES and labels]
    if found:
        return found
    heads = ((path, _head(path).strip()) for path in labels[: 10 * SNIFFED])
    return [path for path, head in heads if head and yolo.is_label(head.splitlines()[0])]


def the_kind(evidence: Evidence, tree: Tree, task: str | None = None) -> str:
    """The one format of a folder.

    Objects come before segments, and these before label images: whoever has the former may have
    made the latter of them.

    Raises:
        DataError: there is none, or more than one; the message says what to do.
    """
    found = _of_task(evidence, tree, task)
    for path, error in evidence.errors.items():
        if path.name.startswith(COCO_NAMES):
            raise error
    if len(found) == 1:
        return next(iter(found))
    if found:
        parts = [f"{kind} ({tree.relative(paths[0])})" for kind, paths in found.items()]
        raise DataError(
            f"{tree.root} holds more than one format: {' and '.join(parts)}: move all but one "
            "elsewhere, or give the file or folder of the right one with --train-json and the "
            "folder of the images with --train-images"
        )
    if evidence.others:
        path, kind = next(iter(evidence.others.items()))
        raise DataError(f"{tree.root} holds {kind} ({tree.relative(path)})")
    if evidence.errors:
        raise next(iter(evidence.errors.values()))
    kinds = (coco.KIND, yolo.KIND, voc.KIND, labelme.KIND, cvat.KIND, *TASK_OF)
    formats = ", ".join(kinds)
    images = (
        f"{counted(len(tree.images), 'image')}, but no annotations"
        if tree.images
        else "no images and no annotations"
    )
    hint = f"; {SEMANTIC}" if tree.of(".png") else ""
    raise DataError(f"{tree.root} holds {images} of a known format ({formats}){hint}")


def _of_task(evidence: Evidence, tree: Tree, task: str | None) -> dict[str, list[Path]]:
    """The formats of one task, of which there should be one."""
    by_task: dict[str, dict[str, list[Path]]] = {x: {} for x in TASKS}
    for kind, paths in evidence.files.items():
        by_task[TASK_OF.get(kind, "instance")][kind] = paths
    present = [x for x in TASKS if by_task[x]]
    if task is not None and present and task not in present:
        kinds = " and ".join(evidence.files)
        raise DataError(f"--task {task}: {tree.root} holds {kinds}, which does not teach it")
    if task is None and present[:1] == ["instance"] and len(present) > 1:
        # Not more: the PNG files of segments may look like label images.
        ((kind, paths),) = by_task[present[1]].items()
        evidence.unused.append(
            f"{tree.root} holds {kind} as well ({tree.relative(paths[0])}), which --task "
            f"{present[1]} trains on"
        )
    return by_task[task or present[0]] if present else {}


def _look(evidence: Evidence, path: Path, kind_of: Any) -> None:
    try:
        kind = kind_of(path)
    except DataError as error:
        evidence.errors[path] = error
        return
    if kind in OTHERS:
        evidence.others[path] = OTHERS[kind]
    elif kind is not None:
        evidence.files[kind].append(path)


def json_kind(path: Path) -> str | None:
    """The format of a JSON file, or a key of `OTHERS`, or None."""
    if path.stat().st_size > LARGE:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(LARGE), b"")
            return panoptic.KIND if any(b'"segments_info"' in x for x in blocks) else coco.KIND
    content = read_json(str(path), "utf-8-sig")
    if isinstance(content, list):
        return _list_kind(content[0]) if content and isinstance(content[0], dict) else None
    if not isinstance(content, dict):
        return None
    if "shapes" in content:
        return labelme.KIND
    listed = content.get("annotations")
    some = [x for x in listed[:1] if isinstance(x, dict)] if isinstance(listed, list) else []
    if any("segments_info" in x for x in some):
        return panoptic.KIND
    if all(name in content for name in LISTS):
        captions = any("caption" in x for x in some)
        return None if captions else coco.KIND
    if "_via_img_metadata" in content or any(
        isinstance(x, dict) and "regions" in x for x in content.values()
    ):
        return "via"
    return "supervisely" if "objects" in content and "size" in content else None


def _list_kind(entry: dict) -> str | None:
    if "score" in entry and "image_id" in entry:
        return "results"
    if "image" in entry and isinstance(entry.get("annotations"), list):
        return "createml"
    return "label studio" if "data" in entry or "annotation_id" in entry else None


def xml_kind(path: Path) -> str | None:
    """The format of an XML file, by its outermost element."""
    tag = read_xml(path, most=1).tag
    return {"annotation": voc.KIND, "annotations": cvat.KIND}.get(tag)


def _head(path: Path) -> str:
    """The text of a small file; empty if it is none."""
    try:
        return read_text(path)[:4096]
    except DataError:
        return ""
