"""From a folder or file of any known format to the annotations to train and validate on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from maskdino.custom.annotations import Annotations, read_annotations
from maskdino.custom.formats import coco, cvat, labelme, panoptic, semantic, voc, yolo
from maskdino.custom.formats.collect import Dataset, Part
from maskdino.custom.formats.files import TEST, TRAIN, VALIDATION, Tree
from maskdino.custom.formats.recognition import OTHERS, json_kind, recognize, the_kind, xml_kind
from maskdino.custom.request import Request
from maskdino.data import DataError
from maskdino.system.words import counted


@dataclass
class OwnData:
    """What was brought, before it is checked."""

    # train, validation: with what was wrong with their files.
    train: Part
    validation: Part | None
    # What was recognized and decided, as lines of text.
    notes: list[str] = field(default_factory=list)


def read_own_data(request: Request) -> OwnData:
    """Reads the data of a request; DataError if they are in no format that is known."""
    notes: list[str] = []
    if request.data is not None:
        dataset = read_dataset(request.data, None, request)
        train, validation = _chosen(dataset)
        notes = [_recognized(dataset), *dataset.notes]
    elif request.train_json is None or request.train_images is None:
        raise DataError("there are no training data: name a folder, or annotations and images")
    else:
        train = _named(request.train_json, request.train_images, request, notes)
        validation = None
        if request.val_json is not None and request.val_images is not None:
            validation = _named(request.val_json, request.val_images, request, notes)
            if train.by_name and validation.by_name:
                validation.data = _numbered_alike(train.data, validation.data)
    parts = [train] if validation is None else [train, validation]
    kept, name = coco.without_parent_class([part.data for part in parts])
    for part, data in zip(parts, kept, strict=True):
        part.data = data
    if name is not None:
        notes.append(f"class 0 {name!r} is Roboflow's name for all classes: left out")
    if request.data is not None:
        classes = ", ".join(f"{x.get('id')} {x.get('name')}" for x in train.data.categories)
        notes.append(f"class numbers and names: {classes}")
    return OwnData(train, validation, notes)


def read_dataset(path: Path, images: Path | None, request: Request) -> Dataset:
    """Recognizes what a folder or file holds, and reads it.

    Args:
        path: folder of the data, or their data.yaml, CVAT's XML or COCO's JSON file.
        images: folder of the images; None: they are in the same folder.
        request: tells the task, and the names of classes, as far as somebody has.

    Raises:
        DataError: there is nothing that can be read, or more than one thing.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    labels = Tree(path if path.is_dir() else path.parent)
    tree = labels if images is None else Tree(images)
    if path.is_file():
        return _read_file(path, tree, labels)
    evidence = recognize(labels)
    if images is not None and not evidence.files and labels.of(*semantic.LABEL_SUFFIXES):
        evidence.files[semantic.KIND] = labels.images  # whatever they are called
    kind = the_kind(evidence, labels, request.task)
    if kind != semantic.KIND and request.classes is not None:
        raise DataError(f"--classes names those of label images, but {path} holds {kind}")
    dataset = _read_folder(kind, evidence.files[kind], tree, labels, request)
    dataset.notes += evidence.unused
    return dataset


def _read_folder(
    kind: str, files: list[Path], tree: Tree, labels: Tree, request: Request
) -> Dataset:
    path = labels.root
    if not tree.images and kind != yolo.KIND:  # data.yaml may name folders elsewhere
        raise DataError(f"{path} holds {kind} annotations, but there is no image in {tree.root}")
    if kind == coco.KIND:
        return coco.read_coco(tree, files)
    if kind == yolo.KIND:
        return yolo.read_yolo(tree, labels, _settings(files, labels))
    if kind == cvat.KIND:
        if len(files) > 1:
            raise DataError(f"{path} holds several files of CVAT: give one of {_some(files)}")
        return cvat.read_cvat(tree, files[0])
    if kind == panoptic.KIND:
        return panoptic.read_panoptic(tree, labels, files)
    if kind == semantic.KIND:
        return semantic.read_semantic(tree, labels, request.classes)
    return voc.read_voc(tree, labels) if kind == voc.KIND else labelme.read_labelme(tree, labels)


def _read_file(path: Path, tree: Tree, labels: Tree) -> Dataset:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml") or path.name in yolo.NAME_FILES:
        return yolo.read_yolo(tree, tree, path)
    if suffix == ".xml" and xml_kind(path) == cvat.KIND:
        return cvat.read_cvat(tree, path)
    kind = json_kind(path) if suffix == ".json" else None
    if kind == coco.KIND:
        return coco.read_coco(tree, [path])
    if kind == panoptic.KIND:
        return panoptic.read_panoptic(tree, labels, [path])
    if kind in OTHERS:
        raise DataError(f"{path} holds {OTHERS[kind]}")
    raise DataError(f"{path} holds no data by itself: give the folder of all labels and images")


def _settings(files: list[Path], labels: Tree) -> Path | None:
    """The file of YOLO's names, the one next to the root if there are several."""
    settings = [path for path in files if path.suffix.lower() in (".yaml", ".yml")]
    named = settings or [path for path in files if path.name in yolo.NAME_FILES]
    if not named:  # a folder labels/train is below them
        return next(iter(labels.above(("data.yaml", *yolo.NAME_FILES))), None)
    depth = min(len(path.parts) for path in named)
    top = [path for path in named if len(path.parts) == depth]
    if len(top) > 1 and len({path.read_bytes() for path in top}) > 1:
        raise DataError(f"{labels.root} holds several files of class names: {_some(top)}: give one")
    return top[0]


def _some(files: list[Path]) -> str:
    return ", ".join(map(str, files[:4]))


def _named(labels: Path, images: Path, request: Request, notes: list[str]) -> Part:
    """The data of one split, whose labels and images are named."""
    if not images.is_dir():
        raise DataError(f"{images} is no folder: give the one that holds the images")
    known = (".yaml", ".yml", ".xml", ".txt")
    if not labels.is_dir() and labels.suffix.lower() not in known and not _is_panoptic(labels):
        return Part(read_annotations(labels, images))
    dataset = read_dataset(labels, images, request)
    notes += [_recognized(dataset), *dataset.notes]
    if len(dataset.parts) > 1:
        splits = ", ".join(str(split) for split in dataset.parts)
        raise DataError(f"{labels} holds several splits ({splits}): give it with --data alone")
    return next(iter(dataset.parts.values()))


def _is_panoptic(path: Path) -> bool:
    try:
        return path.suffix.lower() == ".json" and json_kind(path) == panoptic.KIND
    except (DataError, OSError):
        return False  # whoever reads it says why


def _numbered_alike(train: Annotations, validation: Annotations) -> Annotations:
    """Validation data with the training data's numbers of the classes of the same names."""
    numbers = {str(x["name"]): x["id"] for x in train.categories}
    free = max(numbers.values(), default=0) + 1
    ids: dict[int, int] = {}
    categories: list[dict] = []
    for category in validation.categories:
        new = numbers.get(category["name"], free + len(categories))
        ids[category["id"]] = new
        categories.append({**category, "id": new})
    objects = [{**x, "category_id": ids[x["category_id"]]} for x in validation.annotations]
    known = {x["id"] for x in categories}
    missing = [x for x in train.categories if x["id"] not in known]
    return replace(validation, annotations=objects, categories=[*categories, *missing])


def _chosen(dataset: Dataset) -> tuple[Part, Part | None]:
    """What to train and to validate on."""
    parts = dict(dataset.parts)
    rest = parts.pop(None, None)
    train = parts.get(TRAIN, rest)
    if train is None:
        named = " and ".join(map(str, parts)) or "nothing"
        raise DataError(
            f"{dataset.source} holds {named}, but no training data: name their folder 'train', or "
            "give the folder inside"
        )
    if TRAIN in parts and rest is not None:
        train.findings += rest.findings
        if rest.data.images:
            some = ", ".join(str(image.get("file_name")) for image in rest.data.images[:3])
            images = counted(len(rest.data.images), "image")
            dataset.notes.append(f"{images} in no split, such as {some}: left out")
    return train, parts.get(VALIDATION)


def _recognized(dataset: Dataset) -> str:
    """One line: the format, and what each split holds."""
    texts = []
    task = next(iter(dataset.parts.values())).data.task
    for split, part in dataset.parts.items():
        objects = part.data.annotations
        masks = sum(bool(x.get("segmentation")) for x in objects)
        bare = len(part.data.images) - len(Counter(x.get("image_id") for x in objects))
        text = counted(len(part.data.images), "image")
        text += f" ({bare} without objects)" if bare > 0 else ""
        text += f", {counted(masks, 'mask')}" if masks else ""
        if task != "instance":
            text += f", {counted(len(objects), 'segment')}" if task == "panoptic" else ""
        elif masks < len(objects):
            text += f", {counted(len(objects) - masks, 'box')}"
        unused = ", not used" if split == TEST else ""
        texts.append(f"{split}: {text}{unused}" if split else text)
    if task == "semantic":
        return f"{dataset.source} holds label images (semantic segmentation): {'; '.join(texts)}"
    return f"{dataset.source} is in the format of {dataset.kind}: {'; '.join(texts)}"
