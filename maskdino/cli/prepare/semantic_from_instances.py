"""Makes semantic maps from instances in COCO's format: 0 is background, i the i-th category.

Without options it makes those of the nuclei, datasets/nuclei/semantic_{train,val}/, for the
datasets nuclei_sem_seg_{train,val}. Crowd regions are "ignore" (255). Where objects overlap, the
smaller one is on top. Maps that are there already are kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from maskdino.cli.common import errors_in_one_line
from maskdino.cli.prepare import common
from maskdino.data.datasets import own_datasets_root
from maskdino.data.folders import inside
from maskdino.data.images import save_png
from maskdino.ops.rle import decode_segmentation


def convert(item: tuple[Path, tuple[dict, list[dict]]], numbers: dict[int, int]) -> None:
    """Makes the map of one image from its annotations."""
    path, (image, annotations) = item
    size = (image["height"], image["width"])
    labels = np.zeros(size, np.uint8)
    crowds_first_then_large = sorted(
        annotations, key=lambda a: (not a.get("iscrowd", 0), -a["area"])
    )
    for annotation in crowds_first_then_large:
        crowd = annotation.get("iscrowd", 0)
        mask = decode_segmentation(annotation["segmentation"], size)
        labels[mask] = common.VOID if crowd else numbers[annotation["category_id"]]
    save_png(path, labels)


def prepare(json_file: Path, output: Path, workers: int, overwrite: bool) -> None:
    """Makes the maps of one annotation file."""
    content = common.read_annotations(json_file, "COCO annotations")
    ids = sorted(category["id"] for category in content["categories"])
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    maps = {
        Path(inside(output, x["file_name"], output)).with_suffix(".png"): (x, by_image[x["id"]])
        for x in content["images"]
    }
    work = partial(convert, numbers={category: i for i, category in enumerate(ids, start=1)})
    common.make_maps(work, maps, workers, overwrite, str(output))


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command; `words` stands in for its line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--json", type=Path, help="annotations of another dataset")
    parser.add_argument("--output", type=Path, help="with --json: folder of the maps")
    arguments = parser.parse_args(words)
    options = (arguments.workers, arguments.overwrite)
    if arguments.json:
        if not arguments.output:
            parser.error("--json needs --output")
        prepare(arguments.json, arguments.output, *options)
        return
    folder = own_datasets_root() / "nuclei"
    for split in ("train", "val"):
        json_file = folder / "annotations" / f"instances_{split}.json"
        prepare(json_file, folder / f"semantic_{split}", *options)
