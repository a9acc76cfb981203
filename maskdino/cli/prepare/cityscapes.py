"""Makes Cityscapes' maps of the 19 training classes, and its panoptic maps.

From cityscapes/gtFine/{train,val}/CITY/*_labelIds.png it makes *_labelTrainIds.png beside them
(255 is no class), and from *_instanceIds.png it makes gtFine/cityscapes_panoptic_{train,val}/
with its .json, all as Cityscapes' own scripts do. What is there already is kept: start it again
after an interruption.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from maskdino.cli.common import errors_in_one_line
from maskdino.cli.prepare import common
from maskdino.data.images import save_png
from maskdino.data.reading import colors_of_ids, ids_of_colors

SPLITS = ("train", "val")
TRAIN_IDS = {category["id"]: category["trainId"] for category in CITYSCAPES_CATEGORIES}
THINGS = {category["id"] for category in CITYSCAPES_CATEGORIES if category["isthing"]}


def make_train_ids(item: tuple[Path, Path]) -> None:
    """Makes one map of training classes."""
    path, source = item
    table = np.full(256, common.VOID, np.uint8)
    table[list(TRAIN_IDS)] = list(TRAIN_IDS.values())
    labels = common.read_pixels(source)
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise common.PreparationError(
            f"{source} is no map of label ids: {labels.dtype} {labels.shape}"
        )
    save_png(path, table[labels])


def make_panoptic(source: Path, output: Path, overwrite: bool) -> list[dict]:
    """Makes one panoptic map unless it is there, and lists its segments.

    An instance id is label * 1000 + number; a label alone is stuff, or a group of things that
    were not told apart: a crowd.
    """
    path = output / panoptic_name(source)
    if path.exists() and not overwrite:
        ids = ids_of_colors(common.read_pixels(path))
    else:
        ids = common.read_pixels(source).astype(np.int64)
        labels = np.where(ids < 1000, ids, ids // 1000)
        ids = np.where(np.isin(labels, list(TRAIN_IDS)), ids, 0)
        save_png(path, colors_of_ids(ids))
    segments = common.describe_segments(ids, lambda i: i if i < 1000 else i // 1000)
    for segment in segments:
        segment["iscrowd"] = int(segment["id"] < 1000 and segment["category_id"] in THINGS)
    return segments


def panoptic_name(source: Path) -> str:
    """File name of the panoptic map of a map of instances."""
    return source.name.replace("_instanceIds", "_panoptic")


def image_id(source: Path) -> str:
    """City, sequence and frame."""
    return "_".join(source.name.split("_")[:3])


def prepare_panoptic(folder: Path, split: str, workers: int, overwrite: bool) -> None:
    """Makes the panoptic maps of a split, with their .json."""
    output = folder / "gtFine" / f"cityscapes_panoptic_{split}"
    if common.is_done(output.with_suffix(".json"), overwrite):
        return
    pattern = "*/*_gtFine_instanceIds.png"
    sources = common.find_files(folder / "gtFine" / split, pattern, "Cityscapes' fine annotations")
    work = partial(make_panoptic, output=output, overwrite=overwrite)
    segments = common.run(work, sources, workers, str(output))
    images = []
    for source in sources:
        name = f"{image_id(source)}_leftImg8bit.png"
        path = folder / "leftImg8bit" / split / source.parent.name / name
        height, width = common.image_size(common.require(path, f"the image of {source}"))
        # Cityscapes' own files carry the annotation's name here, without its kind.
        file_name = f"{image_id(source)}_gtFine_leftImg8bit.png"
        images.append(
            {"id": image_id(source), "file_name": file_name, "height": height, "width": width}
        )
    annotations = [
        {"image_id": image_id(s), "file_name": panoptic_name(s), "segments_info": found}
        for s, found in zip(sources, segments, strict=True)
    ]
    categories = [
        {"id": c["id"], "name": c["name"], "color": list(c["color"]), "isthing": c["isthing"]}
        for c in CITYSCAPES_CATEGORIES
    ]
    common.save_json(
        output.with_suffix(".json"),
        {"images": images, "annotations": annotations, "categories": categories},
    )


def prepare_train_ids(folder: Path, split: str, workers: int, overwrite: bool) -> None:
    """Makes the maps of training classes of a split."""
    pattern = "*/*_gtFine_labelIds.png"
    sources = common.find_files(folder / "gtFine" / split, pattern, "Cityscapes' fine annotations")
    maps = {x.with_name(x.name.replace("_labelIds", "_labelTrainIds")): x for x in sources}
    common.make_maps(make_train_ids, maps, workers, overwrite, f"{split}: labelTrainIds")


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command; `words` stands in for its line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS)
    arguments = parser.parse_args(words)
    folder = common.require(arguments.root / "cityscapes", "Cityscapes as it is downloaded")
    for split in arguments.splits:
        prepare_train_ids(folder, split, arguments.workers, arguments.overwrite)
        prepare_panoptic(folder, split, arguments.workers, arguments.overwrite)
