"""Makes ADE20K's semantic maps, COCO-style instances and panoptic maps.

From ADEChallengeData2016/annotations/ (classes from 1, 0 is none) it makes
annotations_detectron2/ (classes from 0, 255 is none). From these and annotations_instance/ (red:
thing from 1, green: number of the object) it makes ade20k_instance_{train,val}.json and
ade20k_panoptic_{train,val}/ with its .json. Category ids are the 150 classes from 0 in all of
them. What is there already is kept: start it again after an interruption.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from maskdino.cli.common import errors_in_one_line
from maskdino.cli.prepare import common
from maskdino.data.datasets import ADE20K_THING_IDS, ade20k_classes
from maskdino.data.images import save_png
from maskdino.data.reading import colors_of_ids, ids_of_colors

TASKS = ("semantic", "instance", "panoptic")
SPLITS = {"train": "training", "val": "validation"}


def make_semantic(item: tuple[Path, Path]) -> None:
    """Makes one semantic map."""
    path, source = item
    labels = common.read_pixels(source)
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.max() > 150:
        raise common.PreparationError(f"{source} is no map of the classes 0 to 150")
    save_png(path, labels - np.uint8(1))  # 0, "none", becomes 255


def objects_of(source: Path) -> list[tuple[int, np.ndarray]]:
    """Class (from 0, of 150) and mask (H, W) bool of each object."""
    colors = common.read_pixels(source)
    things, numbers = colors[..., 0], colors[..., 1]
    objects = []
    for number in np.unique(numbers[numbers > 0]):
        mask = numbers == number
        values = np.unique(things[mask])
        if len(values) != 1 or not 1 <= values[0] <= len(ADE20K_THING_IDS):
            raise common.PreparationError(
                f"{source}: object {number} has the things {values.tolist()}"
            )
        objects.append((ADE20K_THING_IDS[values[0] - 1], mask))
    return objects


def make_instances(source: Path) -> list[dict]:
    """COCO annotations of one image, without ids."""
    return [
        {"category_id": category, "iscrowd": 0, **common.geometry_of(mask)}
        for category, mask in objects_of(source)
    ]


def make_panoptic(source: Path, semantic: Path, output: Path, overwrite: bool) -> list[dict]:
    """Makes one panoptic map unless it is there, and lists its segments.

    The low byte of a segment id is the class + 1, the second one the number of the object: the
    map alone tells everything about its segments. Things lie above stuff.
    """
    path = output / source.name
    if path.exists() and not overwrite:
        ids = ids_of_colors(common.read_pixels(path))
    else:
        labels = common.read_pixels(
            common.require(semantic / source.name, "the semantic map")
        ).astype(np.int64)
        ids = np.where(np.isin(labels - 1, ADE20K_THING_IDS), 0, labels)
        for number, (category, mask) in enumerate(objects_of(source), start=1):
            if mask.shape != ids.shape:
                raise common.PreparationError(f"{source} has {mask.shape} pixels, not {ids.shape}")
            ids[mask] = category + 1 + 256 * number
        save_png(path, colors_of_ids(ids))
    return common.describe_segments(ids, lambda segment_id: (segment_id & 255) - 1)


def list_images(folder: Path, sources: list[Path]) -> list[dict]:
    """COCO's "images"; ids are the file names without extension."""
    images = []
    for source in sources:
        path = common.require(folder / f"{source.stem}.jpg", f"the image of {source}")
        height, width = common.image_size(path)
        images.append({"id": source.stem, "file_name": path.name, "height": height, "width": width})
    return images


def prepare_instance(folder: Path, split: str, workers: int, overwrite: bool) -> None:
    """Makes ade20k_instance_SPLIT.json of a split."""
    output = folder / f"ade20k_instance_{split}.json"
    if common.is_done(output, overwrite):
        return
    truth = folder / "annotations_instance" / SPLITS[split]
    sources = common.find_files(truth, "*.png", "ADE20K's instance annotations")
    annotations = [
        {"image_id": source.stem, **annotation}
        for source, found in zip(
            sources, common.run(make_instances, sources, workers, str(output)), strict=True
        )
        for annotation in found
    ]
    classes = ade20k_classes()
    common.save_json(
        output,
        {
            "images": list_images(folder / "images" / SPLITS[split], sources),
            "annotations": [{"id": i, **a} for i, a in enumerate(annotations, start=1)],
            "categories": [{"id": i, "name": classes[i]} for i in ADE20K_THING_IDS],
        },
    )


def prepare_panoptic(folder: Path, split: str, workers: int, overwrite: bool) -> None:
    """Makes ade20k_panoptic_SPLIT/ of a split, with its .json."""
    output = folder / f"ade20k_panoptic_{split}"
    if common.is_done(output.with_suffix(".json"), overwrite):
        return
    truth = folder / "annotations_instance" / SPLITS[split]
    sources = common.find_files(truth, "*.png", "ADE20K's instance annotations")
    semantic = folder / "annotations" / SPLITS[split]
    work = partial(make_panoptic, semantic=semantic, output=output, overwrite=overwrite)
    segments = common.run(work, sources, workers, str(output))
    common.save_json(
        output.with_suffix(".json"),
        {
            "images": list_images(folder / "images" / SPLITS[split], sources),
            "annotations": [
                {"image_id": source.stem, "file_name": source.name, "segments_info": found}
                for source, found in zip(sources, segments, strict=True)
            ],
            "categories": [
                {"id": i, "name": name, "isthing": int(i in ADE20K_THING_IDS)}
                for i, name in enumerate(ade20k_classes())
            ],
        },
    )


def prepare_semantic(folder: Path, split: str, workers: int, overwrite: bool) -> None:
    """Makes annotations_detectron2/ of a split."""
    truth = folder / "annotations" / SPLITS[split]
    sources = common.find_files(truth, "*.png", "ADE20K's semantic annotations")
    output = folder / "annotations_detectron2" / SPLITS[split]
    common.make_maps(
        make_semantic, {output / x.name: x for x in sources}, workers, overwrite, str(output)
    )


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command; `words` stands in for its line."""
    parser = common.make_parser(__doc__)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        choices=TASKS,
        metavar="TASK",
        help=" ".join(TASKS),
    )
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=list(SPLITS))
    arguments = parser.parse_args(words)
    folder = common.require(arguments.root / "ADEChallengeData2016", "ADE20K as it is downloaded")
    functions = {
        "semantic": prepare_semantic,
        "instance": prepare_instance,
        "panoptic": prepare_panoptic,
    }
    for task in arguments.tasks:
        for split in arguments.splits:
            functions[task](folder, split, arguments.workers, arguments.overwrite)
