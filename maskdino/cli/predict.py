"""Draws what a trained model sees in images, videos, streams and cameras (demo/README.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.cli.predict_videos import (
    WantedOfVideos,
    draw_camera,
    draw_stream,
    draw_video,
    run_overlapped,
    stream_targets,
)
from maskdino.export.engines import ENGINES
from maskdino.export.onnx import onnx_predictor
from maskdino.inference.label_images import LabelImages, PanopticLabels, SemanticLabels
from maskdino.inference.labels import ClassThresholds, CocoLabels
from maskdino.inference.outputs import Wanted
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sliced import check_slices
from maskdino.inference.sources import find_inputs, is_video, output_paths
from maskdino.inference.streams import is_stream
from maskdino.inference.tiles import TiledImage
from maskdino.inference.video import VideoError, require_pyav
from maskdino.inference.video_results import WEAK, VideoLabels
from maskdino.integration.extensions import add_import_option
from maskdino.system.allocator import keep_large_blocks
from maskdino.system.progress import Bar
from maskdino.system.signals import INTERRUPTED
from maskdino.system.words import counted
from maskdino.visualization.images import ImageError
from maskdino.visualization.results import ImageResult

TASKS = ("panoptic", "instance", "semantic")  # the first that the model does is drawn


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    parser.usage = "%(prog)s --config-file FILE --input PATH ... --output DIR [options]"
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="a configuration, its name, or a model's folder")
    add("--weights", metavar="FILE", help="checkpoint, or 'released' (MODEL.WEIGHTS)")
    add("--backend", choices=("torch", *ENGINES), default="torch", help="what computes (torch)")
    add("--model", type=Path, metavar="FILE", help="exported network, for the other backends")
    add(
        "--input", nargs="+", default=[], metavar="PATH", help="files, folders, 'patterns', rtsp://"
    )
    add("--webcam", nargs="?", type=int, const=0, metavar="N", help="in place of --input (0)")
    add("--output", type=Path, metavar="DIR", help="folder of the drawings")
    add("--json", action="store_true", help="write the results of images as JSON, too")
    add(
        "--coco",
        type=Path,
        metavar="FILE",
        help="one dataset of all images, or of --track; semantic: a folder",
    )
    add("--polygons", type=float, metavar="T", help="in --coco, within T pixels (run lengths)")
    add("--class-thresholds", metavar="A=T,B=T", help="least scores of single classes")
    add("--track", action="store_true", help="name the objects of videos, and write them as JSON")
    add("--every", type=int, default=1, metavar="N", help="look at one of N frames of videos (1)")
    add("--slice", type=int, metavar="PIXELS", help="predict in slices; 0: whole (TEST.SLICES)")
    add("--overlap", type=float, default=0.2, metavar="SHARE", help="of two slices (0.2)")
    add("--task", choices=TASKS, metavar="TASK", help=f"{', '.join(TASKS)} (the first it can)")
    add("--confidence-threshold", type=float, default=0.5, metavar="T", help="least score (0.5)")
    add("--max-detections", type=int, metavar="N", help="objects per image")
    add("--size", type=int, metavar="PIXELS", help="shorter edge at which the model reads images")
    add("--device", help="cpu, cuda, cuda:1, mps (default: MODEL.DEVICE)")
    add("--batch-size", type=int, default=1, metavar="N", help="images read at one time (1)")
    add_import_option(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="keys and values, at the end")
    args = parser.parse_args(words)
    _check_outputs(parser, args)
    if args.webcam is not None and args.webcam < 0:
        parser.error(f"--webcam {args.webcam}: cameras are numbered from 0")
    if bool(args.input) == (args.webcam is not None):
        parser.error("give either --input or --webcam")
    if args.backend == "torch" and (args.config_file is None or args.model is not None):
        parser.error("--backend torch needs --config-file, and takes no --model")
    if args.backend != "torch" and (
        args.model is None or args.config_file or args.weights or args.opts
    ):
        parser.error(
            f"--backend {args.backend} needs --model, which holds the configuration: nothing else"
        )
    return args


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that do not fit together."""
    if args.output is None and args.coco is None:
        parser.error("give --output, --coco, or both")
    if args.output is None and (args.json or args.webcam is not None):
        parser.error("--json and --webcam need --output")
    if args.polygons is not None and args.coco is None:
        parser.error("--polygons is of --coco")
    if (args.polygons is not None or args.class_thresholds) and args.task not in (None, "instance"):
        parser.error(f"--polygons, --class-thresholds are of objects, not of --task {args.task}")
    if args.slice and args.webcam is not None:
        parser.error("--slice is of images, not of --webcam")
    if args.track and args.task == "semantic":
        parser.error("--track is of objects, not of --task semantic")
    if args.max_detections is not None and args.max_detections < 1:
        parser.error(f"--max-detections {args.max_detections}: it must be 1 or more")
    if args.every < 1:
        parser.error(f"--every {args.every}: it must be 1 or more")


def build_predictor(args: argparse.Namespace) -> MaskDINOPredictor:
    """The model, doing the one task that is drawn."""
    threshold = args.confidence_threshold * (WEAK if args.track else 1)
    common = {
        "device": args.device,
        "confidence_threshold": ClassThresholds(args.class_thresholds or "").least(threshold),
        "tasks": None if args.task is None else (args.task,),
        "size": args.size,
        "max_detections": args.max_detections,
        "batch_size": args.batch_size,
    }
    if args.backend != "torch":
        predictor = onnx_predictor(args.model, engine=args.backend, **common)
    elif Path(args.config_file).is_dir() and args.weights is None:
        predictor = MaskDINOPredictor.from_pretrained(args.config_file, opts=args.opts, **common)
    else:
        predictor = MaskDINOPredictor.from_config(
            args.config_file, args.weights, opts=args.opts, **common
        )
    keep_large_blocks(predictor.is_thing.device)
    able = predictor.options.tasks
    of_objects = args.class_thresholds or args.polygons is not None
    if of_objects and "instance" not in able:
        raise CommandError(f"--polygons, --class-thresholds: this model does {able}, no objects")
    if (args.coco or of_objects) and "instance" in able:
        able = ("instance",)
    if args.track and not {"instance", "panoptic"} & set(able):
        raise CommandError(f"--track: this model does {able}, no objects")
    predictor = predictor.with_options(tasks=(next(task for task in TASKS if task in able),))
    if args.slice is not None:
        slices = (args.slice, args.overlap) if args.slice else None
        predictor = predictor.with_options(slices=slices)
    return predictor


def draw_images(
    predictor: MaskDINOPredictor, outputs: dict[Path, Path | None], wanted: Wanted
) -> list[str]:
    """Draws images, but where the place is None; returns a message for each that cannot be read."""
    failures: list[str] = []
    found = 0

    def read() -> Iterator[tuple[Path, np.ndarray | TiledImage]]:
        for path in outputs:
            try:
                yield path, wanted.read(path, in_parts)
            except ImageError as error:
                failures.append(str(error))
                bar.update()

    def write(result: ImageResult) -> None:
        nonlocal found
        found += 1 if result.scores is None else len(result.scores)
        wanted.write(result, outputs[Path(result.name)])
        bar.update()

    in_parts = predictor.options.slices is not None
    at_once = 1 if in_parts else predictor.options.batch_size
    with Bar(total=len(outputs), unit="image", desc="images") as bar:
        run_overlapped(read(), partial(wanted.predict, predictor), write, at_once)
    least = predictor.options.confidence_threshold
    if not found and len(failures) < len(outputs) and "instance" in predictor.options.tasks:
        print(
            f"no object has a score of {least:g} or more: --confidence-threshold {least / 2:g} "
            "shows less certain ones"
        )
    return failures


@logging_redirect_tqdm()  # what is said does not stand behind a bar
def draw_files(
    predictor: MaskDINOPredictor,
    outputs: dict[Path, Path | None],
    streams: dict[str, Path],
    wanted: Wanted,
    of_videos: WantedOfVideos,
) -> tuple[int, list[str]]:
    """Draws images, then videos, then streams; returns how many, and what was wrong with others."""
    videos = {path: target for path, target in outputs.items() if target and is_video(path)}
    images = {path: target for path, target in outputs.items() if path not in videos}
    failures = draw_images(predictor, images, wanted) if images else []
    drawn = len(images) - len(failures)
    for path, target in videos.items():
        try:
            problem = draw_video(predictor, path, target, of_videos)
        except VideoError as error:
            failures.append(str(error))
        else:
            drawn += 1
            failures += [problem] if problem else []
    for address, target in streams.items():
        try:
            draw_stream(predictor, address, target, of_videos)
            drawn += 1
        except VideoError as error:
            failures.append(str(error))
    return drawn, failures


def _plan_outputs(args: argparse.Namespace) -> tuple[dict[Path, Path | None], dict[str, Path]]:
    """Where the drawing of each file and stream goes; refuses what does not fit the options."""
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise CommandError(f"--output {args.output} is a file: give a folder")
    if args.slice:
        check_slices(args.slice, args.overlap)
    addresses = [word for word in args.input if is_stream(word)]
    inputs = find_inputs(word for word in args.input if not is_stream(word))
    moving = [*(str(path) for path in inputs if is_video(path)), *addresses]
    if args.webcam is not None:
        moving.append(f"camera {args.webcam}")
    if moving:
        _check_videos(args, len(moving) < len(inputs) + len(addresses), moving[0])
        require_pyav()
    elif args.track or args.every > 1:
        raise CommandError("--track and --every are of videos, streams and cameras")
    if args.output is None:
        return dict.fromkeys(inputs), {}
    outputs = output_paths(inputs, args.output, with_json=args.json, with_tracks=args.track)
    return {**outputs}, stream_targets(addresses, args.output)


def _check_videos(args: argparse.Namespace, beside_images: bool, first: str) -> None:
    """Refuses options that videos do not have."""
    if args.slice or args.class_thresholds or args.polygons is not None:
        raise CommandError(f"--class-thresholds, --polygons and --slice are of images: {first}")
    if args.coco and (beside_images or not args.track):
        raise CommandError(f"--coco of videos needs --track, and no images beside them: {first}")
    if args.output is None:
        raise CommandError(f"videos need --output: {first}")


def _labels(
    args: argparse.Namespace, predictor: MaskDINOPredictor, images: list[Path]
) -> CocoLabels | PanopticLabels | SemanticLabels | None:
    """Where results of images are collected."""
    if args.coco is None or args.track:
        return None
    if predictor.options.tasks == ("semantic",):
        if args.coco.is_file() or args.coco.suffix == ".json":
            raise CommandError(f"--coco {args.coco} is a file: label images need a folder")
        return SemanticLabels(predictor.categories, images, args.coco)
    if predictor.options.tasks == ("panoptic",):
        if not args.coco.suffix:
            raise CommandError(f"--coco {args.coco}: give it a suffix, as labels.json")
        return PanopticLabels(predictor.categories, images, args.coco)
    return CocoLabels(predictor.categories, images, tolerance=args.polygons)


def _write_labels(
    labels: CocoLabels | PanopticLabels | SemanticLabels | VideoLabels | None, path: Path
) -> None:
    """Writes the dataset, and says what is in it."""
    if labels is None:
        return
    labels.write(path)
    if isinstance(labels, VideoLabels):
        objects, videos = len(labels.annotations), len(labels.videos)
        print(f"{counted(objects, 'object')} of {counted(videos, 'video')} in {path}")
    elif isinstance(labels, CocoLabels):
        print(f"{labels} in {path}; its images are below {labels.root}")
    else:
        print(labels)


@errors_in_one_line()
def main(words: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = parse_arguments(words)
    outputs, streams = _plan_outputs(args)
    thresholds = ClassThresholds(args.class_thresholds or "")
    predictor = build_predictor(args)
    thresholds.check(predictor.categories)
    if args.coco and args.coco.is_dir() and predictor.options.tasks != ("semantic",):
        raise CommandError(f"--coco {args.coco} is a folder: give a file")
    labels = _labels(args, predictor, list(outputs))
    label_images = labels.folder.resolve() if isinstance(labels, LabelImages) else None
    if args.output is not None and args.output.resolve() == label_images:
        raise CommandError(f"--output {args.output} is the folder of the label images")
    of_videos = VideoLabels(predictor.categories) if args.coco and args.track else None
    wanted = Wanted(args.json, labels, thresholds, args.confidence_threshold)
    moving = WantedOfVideos(args.track, args.confidence_threshold, args.every, of_videos)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    try:
        if args.webcam is not None:
            draw_camera(predictor, args.webcam, args.output, moving)
            return 0
        drawn, failures = draw_files(predictor, outputs, streams, wanted, moving)
    except KeyboardInterrupt:
        place = f"; what was drawn so far is in {args.output}" if args.output else ""
        print(f"\nstopped{place}", file=sys.stderr)
        return INTERRUPTED
    finally:
        _write_labels(labels or of_videos, args.coco)
    if args.output is not None:
        print(f"{drawn} of {counted(len(outputs) + len(streams), 'file')} drawn, in {args.output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0
