"""COCO's JSON files in a folder with their images, wherever both lie."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from maskdino.custom.annotations import Annotations, read_annotations
from maskdino.custom.formats.collect import Dataset, Part
from maskdino.custom.formats.files import (
    IMAGE,
    LABEL,
    OTHER,
    TEST,
    TRAIN,
    VALIDATION,
    Tree,
    split_of,
)
from maskdino.data import DataError
from maskdino.data.folders import leaves
from maskdino.system.words import counted

KIND = "COCO"
PROBED = 50  # images by which the folder of all is found
NO_PARENT = "none"  # Roboflow's class 0, that of all others


def read_coco(tree: Tree, files: Sequence[Path]) -> Dataset:
    """Reads annotations; DataError for two of one split, or if no image is found."""
    instances = [path for path in files if path.name.startswith("instances")]
    own = instances or files  # COCO's own folders hold captions and keypoints too
    parts = {
        split: Part(with_images(read_annotations(path, tree.root), tree, split))
        for split, path in by_split(own, tree)
    }
    return Dataset(KIND, tree.root, parts)


def by_split(files: Sequence[Path], tree: Tree) -> Iterator[tuple[str | None, Path]]:
    """Files of annotations with the splits that their names, or folders, tell; in their order."""
    found: dict[str | None, Path] = {}
    for path in files:
        inside = path.relative_to(tree.root) if path.is_relative_to(tree.root) else Path(path.name)
        split = split_of(inside.with_suffix(""))
        if split in found:
            raise DataError(
                f"both {found[split]} and {path} are annotations "
                f"{f'for {split!r}' if split else 'without a split'}: "
                "give the right ones with --train-json and --val-json, or remove the others"
            )
        found[split] = path
    order = (None, TRAIN, VALIDATION, TEST)
    return ((split, found[split]) for split in order if split in found)


def with_images(
    data: Annotations, tree: Tree, split: str | None, labels: Collection[Path] = ()
) -> Annotations:
    """Finds the folder that the names of the images are relative to, somewhere in the tree.

    Files that are label images, whatever their names, are not taken for images.
    """
    names = [str(image.get("file_name", "")) for image in data.images]
    label = data.json_file
    best, is_of_all = _folder_of(names[:: max(len(names) // PROBED, 1)], label, tree, split, labels)
    if is_of_all and not any(leaves(str(best), name) for name in names):
        return replace(data, image_root=best)
    # Paths of another machine, as Label Studio writes them, or images in several folders.
    images = []
    number = 0
    for image, name in zip(data.images, names, strict=True):
        path = tree.find_image(name, label, split) if PurePosixPath(name).name else None
        number += path is not None
        if path is None and name and not leaves(str(best), name) and name == image["file_name"]:
            path = best / name  # where the others are
        images.append(image if path is None else {**image, "file_name": tree.relative(path)})
    if not number and names:
        raise DataError(
            f"{label}: of {counted(len(names), 'image')}, such as {names[0]!r}, none is in "
            f"{tree.root}: put them there, or name their folder with --train-images"
        )
    return replace(data, image_root=tree.root, images=images)


def _folder_of(
    probed: Sequence[str], label: Path, tree: Tree, split: str | None, labels: Collection[Path]
) -> tuple[Path, bool]:
    """The folder that holds most of some images, and whether it holds all of them.

    Of several, one beside the file of annotations counts first, then what the names of folders say,
    and which is nearest to the file.

    Raises:
        DataError: two folders hold all of them, and nothing tells which one is meant.
    """
    beside = [label.parent, label.parent.parent, tree.root]
    roles = {IMAGE: 0, None: 1, LABEL: 2, OTHER: 2}

    def rank(folder: Path) -> tuple[bool, int, int]:
        inside = folder / "x"
        near = len(os.path.commonprefix([folder.parts, label.parts]))
        return tree.split(inside) != split, roles[tree.role(inside)], -near

    others = sorted({path.parent for path in tree.images} - {*beside})
    counts = {}
    for folder in (*beside, *sorted(others, key=rank)):
        # Not Path.is_file, which fails for a name of thousands of letters.
        there = [x for name in probed if os.path.isfile(x := folder / name)]
        counts[folder] = sum(x not in labels for x in there)
    best = max(counts, key=counts.__getitem__)
    is_of_all = counts[best] == len(probed)
    alike = [x for x in others if counts[x] == counts[best] and rank(x) == rank(best)]
    if probed and is_of_all and best not in beside and len(alike) > 1:
        raise DataError(
            f"{label}: its images may be those in {' and '.join(map(str, alike[:2]))}: rename or "
            "remove one of them, or name the right one with --train-images (--val-images), and the "
            "annotations with --train-json (--val-json)"
        )
    return best, is_of_all


def without_parent_class(parts: Sequence[Annotations]) -> tuple[list[Annotations], str | None]:
    """Leaves out the class 0 that Roboflow adds as the parent of all others, if it has no objects.

    Returns:
        The annotations, and the name of the class if one was left out.
    """
    used = Counter(str(x.get("category_id")) for part in parts for x in part.annotations)
    parents = {str(x.get("supercategory")) for part in parts for x in part.categories}
    for category in parts[0].categories if parts else []:
        number, name = category.get("id"), category.get("name")
        parent = category.get("supercategory") == NO_PARENT and str(name) in parents
        if number == 0 and parent and not used["0"] and len(parts[0].categories) > 1:
            kept = [[x for x in part.categories if x.get("id") != 0] for part in parts]
            new = [replace(p, categories=c) for p, c in zip(parts, kept, strict=True)]
            return new, str(name)
    return list(parts), None
