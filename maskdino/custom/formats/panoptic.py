"""COCO's panoptic format: a JSON file of segments, and a PNG file of segment ids for each image."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskdino.custom.annotations import Annotations
from maskdino.custom.formats.coco import PROBED, by_split, with_images
from maskdino.custom.formats.collect import Dataset, Part, Unreadable
from maskdino.custom.formats.files import Tree
from maskdino.custom.maps import MAP, Maps, Problem, in_threads, segments_of
from maskdino.data import DataError
from maskdino.data.annotation_checks import format_problem, is_id
from maskdino.data.folders import WITHIN
from maskdino.data.panoptic_checks import annotation_problem
from maskdino.data.reading import read_json

KIND = "COCO's panoptic segmentation"


def read_panoptic(tree: Tree, labels: Tree, files: Sequence[Path]) -> Dataset:
    """Reads annotations; DataError for two of one split, or if no image or PNG is found."""
    parts = {split: _part(path, split, tree, labels) for split, path in by_split(files, labels)}
    return Dataset(KIND, labels.root, parts)


def _part(path: Path, split: str | None, tree: Tree, labels: Tree) -> Part:
    content = read_json(str(path), encoding="utf-8-sig")
    problem = format_problem(content, panoptic=True)
    if problem:
        raise DataError(f"{path} is not in COCO's panoptic format: {problem}")
    entries = content["annotations"]
    for category in content["categories"]:
        if category.get("isthing") not in (0, 1):
            raise DataError(
                f"{path}: category {category.get('name')!r} has isthing "
                f"{category.get('isthing')!r}: write 1 for things, which are counted, and 0 for "
                "what is not, such as sky and road"
            )
    root = _map_root(path, [x.get("file_name") for x in entries], labels)
    data = Annotations(path, tree.root, content["images"], [], content["categories"])
    data = with_images(data, tree, split, {root / str(x.get("file_name")) for x in entries})
    return _with_segments(replace(data, maps=Maps("panoptic", root)), entries)


def _map_root(path: Path, names: Sequence[Any], labels: Tree) -> Path:
    """The folder of the PNG files: the one of the JSON file's name, as COCO has it, or another."""
    probed = [str(name) for name in names[:: max(len(names) // PROBED, 1)]]
    folders = [path.with_suffix(""), path.parent.parent / path.stem, path.parent]
    folders += sorted(
        {x.parent for x in labels.of(".png")}, key=lambda x: "panoptic" not in x.name.lower()
    )
    # Not Path.is_file, which fails for a name of thousands of letters.
    counts = {x: sum(os.path.isfile(x / name) for name in probed) for x in dict.fromkeys(folders)}
    best = max(counts, key=counts.__getitem__)
    if not counts[best]:
        some = f", such as {probed[0]!r}," if probed else ""
        raise DataError(
            f"{path}: none of the PNG files of segments{some} is in {labels.root}: put them into "
            f"{path.with_suffix('')}"
        )
    return best


def _with_segments(data: Annotations, entries: Sequence[dict]) -> Part:
    """The annotations with the segments of all images in which nothing is wrong."""
    assert data.maps is not None
    findings: list[Unreadable] = []
    of_image: dict[Any, list[dict]] = defaultdict(list)
    known = {x["id"] for x in data.images if is_id(x.get("id"))}
    # Without any image, the checks say so, and nothing else.
    for number, entry in enumerate(entries if data.images else ()):
        image = entry.get("image_id")
        if is_id(image) and image in known:
            of_image[image].append(entry)
        else:
            kind = "annotation of an unknown image: add the image, or remove the annotation"
            findings.append(Unreadable(kind, f"entry {number} of 'annotations': image {image!r}"))
    categories = {x["id"]: x for x in data.categories if is_id(x.get("id"))}
    root = data.maps.root
    usable = [x for x in data.images if is_id(x.get("id"))]
    results = in_threads(lambda x: _read_image(x, of_image[x["id"]], categories, root), usable)
    images = [x for x in data.images if not is_id(x.get("id"))]  # which the checks refuse
    annotations: list[dict] = []
    for image, result in zip(usable, results, strict=True):
        if isinstance(result, Problem):
            name = image.get("file_name")
            findings.append(Unreadable(result.kind, f"image {image['id']!r} ({name}): {result}"))
            continue
        images.append({**image, MAP: of_image[image["id"]][0]["file_name"]})
        annotations += result
    return Part(replace(data, images=images, annotations=annotations), [*findings])


def _read_image(
    image: dict, entries: list[dict], categories: dict, root: Path
) -> list[dict] | Problem:
    """The segments of an image as annotations, or what is wrong."""
    if not entries:
        return Problem("image without segments: annotate it, or remove it", "no annotation")
    if len(entries) > 1:
        return Problem("image with several annotations: remove all but one", str(len(entries)))
    wrong = annotation_problem(entries[0], str(root), categories, advice=WITHIN)
    if wrong:
        return Problem(*wrong)
    name, segments = entries[0]["file_name"], entries[0]["segments_info"]
    try:
        areas, size = segments_of(root / name)
    except Problem as problem:
        return problem
    wanted = image.get("height"), image.get("width")
    if size != wanted:
        kind = "label image of another size than its image"
        return Problem(kind, f"{root / name} has (height, width) {size}, not {wanted}")
    ids = [x["id"] for x in segments]
    missing = sorted(set(ids) - set(areas))
    if missing:
        kind = "segments without pixels in the PNG file: remove them, or mend the file"
        return Problem(kind, f"{root / name}: ids {missing[:8]}")
    unknown = sorted(set(areas) - set(ids))
    if unknown:
        kind = "PNG file with ids that are no segments: list them, or set the pixels to 0"
        return Problem(kind, f"{root / name}: ids {unknown[:8]}")
    return [
        {
            "id": f"segment {x['id']} of {name}",
            "image_id": image["id"],
            "category_id": x["category_id"],
            "iscrowd": int(bool(x.get("iscrowd"))),
            "segment": x["id"],
            "area": areas[x["id"]],
        }
        for x in segments
    ]


def with_flat_segments(json_file: Path, image_root: Path, maps: Maps) -> Annotations:
    """Annotations of a file that was written here; DataError if it has been changed."""
    content = read_json(str(json_file))
    try:
        segments = [
            {**segment, "image_id": x["image_id"], "segment": segment["id"]}
            for x in content["annotations"]
            for segment in x["segments_info"]
        ]
        images, categories = content["images"], content["categories"]
        return Annotations(json_file, image_root, images, segments, categories, maps)
    except (KeyError, TypeError) as error:
        raise DataError(f"{json_file} is not as it was written: begin anew") from error
