"""Label images for semantic segmentation: for each image one whose pixels are classes.

Labels are found by the names of their folders (``labels``, ``masks``, ``SegmentationClass``, ...),
or by their own, which end with ``_mask`` and the like. Each belongs to the image of its name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskdino.custom.annotations import Annotations
from maskdino.custom.checks import Finding
from maskdino.custom.formats.class_names import HOW, asked_classes, find_classes
from maskdino.custom.formats.collect import Dataset, Part, Unreadable
from maskdino.custom.formats.files import LABEL, OTHER, TEST, TRAIN, Tree, image_size
from maskdino.custom.formats.voc import listed_splits
from maskdino.custom.maps import IGNORED, MAP, Encoding, Maps, Problem, in_threads, values_of
from maskdino.data import DataError

KIND = "label images"
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # JPEG changes values
_LABEL_NAME = re.compile(r"(.+)[_-](masks?|labels?|seg|segmentation|gt|L)")


def label_images(tree: Tree) -> list[Path]:
    """Label images of a folder, by their names or those of the folders that they are in."""
    stems = {path.stem for path in tree.images}
    return [
        path
        for path in tree.images
        if path.suffix.lower() in LABEL_SUFFIXES
        and (role := tree.role(path)) != OTHER
        and (role == LABEL or (path.stem != (plain := _plain(path.stem)) and plain in stems))
    ]


def _plain(stem: str) -> str:
    """The name of a label's image, where the label's own says that it is one."""
    named = _LABEL_NAME.fullmatch(stem)
    return named[1] if named else stem


@dataclass(frozen=True)
class _Pair:
    split: str | None
    image: Path
    label: Path | None  # None: there is none


def read_semantic(tree: Tree, labels: Tree, classes: str | None) -> Dataset:
    """Reads labels; of another folder than the images', all files are labels.

    Names of classes, or their file, may be given; else a file in the folder has them.

    Raises:
        DataError: the names are missing, or there are no labels.
    """
    if tree is labels:
        found = label_images(tree)
    elif tree.root.resolve() == labels.root.resolve():
        raise DataError(f"{tree.root} cannot be the folder of both images and labels")
    else:
        found = [path for path in labels.images if path.suffix.lower() in LABEL_SUFFIXES]
    if not found:
        raise DataError(f"{labels.root} holds no label images (PNG)")
    in_file = None if classes is not None else find_classes(labels)
    if classes is not None:
        known, source = asked_classes(classes), "--classes"
    elif in_file is not None:
        known, source = in_file[0], str(in_file[1])
    else:
        raise DataError(_nameless(labels, found))
    notes = [f"names of the classes are those of {source}"]
    ignored = [c.name for c in known if c.ignored]
    if ignored:
        notes.append(f"pixels of {', '.join(ignored)} are ignored, as those of value {IGNORED}")
    pairs, lost = _pairs(tree, labels, found)
    if not pairs:
        raise DataError(f"{tree.root} holds label images, but there is no image of them")
    encoding = Encoding(known)
    parts: dict[str | None, Part] = {}
    for split in dict.fromkeys(pair.split for pair in pairs):
        own = [pair for pair in pairs if pair.split == split]
        if split == TEST:  # labels of test images are often not given away
            own = [pair for pair in own if pair.label is not None]
        parts[split] = _part(own, tree, labels, encoding)
    (parts.get(TRAIN) or next(iter(parts.values()))).findings += lost
    _check_ignored(parts, found, labels)
    return Dataset(KIND, labels.root, parts, notes)


def _nameless(labels: Tree, found: Sequence[Path]) -> str:
    """What to do about classes without names."""
    values = list(dict.fromkeys(v for path in found[:8] for v in values_of(path)))
    some = ", ".join(values[:12]) + (", ..." if len(values) > 12 else "")
    how = "write labelmap.txt with lines 'nut:128,0,0'" if values[0].startswith("(") else HOW
    return (
        f"{labels.root} holds label images with the values {some}, but no names of the classes: "
        f"{how}, or give names or their file with --classes"
    )


def _check_ignored(parts: dict[str | None, Part], found: Sequence[Path], labels: Tree) -> None:
    """Refuses masks of 0 and 255, which are common, but 255 stands for pixels that do not count."""
    shown = {x["category_id"] for part in parts.values() for x in part.data.annotations}
    if len(shown) == 1 and {v for path in found[:8] for v in values_of(path)} == {"0", "255"}:
        raise DataError(
            f"{labels.root}: all pixels of the label images are 0 or 255, and 255 is ignored: if "
            "it is a class, write its value into classes.txt, as in '0 background' and '255 nut' "
            "(--classes A,B names the values 0 and 1)"
        )


def _pairs(tree: Tree, labels: Tree, found: Sequence[Path]) -> tuple[list[_Pair], list[Unreadable]]:
    """Each image with its label, and labels without an image."""
    taken = set(found)
    images = [p for p in tree.images if p not in taken and tree.role(p) != OTHER]
    listed = listed_splits(labels, "Segmentation")
    if listed:  # the others of Pascal VOC have boxes alone
        images = [path for path in images if path.stem in listed]
        found = [path for path in found if path.stem in listed]
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in images:
        by_stem[path.stem].append(path)
    label_of: dict[Path, Path] = {}
    problems: list[Unreadable] = []
    for label in found:
        candidates = by_stem.get(label.stem) or by_stem.get(_plain(label.stem), [])
        image = _nearest(label, labels, candidates, tree)
        if image is None:
            kind = "label image without an image of its name: add the image, or remove the label"
            problems.append(Unreadable(kind, str(label)))
        elif image in label_of:
            kind = "image with several label images: remove all but one"
            problems.append(Unreadable(kind, f"{image}: {label_of[image]} and {label}"))
        else:
            label_of[image] = label
    return [
        _Pair(listed.get(path.stem, tree.split(path)), path, label_of.get(path)) for path in images
    ], problems


def _nearest(label: Path, labels: Tree, candidates: list[Path], tree: Tree) -> Path | None:
    """The image whose folders are most like those of the label; None: all are of other splits."""
    split = labels.split(label)
    own = Counter(label.relative_to(labels.root).parts)
    if split is not None:
        candidates = [x for x in candidates if tree.split(x) in (split, None)]
    return max(
        candidates,
        key=lambda x: (
            tree.split(x) == split,
            sum((own & Counter(x.relative_to(tree.root).parts)).values()),
        ),
        default=None,
    )


def _part(pairs: Sequence[_Pair], tree: Tree, labels: Tree, encoding: Encoding) -> Part:
    """Images of a split, with the classes that they show as their annotations."""
    images: list[dict] = []
    annotations: list[dict] = []
    findings: list[Finding] = []
    all_plain = True
    results = in_threads(lambda pair: _read_pair(pair, encoding), pairs)
    for pair, result in zip(pairs, results, strict=True):
        if isinstance(result, Problem):
            findings.append(Unreadable(result.kind, str(result)))
            continue
        assert pair.label is not None
        size, areas, plain = result
        all_plain &= plain
        name, number = tree.relative(pair.image), len(images) + 1
        image = {"id": number, "file_name": name, "height": size[0], "width": size[1]}
        images.append({**image, MAP: labels.relative(pair.label)})
        annotations += [
            {"id": f"{name}:{c.name}", "image_id": number, "category_id": c.value, "area": int(n)}
            for c, n in zip(encoding.classes, areas, strict=True)
            if n
        ]
    categories = [{"id": c.value, "name": c.name} for c in encoding.classes]
    maps = Maps("semantic", labels.root, None if all_plain else encoding)
    data = Annotations(labels.root, tree.root, images, annotations, categories, maps)
    return Part(data, findings)


def _read_pair(
    pair: _Pair, encoding: Encoding
) -> tuple[tuple[int, int], np.ndarray, bool] | Problem:
    """(H, W), pixels of each class, and whether the file can be read as it is; or what is wrong."""
    if pair.label is None:
        kind = "image without a label image of its name: add the label, or remove the image"
        return Problem(kind, str(pair.image))
    try:
        size = image_size(pair.image)
    except DataError as error:
        return Problem("image cannot be read", str(error))
    try:
        classes, plain = encoding.read(pair.label)
    except Problem as problem:
        return problem
    if classes.shape != size:
        return Problem(
            "label image of another size than its image",
            f"{pair.label} has (height, width) {classes.shape}, {pair.image} {size}",
        )
    areas = np.bincount(classes.ravel(), minlength=256)[: len(encoding.classes)]
    return size, areas, plain
