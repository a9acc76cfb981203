"""The training mapper: time of an image, by the form of its annotations."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import BoxMode
from PIL import Image

from benchmarks.report import Report, load_peer
from benchmarks.timing import median_milliseconds
from maskdino.config import load_config
from maskdino.data import build_train_mapper
from maskdino.data.mixing import build_mixing
from maskdino.data.stream import seed_everything
from maskdino.ops.rle import encode_segmentation

NAME = "data"
HELP = "the training mapper, for one image"
SEED = 3  # of the augmentation, the same for all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this family."""
    parser.add_argument("--config-file", default="configs/coco/instance/maskdino_R50.yaml")
    parser.add_argument("--height", type=int, default=480, help="image height in pixels")
    parser.add_argument("--width", type=int, default=640, help="image width in pixels")
    parser.add_argument("--objects", type=int, default=10, help="of the image")
    parser.add_argument("--corners", type=int, default=40, help="of each object's polygon")
    parser.add_argument(
        "--peer", help="package.module:function that makes of the configuration a mapper"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")


def run(args: argparse.Namespace) -> Report:
    """Compare the masks of all forms, then their time; return a report."""
    cfg = load_config(args.config_file, ["MODEL.WEIGHTS", ""])
    mapper = build_train_mapper(cfg)
    with tempfile.TemporaryDirectory() as folder:
        records = drawn_records(Path(folder) / "image.jpg", args)
        calls: dict[str, Callable[[], dict]] = {
            form: _call(mapper, record) for form, record in records.items()
        }
        for name in ("COPY_PASTE", "MOSAIC") if cfg.INPUT.LSJ.ENABLED else ():
            mixed = load_config(args.config_file, [f"INPUT.{name}.PROBABILITY", "1.0"])
            drawn = [records["polygons"]]  # the other images are the same
            mixing = build_mixing(mixed, mapper, drawn, torch.ones(1))
            calls[f"polygons, INPUT.{name}"] = _call(mixing, drawn[0])
        if args.peer:
            calls[args.peer] = _call(load_peer(args.peer)(cfg), records["polygons"])
        differences = _differences({name: call() for name, call in calls.items()})
        times = median_milliseconds(calls, args.repeats, "cpu")
    first = next(iter(times.values()))
    rows = [
        [name, differences[name], f"{time:.1f} ms ({first / time:.2f}x)"]
        for name, time in times.items()
    ]
    about = (
        f"{args.config_file}: an image of {args.height} x {args.width} with {args.objects} objects "
        f"of {args.corners} corners, one thread of data loading, medians of {args.repeats} calls "
        "in turns. Differences are the share of the objects' pixels that differ."
    )
    return Report(about, ["annotations", "objects, difference of masks", "time"], rows)


def drawn_records(path: Path, args: argparse.Namespace) -> dict[str, dict]:
    """The record of one image, whose objects are polygons or run lengths."""
    random = np.random.default_rng(0)
    size = (args.height, args.width)
    Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    angles = np.linspace(0, 2 * np.pi, args.corners, endpoint=False)
    polygons = []
    for _ in range(args.objects):
        radius = random.uniform(0.05, 0.2) * min(size) * random.uniform(0.8, 1.2, args.corners)
        center = random.uniform(0.25, 0.75, 2) * (args.width, args.height)
        polygons.append(center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))
    outlines = [[polygon.flatten().tolist()] for polygon in polygons]
    forms = {
        "polygons": outlines,
        "run lengths": [encode_segmentation(outline, size) for outline in outlines],
    }
    boxes = [np.concatenate([polygon.min(0), polygon.max(0)]).tolist() for polygon in polygons]
    return {
        form: {
            "file_name": str(path), "height": size[0], "width": size[1], "image_id": 1,
            "annotations": [
                {
                    "bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0,
                    "segmentation": segmentation,
                }
                for box, segmentation in zip(boxes, segmentations, strict=True)
            ],
        }
        for form, segmentations in forms.items()
    }  # fmt: skip


def _call(mapper: Callable[[dict], dict], record: dict) -> Callable[[], dict]:
    def call() -> dict:
        seed_everything(SEED)
        return mapper(record)

    return call


def _differences(found: dict[str, dict]) -> dict[str, str]:
    first = next(iter(found.values()))["instances"]
    texts = {}
    for name, mapped in found.items():
        ours = mapped["instances"]
        texts[name] = f"{len(ours)}"
        if len(ours) == len(first) and hasattr(getattr(ours, "gt_masks", None), "to_bool"):
            a, b = first.gt_masks.to_bool(), ours.gt_masks.to_bool()
            if a.shape == b.shape:
                area = torch.maximum(a.sum(), torch.ones(()))
                texts[name] += f", {((a ^ b).sum() / area).item():.1e}"
    return texts
