"""A huge image of real ones, predicted in slices, in a process of its own.

    python -m tests.inference.large_mosaic 20000 instance

prints the memory that the process held before and at most, and the size of the JSON file, in MiB,
as one line of JSON. In place of a network, bright spots are objects and levels of gray classes;
with --weights it is a network.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from scipy import ndimage

from maskdino.categories import Categories
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sliced import predict_sliced
from maskdino.inference.tiles import TiledImage
from maskdino.ops.runs import encode_at
from maskdino.visualization.results import ImageResult
from tests.memory import most_resident_mib, one_thread, resident_mib

NUCLEI = Path(__file__).resolve().parents[2] / "datasets" / "nuclei"
NAMES = ("nucleus", "dark", "gray", "bright")
CATEGORIES = Categories(NAMES, (True, False, False, False), (1, 2, 3, 4))
SMALLEST = 300  # pixels of an object
BRIGHT = 100  # level of gray above which it lies
# Scores (4, 256) of the classes by levels of gray.
SCORES = np.exp(-abs(np.arange(256) - [[-1000], [0], [75], [200]]) / 20).astype(np.float16)


def write_tiff(path: Path, side: int) -> None:
    """An uncompressed TIFF file of (side, side) pixels, a few rows of which are in memory."""
    images = [
        np.asarray(Image.open(NUCLEI / "val" / entry["file_name"]).convert("RGB"))[:256, :256]
        for entry in json.loads((NUCLEI / "annotations/instances_val.json").read_text())["images"]
    ]
    row_of_images = -(-side // 256)
    begin = 200  # of the pixels; the directory is before them
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, 160), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 2), (273, 4, 1, begin), (277, 3, 1, 3), (278, 4, 1, side)]
    entries += [(279, 4, 1, side * side * 3), (284, 3, 1, 1)]
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    header += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    header = header.ljust(160, b"\0") + struct.pack("<HHH", 8, 8, 8)
    with path.open("wb") as file:
        file.write(header.ljust(begin, b"\0"))
        for i, top in enumerate(range(0, side, 256)):
            chosen = [images[(i * row_of_images + j) % len(images)] for j in range(row_of_images)]
            strip = np.concatenate(chosen, 1)[: side - top, :side]
            file.write(strip.tobytes())


def see(tasks: Iterable[str], image: np.ndarray) -> ImageResult:
    """In place of a network."""
    gray = image[..., 1]
    spots, number = ndimage.label(gray > BRIGHT)
    rles, scores = [], []
    for i, place in enumerate(ndimage.find_objects(spots, number), start=1):
        mask = spots[place] == i
        if mask.sum() >= SMALLEST:
            rles.append(encode_at(mask, (place[0].start, place[1].start), gray.shape))
            scores.append(1 - 1 / mask.sum())
    parts: dict = {}
    if "instance" in tasks:
        boxes = np.array([mask_utils.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        parts = {"boxes": boxes, "scores": np.array(scores, np.float32), "rles": tuple(rles)}
        parts["class_ids"] = np.zeros(len(rles), np.int64)
    if "panoptic" in tasks:
        ids = SCORES.argmax(0).astype(np.int32)[gray]
        segments = [{"id": i, "category_id": i, "isthing": False} for i in (1, 2, 3)]
        for i, (rle, score) in enumerate(zip(rles, scores, strict=True), start=4):
            ids[mask_utils.decode(rle).astype(bool)] = i
            segments.append({"id": i, "category_id": 0, "isthing": True, "score": score})
        parts |= {"panoptic_ids": ids, "segments": tuple(segments)}
    if "semantic" in tasks:
        parts["class_scores"] = SCORES[:, gray]
        parts["label_map"] = SCORES.argmax(0).astype(np.uint8)[gray]
    return ImageResult("slice", image.shape[:2], CATEGORIES, source=image, **parts)


def seen(tasks: Iterable[str], images: Iterable[np.ndarray]) -> Iterator[ImageResult]:
    """Of many images."""
    return map(partial(see, tuple(tasks)), images)


def main() -> None:
    """Predicts, writes JSON and a drawing, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", type=int)
    parser.add_argument("task")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--weights")
    parser.add_argument("--config-file", default="configs/nuclei/instance/maskdino_tiny.yaml")
    args = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "mosaic.tif"
        write_tiff(path, args.side)
        predict = partial(seen, (args.task,))
        if args.weights:
            predict = MaskDINOPredictor.from_config(
                args.config_file, args.weights, device="cpu"
            ).stream
        before = resident_mib()
        image = TiledImage(path)
        assert not image.whole
        result = predict_sliced(
            predict, image, size=args.size, overlap=0.2, name="mosaic", progress=True
        )
        predicted = most_resident_mib()
        result.save(Path(name) / "drawn.png")
        drawn = most_resident_mib()
        file = result.save(Path(name) / "result.json").stat().st_size / 2**20
        with Image.open(Path(name) / "drawn.png") as drawing:
            width = drawing.width
    found = {"before": before, "predicted": predicted, "drawn": drawn, "most": most_resident_mib()}
    found["file"] = file
    found = {key: round(value) for key, value in found.items()}
    print(json.dumps({**found, "objects": len(result), "width": width}))  # noqa: T201


if __name__ == "__main__":
    main()
