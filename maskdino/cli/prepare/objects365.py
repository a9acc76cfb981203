"""Checks the images of Objects365 v2, and writes annotations of those that are there.

The dataset comes in parts, and some of its images are broken. From the downloaded annotations,
objects365/annotations/zhiyuan_objv2_{train,val}.json, and the images anywhere below
objects365/{train,val}/, this writes annotations/objects365_{train,val}.json with the readable
images and their boxes, and says what was left out. `--max-images` takes a random subset.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from PIL import Image

from maskdino.cli.common import errors_in_one_line
from maskdino.cli.prepare import common
from maskdino.system.words import counted

SPLITS = ("train", "val")


def is_readable(image: dict, folder: Path) -> bool:
    """Whether an image decodes to its end and has the size of its annotation."""
    try:
        with Image.open(folder / image["file_name"]) as picture:
            picture.load()
            return picture.size == (image["width"], image["height"])
    except (OSError, SyntaxError):
        return False


def prepare(folder: Path, split: str, max_images: int | None, workers: int) -> dict:
    """Annotations of the readable images of a split."""
    images_folder = common.require(folder / split, "the folder of the images")
    source = folder / "annotations" / f"zhiyuan_objv2_{split}.json"
    content = common.read_annotations(source, "the downloaded annotations")
    paths = {path.name: path for path in images_folder.rglob("*.jpg")}
    found = []
    for image in content["images"]:
        path = paths.get(Path(image["file_name"]).name)
        if path is not None:
            found.append({**image, "file_name": path.relative_to(images_folder).as_posix()})
    print(
        f"{split}: {len(content['images']) - len(found)} of {len(content['images'])} images missing"
    )
    if max_images is not None and max_images < len(found):
        found = random.Random(0).sample(found, max_images)
    readable = common.run(
        partial(is_readable, folder=images_folder), found, workers, f"{split}: reading"
    )
    images = [image for image, good in zip(found, readable, strict=True) if good]
    left = counted(len(found) - len(images), "image")
    print(f"{split}: {left} unreadable or of another size: left out")
    if not images:
        raise common.PreparationError(f"no image of {source} is in {images_folder}")
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command; `words` stands in for its line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS)
    parser.add_argument("--max-images", type=int, help="take a random subset of each split")
    arguments = parser.parse_args(words)
    folder = common.require(arguments.root / "objects365", "Objects365 v2")
    for split in arguments.splits:
        output = folder / "annotations" / f"objects365_{split}.json"
        if not common.is_done(output, arguments.overwrite):
            common.save_json(
                output, prepare(folder, split, arguments.max_images, arguments.workers)
            )
            print(f"{output} written")
