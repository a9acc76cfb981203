"""Makes semantic maps of COCO (or any dataset in its format) from its panoptic maps.

A pixel holds the position of its category in the JSON file; 255 where there is no segment. Needs
coco/annotations/panoptic_{train,val}2017.json and the folders of its PNG files, coco/panoptic_
{train,val}2017/ or coco/annotations/panoptic_{train,val}2017/, and makes
coco/panoptic_semseg_{train,val}2017/. Maps that are there already are kept: start it again after
an interruption.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from maskdino.cli.common import errors_in_one_line
from maskdino.cli.prepare import common
from maskdino.data.folders import inside
from maskdino.data.images import save_png
from maskdino.data.reading import ids_of_colors


def convert(item: tuple[Path, dict], numbers: dict[int, int], panoptic: Path) -> None:
    """Makes one map."""
    path, annotation = item
    source = Path(inside(panoptic, annotation["file_name"], panoptic))
    ids = ids_of_colors(common.read_pixels(source))
    labels = np.full(ids.shape, common.VOID, np.uint8)
    for segment, mask in common.masks_of_segments(annotation["segments_info"], ids, source):
        labels[mask] = numbers[segment["category_id"]]
    save_png(path, labels)


def prepare(json_file: Path, panoptic: Path, output: Path, workers: int, overwrite: bool) -> None:
    """Makes the maps of one split."""
    content = common.read_annotations(json_file, "panoptic annotations")
    common.require(panoptic, "the PNG files of the panoptic annotations")
    numbers = {category["id"]: i for i, category in enumerate(content["categories"])}
    maps = {Path(inside(output, x["file_name"], output)): x for x in content["annotations"]}
    work = partial(convert, numbers=numbers, panoptic=panoptic)
    common.make_maps(work, maps, workers, overwrite, str(output))


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command; `words` stands in for its line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--splits", nargs="+", default=["train", "val"], choices=["train", "val"])
    parser.add_argument("--json", type=Path, help="panoptic annotations of another dataset")
    parser.add_argument("--panoptic", type=Path, help="with --json: its folder of PNG files")
    parser.add_argument("--output", type=Path, help="with --json: folder of the semantic maps")
    arguments = parser.parse_args(words)
    options = (arguments.workers, arguments.overwrite)
    if arguments.json:
        if not (arguments.panoptic and arguments.output):
            parser.error("--json needs --panoptic and --output")
        prepare(arguments.json, arguments.panoptic, arguments.output, *options)
        return
    folder = arguments.root / "coco"
    for split in arguments.splits:
        panoptic = folder / f"panoptic_{split}2017"
        unpacked = folder / "annotations" / panoptic.name  # where COCO's archive has them
        prepare(
            unpacked.with_suffix(".json"),
            unpacked if unpacked.is_dir() and not panoptic.is_dir() else panoptic,
            folder / f"panoptic_semseg_{split}2017",
            *options,
        )
