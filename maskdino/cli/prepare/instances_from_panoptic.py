r"""Makes COCO instances (boxes and masks of the things) from panoptic maps.

COCO, ADE20K and Cityscapes come with their own instances. This is for datasets in COCO's panoptic
format that have none: with them a panoptic model is also judged by its box AP and mask AP.

    maskdino prepare instances-from-panoptic --json panoptic_val.json \
        --panoptic panoptic_val --output instances_val.json
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from maskdino.cli.common import errors_in_one_line
from maskdino.cli.prepare import common
from maskdino.data.folders import inside
from maskdino.data.reading import ids_of_colors
from maskdino.system.words import counted


def convert(annotation: dict, panoptic: Path, things: frozenset[int]) -> list[dict]:
    """COCO annotations, without "id", of the things of one image."""
    source = Path(inside(panoptic, annotation["file_name"], panoptic))
    ids = ids_of_colors(common.read_pixels(source))
    segments = [x for x in annotation["segments_info"] if x["category_id"] in things]
    return [
        {
            "image_id": annotation["image_id"],
            "category_id": segment["category_id"],
            "iscrowd": segment.get("iscrowd", 0),
            **common.geometry_of(mask),
        }
        for segment, mask in common.masks_of_segments(segments, ids, source)
    ]


def prepare(json_file: Path, panoptic: Path, output: Path, workers: int, overwrite: bool) -> None:
    """Makes the instances of one annotation file."""
    content = common.read_annotations(json_file, "panoptic annotations")
    common.require(panoptic, "the PNG files of the panoptic annotations")
    if common.is_done(output, overwrite):
        return
    categories = [category for category in content["categories"] if category["isthing"]]
    things = frozenset(category["id"] for category in categories)
    work = partial(convert, panoptic=panoptic, things=things)
    found = common.run(work, content["annotations"], workers, str(output))
    flat = [instance for instances in found for instance in instances]
    annotations = [{"id": number, **instance} for number, instance in enumerate(flat, start=1)]
    result = {"images": content["images"], "categories": categories, "annotations": annotations}
    common.save_json(output, result)
    of = counted(len(categories), "category", "categories")
    print(f"{output}: {counted(len(annotations), 'instance')} of {of}")


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command; `words` stands in for its line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="panoptic annotations")
    parser.add_argument("--panoptic", type=Path, required=True, help="its folder of PNG files")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the instances")
    arguments = parser.parse_args(words)
    prepare(
        arguments.json,
        arguments.panoptic,
        arguments.output,
        arguments.workers,
        arguments.overwrite,
    )
