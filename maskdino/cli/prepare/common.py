"""What the preparations share: parallel work with a progress bar, reading and writing of files."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from scipy import ndimage

from maskdino.cli import common
from maskdino.cli.common import CommandError
from maskdino.data.images import BROKEN_IMAGE
from maskdino.data.reading import read_json
from maskdino.ops.rle import encode_mask, to_json
from maskdino.system.files import write_text
from maskdino.system.progress import Bar
from maskdino.system.words import counted

VOID = 255  # in maps of classes: no class


class PreparationError(CommandError):
    """Something is missing or wrong in the downloaded files."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser with the options that all preparations have."""
    parser = common.make_parser(description)
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    add = parser.add_argument
    add("--root", type=Path, default=Path(root), help="folder of the datasets [%(default)s]")
    add("--workers", type=int, default=os.cpu_count(), help="processes [%(default)s]")
    add("--overwrite", action="store_true", help="make files anew that are already there")
    return parser


def require(path: Path, what: str) -> Path:
    """Returns the path, or raises a PreparationError that says what should be there."""
    if not path.exists():
        raise PreparationError(f"{path} does not exist: it should be {what} (datasets/README.md)")
    return path


def read_annotations(path: Path, what: str) -> dict[str, Any]:
    """The content of a JSON file, which should be there (see `require`), or a DataError."""
    return read_json(str(require(path, what)))


def find_files(folder: Path, pattern: str, what: str) -> list[Path]:
    """Sorted paths below a folder; at least one, else a PreparationError."""
    paths = sorted(require(folder, what).glob(pattern))
    if not paths:
        raise PreparationError(f"{folder} holds no {pattern}: it should be {what}")
    return paths


def run(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, description: str
) -> list[Any]:
    """Applies a picklable function to items in several processes; results in the items' order."""
    if workers <= 1:
        return [function(item) for item in Bar(items, desc=description)]
    # Of Ctrl-C, this process alone speaks.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore) as pool:
        chunk = max(len(items) // (workers * 32), 1)
        results = pool.map(function, items, chunksize=chunk)
        try:
            return list(Bar(results, total=len(items), desc=description))
        except BaseException:
            # One broken file, or an interruption, ends it now; what was written is not redone.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_maps(
    make: Callable[[tuple[Path, Any]], None],
    sources: Mapping[Path, Any],
    workers: int,
    overwrite: bool,
    what: str,
) -> None:
    """Calls `make` for each path of a map with its source, unless it is there; says how many."""
    missing = [item for item in sources.items() if overwrite or not item[0].exists()]
    run(make, missing, workers, what)
    kept = len(sources) - len(missing)
    made = counted(len(missing), "map")
    print(f"{what}: {made} made, {kept} there before (--overwrite makes them anew)")


def save_json(path: Path, content: dict) -> None:
    """Writes JSON, whole or not at all."""
    write_text(path, json.dumps(content))


def is_done(path: Path, overwrite: bool) -> bool:
    """Whether a file is there and stays; says so."""
    done = path.exists() and not overwrite
    if done:
        print(f"{path} is there already: left as it is (--overwrite makes it anew)")
    return done


def read_pixels(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C), as the file has them; errors name the file."""
    try:
        return np.array(Image.open(path))
    except BROKEN_IMAGE as error:
        raise PreparationError(f"cannot read {path}: {error}") from error


def masks_of_segments(
    segments: Iterable[dict], ids: np.ndarray, source: Path
) -> Iterator[tuple[dict, np.ndarray]]:
    """Each segment with its mask (H, W) bool in the ids (H, W) of its file, which is not empty."""
    for segment in segments:
        mask = ids == segment["id"]
        if not mask.any():
            raise PreparationError(f"{source} has no pixel of its segment {segment['id']}")
        yield segment, mask


def geometry_of(mask: np.ndarray) -> dict:
    """Area, box and run lengths of a mask (H, W), as COCO has them."""
    rle = encode_mask(mask)
    area, box = int(mask_util.area(rle)), mask_util.toBbox(rle).tolist()
    return {"area": area, "bbox": box, "segmentation": to_json(rle)}


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's head."""
    with Image.open(path) as image:
        return image.height, image.width


def describe_segments(ids: np.ndarray, category_of_id: Callable[[int], int]) -> list[dict]:
    """Lists the segments of a map of ids, 0 left out, as "segments_info" does.

    Returns:
        "id", "category_id", "area", "bbox" (x, y, width, height) and "iscrowd" 0 of each.
    """
    numbers, inverse, areas = np.unique(ids, return_inverse=True, return_counts=True)
    places = ndimage.find_objects(inverse.reshape(ids.shape) + 1)
    return [
        {
            "id": int(number),
            "category_id": int(category_of_id(int(number))),
            "area": int(area),
            "bbox": [x.start, y.start, x.stop - x.start, y.stop - y.start],
            "iscrowd": 0,
        }
        for number, area, (y, x) in zip(numbers, areas, places, strict=True)
        if number
    ]
