"""Draws what a trained model sees in images, in videos, and in front of a camera.

A file that cannot be read is named, and the others go on; the exit status is then 1. Ctrl-C ends a
video or a camera in a file that can be played. demo/README.md has a command for each use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from maskdino.cli.common import INTERRUPTED, CommandError, errors_in_one_line, make_parser
from maskdino.export.onnx import onnx_predictor
from maskdino.inference.labels import ClassThresholds, CocoLabels
from maskdino.inference.outputs import Wanted
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sliced import check_slices
from maskdino.inference.sources import find_inputs, is_video, output_paths, unused
from maskdino.inference.tiles import TiledImage
from maskdino.inference.tracks import Tracks
from maskdino.inference.video import (
    Camera,
    TimedImage,
    VideoError,
    VideoReader,
    VideoWriter,
    require_pyav,
)
from maskdino.integration.extensions import add_import_option
from maskdino.visualization.images import ImageError
from maskdino.visualization.results import ImageResult

Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS = ("panoptic", "instance", "semantic")  # the first that the model does is drawn


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    parser.usage = "%(prog)s --config-file FILE --input PATH ... --output DIR [options]"
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="a configuration, its name, or a model's folder")
    add("--weights", metavar="FILE", help="checkpoint, or 'released' (MODEL.WEIGHTS)")
    add("--backend", choices=("torch", "onnx"), default="torch", help="what computes (torch)")
    add("--model", type=Path, metavar="FILE", help="exported network, for --backend onnx")
    add("--input", nargs="+", default=[], metavar="PATH", help="files, folders, 'patterns'")
    add("--webcam", nargs="?", type=int, const=0, metavar="N", help="in place of --input (0)")
    add("--output", type=Path, metavar="DIR", help="folder of the drawings")
    add("--json", action="store_true", help="write the results of images as JSON, too")
    add("--coco", type=Path, metavar="FILE", help="write the objects of all images as one dataset")
    add("--polygons", type=float, metavar="T", help="in --coco, within T pixels (run lengths)")
    add("--class-thresholds", metavar="A=T,B=T", help="least scores of single classes")
    add("--slice", type=int, metavar="PIXELS", help="predict images in slices of this size")
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
    if args.backend == "onnx" and (
        args.model is None or args.config_file or args.weights or args.opts
    ):
        parser.error("--backend onnx needs --model, which holds the configuration: nothing else")
    return args


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that do not fit together."""
    if args.output is None and args.coco is None:
        parser.error("give --output, --coco, or both")
    if args.output is None and (args.json or args.webcam is not None):
        parser.error("--json and --webcam need --output")
    if args.polygons is not None and args.coco is None:
        parser.error("--polygons is of --coco")
    if (args.coco or args.class_thresholds) and args.task not in (None, "instance"):
        parser.error(f"--coco and --class-thresholds are of objects, not of --task {args.task}")
    if (args.coco or args.slice) and args.webcam is not None:
        parser.error("--coco and --slice are of images, not of --webcam")


def build_predictor(args: argparse.Namespace) -> MaskDINOPredictor:
    """The model, doing the one task that is drawn."""
    common = {
        "device": args.device,
        "confidence_threshold": ClassThresholds(args.class_thresholds or "").least(
            args.confidence_threshold
        ),
        "tasks": None if args.task is None else (args.task,),
        "size": args.size,
        "max_detections": args.max_detections,
        "batch_size": args.batch_size,
    }
    if args.backend == "onnx":
        predictor = onnx_predictor(args.model, **common)
    elif Path(args.config_file).is_dir() and args.weights is None:
        predictor = MaskDINOPredictor.from_pretrained(args.config_file, opts=args.opts, **common)
    else:
        predictor = MaskDINOPredictor.from_config(
            args.config_file, args.weights, opts=args.opts, **common
        )
    able = predictor.options.tasks
    if args.coco or args.class_thresholds:
        if "instance" not in able:
            raise CommandError(f"--coco and --class-thresholds: this model does {able}, no objects")
        able = ("instance",)
    return predictor.with_options(tasks=(next(task for task in TASKS if task in able),))


def run_overlapped(
    items: Iterable[Item],
    work: Callable[[list[Item]], list[Result]],
    write: Callable[[Result], None],
    batch_size: int,
) -> None:
    """Works on batches here, while one thread reads the next batch and another writes the last.

    Order is kept. On an error or Ctrl-C, what was worked on is still written, and both threads have
    ended, so that a caller can close its files.

    Args:
        items: read in a thread of its own.
        work: turns a batch into results.
        write: takes one result, in a thread of its own.
        batch_size: items that are worked on together; the last batch may be smaller.
    """
    source = iter(items)

    def read_batch() -> list[Item]:
        return list(islice(source, batch_size))

    def write_all(results: list[Result]) -> None:
        for result in results:
            write(result)

    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        following = reading.submit(read_batch)
        written: Future[None] = writing.submit(write_all, [])
        try:
            while batch := following.result():
                following = reading.submit(read_batch)
                results = work(batch)
                written.result()
                written = writing.submit(write_all, results)
        finally:
            written.result()


def draw_images(
    predictor: MaskDINOPredictor, outputs: dict[Path, Path | None], wanted: Wanted
) -> list[str]:
    """Draws images.

    Args:
        predictor: the model.
        outputs: where the drawing of each image goes; None: it is not drawn.
        wanted: what else is made of them.

    Returns:
        A message for each image that could not be read or drawn.
    """
    failures: list[str] = []

    def read() -> Iterator[tuple[Path, np.ndarray | TiledImage]]:
        for path in outputs:
            try:
                yield path, wanted.read(path)
            except ImageError as error:
                failures.append(str(error))
                bar.update()

    def write(result: ImageResult) -> None:
        problem = wanted.write(result, outputs[Path(result.name)])
        failures.extend([problem] if problem else [])
        bar.update()

    at_once = predictor.options.batch_size if wanted.slices is None else 1
    with tqdm(total=len(outputs), unit="image", desc="images") as bar:
        run_overlapped(read(), partial(wanted.predict, predictor), write, at_once)
    return failures


def draw_tracked(result: ImageResult, tracks: Tracks) -> np.ndarray:
    """Draws a frame; objects keep the colors that they had in the frames before."""
    if result.label_map is not None:
        return result.draw()
    if result.boxes is not None and result.class_ids is not None:
        boxes, labels = result.boxes, result.class_ids
    else:
        boxes, labels = result.segment_boxes()
    return result.draw(colors=tracks.update(boxes, labels))


def draw_frames(
    predictor: MaskDINOPredictor,
    frames: VideoReader | Camera,
    writer: VideoWriter,
) -> None:
    """Draws frame by frame, with the times of the frames."""
    tracks = Tracks()

    def work(batch: list[TimedImage]) -> list[tuple[ImageResult, float]]:
        results = predictor.stream(image for image, _ in batch)
        return [(result, seconds) for result, (_, seconds) in zip(results, batch, strict=True)]

    def write(timed: tuple[ImageResult, float]) -> None:
        result, seconds = timed
        writer.write(draw_tracked(result, tracks), seconds)
        bar.update()

    with tqdm(total=frames.frames, unit="frame", desc=frames.name) as bar:
        run_overlapped(frames, work, write, predictor.options.batch_size)


def draw_video(predictor: MaskDINOPredictor, path: Path, target: Path) -> str:
    """Draws a video; returns what was wrong with its frames, or "".

    Raises:
        VideoError: it cannot be read or written at all.
    """
    with (
        closing(VideoReader(path)) as reader,
        closing(VideoWriter(target, reader.rate)) as writer,
    ):
        draw_frames(predictor, reader, writer)
    if writer.frames == 0:
        raise VideoError(f"cannot read video {path}: none of its frames can be decoded")
    if reader.skipped == 0:
        return ""
    total = writer.frames + reader.skipped
    return f"video {path}: {reader.skipped} of {total} frames are damaged or missing, and skipped"


def draw_camera(predictor: MaskDINOPredictor, number: int, folder: Path) -> None:
    """Draws what a camera sees, until Ctrl-C, or until it gives no more.

    Raises:
        VideoError: there is no such camera, or it ended.
    """
    target = unused(folder / f"camera_{number}.mp4", list(folder.glob("camera_*.mp4")))
    writer = VideoWriter(target)
    with closing(Camera(number)) as camera:
        print(f"camera {number}: Ctrl-C ends, and leaves {target}", file=sys.stderr)
        try:
            with closing(writer):
                draw_frames(predictor, camera, writer)
        except VideoError as error:
            seen = f"; what it saw before is in {target}" if target.exists() else ""
            raise VideoError(f"{error}{seen}") from error


def draw_files(
    predictor: MaskDINOPredictor, outputs: dict[Path, Path | None], wanted: Wanted
) -> tuple[int, list[str]]:
    """Draws images, then videos.

    Returns:
        How many files were drawn, and a message for each that was not, or only in part.
    """
    videos = {path: target for path, target in outputs.items() if target and is_video(path)}
    images = {path: target for path, target in outputs.items() if path not in videos}
    failures = draw_images(predictor, images, wanted) if images else []
    drawn = len(images) - len(failures)
    for path, target in videos.items():
        try:
            problem = draw_video(predictor, path, target)
        except VideoError as error:
            failures.append(str(error))
        else:
            drawn += 1
            failures += [problem] if problem else []
    return drawn, failures


def _plan_outputs(args: argparse.Namespace) -> dict[Path, Path | None]:
    """Where the drawing of each input goes; refuses files that do not fit the options."""
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise CommandError(f"--output {args.output} is a file: give a folder")
    if args.coco is not None and args.coco.is_dir():
        raise CommandError(f"--coco {args.coco} is a folder: give a file")
    if args.slice is not None:
        check_slices(args.slice, args.overlap)
    inputs = find_inputs(args.input)
    videos = [path for path in inputs if is_video(path)]
    if videos and (args.coco or args.slice or args.class_thresholds):
        raise CommandError(f"--coco, --class-thresholds and --slice are of images: {videos[0]}")
    if args.webcam is not None or videos:
        require_pyav()
    if args.output is None:
        return dict.fromkeys(inputs)
    return {**output_paths(inputs, args.output, with_json=args.json)}


def _write_labels(labels: CocoLabels | None, path: Path) -> None:
    """Writes the dataset, and says what is in it."""
    if labels is not None:
        labels.write(path)
        numbers = f"{len(labels.annotations)} objects of {len(labels.images)} images"
        print(f"{numbers} in {path}; its images are below {labels.root}")


@errors_in_one_line()
def main(words: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = parse_arguments(words)
    outputs = _plan_outputs(args)
    thresholds = ClassThresholds(args.class_thresholds or "")
    predictor = build_predictor(args)
    thresholds.check(predictor.categories)
    labels = None
    if args.coco is not None:
        labels = CocoLabels(predictor.categories, list(outputs), tolerance=args.polygons)
    slices = None if args.slice is None else (args.slice, args.overlap)
    wanted = Wanted(args.json, labels, thresholds, args.confidence_threshold, slices)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
    try:
        if args.webcam is not None:
            draw_camera(predictor, args.webcam, args.output)
            return 0
        drawn, failures = draw_files(predictor, outputs, wanted)
    except KeyboardInterrupt:
        place = f"; what was drawn so far is in {args.output}" if args.output else ""
        print(f"\nstopped{place}", file=sys.stderr)
        _write_labels(labels, args.coco)
        return INTERRUPTED
    if args.output is not None:
        print(f"{drawn} of {len(outputs)} files drawn, in {args.output}")
    _write_labels(labels, args.coco)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
