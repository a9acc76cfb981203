"""Which format a folder or a file is in."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from maskdino.custom.annotations import LISTS
from maskdino.custom.formats import coco, cvat, labelme, voc, yolo
from maskdino.custom.formats.files import Tree, read_text
from maskdino.custom.formats.xml import read_xml
from maskdino.data import DataError

SNIFFED = 3  # files of a kind in a folder that are looked into
LARGE = 64 * 2**20  # bytes; only COCO has JSON files that large, which are not read twice
PANOPTIC = (
    "COCO's panoptic format, which maskdino.data.register_panoptic_folder and `maskdino train` take"
)
SEMANTIC = (
    "if it holds images and label images for semantic segmentation, "
    "maskdino.data.register_semantic_folder and `maskdino train` take them"
)
COCO_NAMES = ("instances", "_annotations")  # how files of COCO's format begin
# Formats that are known but not read, and what to do instead.
OTHERS = {
    "via": "VGG Image Annotator's format: export it as COCO",
    "createml": "CreateML's format: convert it to COCO, YOLO or Pascal VOC",
    "label studio": "Label Studio's own format: export the project as COCO or as YOLO with images",
    "supervisely": "Supervisely's format: export it as COCO",
    "results": "results of a model, no annotations",
    "panoptic": PANOPTIC,
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
    """Files by the format that they speak for.

    Attributes:
        files: of the formats that are read: `yolo.KIND` and so on.
        others: what files of other formats are, by path.
        errors: why files could not be looked into, by path.
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    others: dict[Path, str] = field(default_factory=dict)
    errors: dict[Path, DataError] = field(default_factory=dict)

    def add(self, kind: str, path: Path) -> None:
        """Adds a file."""
        self.files.setdefault(kind, []).append(path)


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
    for path in _yolo_files(tree):
        evidence.add(yolo.KIND, path)
    if not evidence.files:
        for path in tree.of(*UNREAD_SUFFIXES):
            evidence.others.setdefault(path, UNREAD_SUFFIXES[path.suffix.lower()])
    return evidence


def _yolo_files(tree: Tree) -> list[Path]:
    """Files of class names, and otherwise some labels."""
    labels = yolo.label_files(tree)
    found = [path for path in tree.of(".yaml", ".yml") if "\nnames" in f"\n{_head(path)}"]
    found += [path for path in tree.files if path.name in yolo.NAME_FILES and labels]
    if found:
        return found
    heads = ((path, _head(path).strip()) for path in labels[: 10 * SNIFFED])
    return [path for path, head in heads if head and yolo.is_label(head.splitlines()[0])]


def the_kind(evidence: Evidence, tree: Tree) -> str:
    """The one format of a folder.

    Raises:
        DataError: there is none, or more than one; the message says what to do.
    """
    found = evidence.files
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
    formats = ", ".join((coco.KIND, yolo.KIND, voc.KIND, labelme.KIND, cvat.KIND))
    images = (
        f"{len(tree.images)} images, but no annotations"
        if tree.images
        else "no images and no annotations"
    )
    hint = f"; {SEMANTIC}" if any(path.suffix == ".png" for path in tree.images) else ""
    raise DataError(f"{tree.root} holds {images} of a known format ({formats}){hint}")


def _look(evidence: Evidence, path: Path, kind_of: Any) -> None:
    try:
        kind = kind_of(path)
    except DataError as error:
        evidence.errors[path] = error
        return
    if kind in OTHERS:
        evidence.others[path] = OTHERS[kind]
    elif kind is not None:
        evidence.add(kind, path)


def json_kind(path: Path) -> str | None:
    """The format of a JSON file, or a key of `OTHERS`, or None.

    Raises:
        DataError: it is no JSON.
    """
    if path.stat().st_size > LARGE:
        return coco.KIND
    content = labelme.read_json(path)
    if isinstance(content, list):
        return _list_kind(content[0]) if content and isinstance(content[0], dict) else None
    if not isinstance(content, dict):
        return None
    if "shapes" in content:
        return labelme.KIND
    if all(name in content for name in LISTS):
        some = content["annotations"][:1] if isinstance(content["annotations"], list) else []
        if any(isinstance(x, dict) and "segments_info" in x for x in some):
            return "panoptic"
        captions = any(isinstance(x, dict) and "caption" in x for x in some)
        return None if captions else coco.KIND
    if "_via_img_metadata" in content or any(
        isinstance(x, dict) and "regions" in x for x in chain(content.values())
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
    """The format of an XML file, by its outermost element.

    Raises:
        DataError: it is no XML.
    """
    tag = read_xml(path, most=1).tag
    return {"annotation": voc.KIND, "annotations": cvat.KIND}.get(tag)


def _head(path: Path) -> str:
    """The text of a small file; empty if it is none."""
    try:
        return read_text(path)[:4096]
    except DataError:
        return ""
