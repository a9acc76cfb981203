"""Draws what a trained model sees in pictures, videos and in front of a camera.

    python demo/demo.py --config-file F --input photo.jpg --output out --opts MODEL.WEIGHTS W
    python demo/demo.py --config-file F --input folder 'more/*.png' clip.mp4 --output out ...
    python demo/demo.py --config-file F --webcam --output out --opts MODEL.WEIGHTS W
    python demo/demo.py --backend onnx --model exported.onnx --input photo.jpg --output out

`--config-file` is a path or a name below `configs`, as coco/instance/maskdino_R50. A file that
cannot be read, or only in part, is reported, and the others go on; the exit status is then 1. Of a
video, frames that cannot be decoded are drawn like the one before, so that it keeps its length.
Ctrl-C ends a video early, in a file that can be played, with the exit status 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from damage import DamageCheck
from overlap import Overlap
from maskdino.inference.sources import find_inputs, is_video, output_paths, unused
from tqdm import tqdm
from maskdino.inference.tracks import Tracks
from maskdino.inference.video import CODEC, LiveWriter, VideoError, VideoReader, VideoWriter, ranges

from maskdino.export.onnx import onnx_predictor
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.visualization.images import ImageError, load_image
from maskdino.visualization.results import ImageResult


@dataclass
class Report:
    """How many files were drawn, and what was wrong with those that were not, or in part."""

    drawn: int = 0
    failures: list[str] = field(default_factory=list)


TASKS = ("panoptic", "instance", "semantic")  # the first that the model does is drawn
INTERRUPTED = 130  # exit status after Ctrl-C


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="path or name")
    parser.add_argument("--backend", choices=("torch", "onnx"), default="torch")
    parser.add_argument(
        "--model", type=Path, metavar="FILE", help="of tools/export_model.py, for --backend onnx"
    )
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="files, folders, 'patterns'"
    )
    parser.add_argument("--webcam", nargs="?", type=int, const=0, metavar="N", help="camera N (0)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--task", choices=TASKS, help="default: the first that the model does")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, metavar="T")
    parser.add_argument("--max-detections", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="shorter edge for the network")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: the config's")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--codec", default=CODEC, help="of written videos, four letters")
    parser.add_argument("--json", action="store_true", help="also write results as JSON")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="keys and values, at the end"
    )
    args = parser.parse_args(words)
    if args.webcam is not None and args.webcam < 0:
        parser.error(f"--webcam {args.webcam}: cameras are numbered from 0")
    if bool(args.input) == (args.webcam is not None):
        parser.error("give either --input or --webcam")
    if args.backend == "torch" and (args.config_file is None or args.model is not None):
        parser.error("--backend torch needs --config-file, and takes no --model")
    if args.backend == "onnx" and (args.model is None or args.config_file or args.opts):
        parser.error("--backend onnx needs --model, which holds the configuration: nothing else")
    return args


def build_predictor(args: argparse.Namespace) -> MaskDINOPredictor:
    """The model, doing the one task that is drawn."""
    common = {
        "device": args.device,
        "confidence_threshold": args.confidence_threshold,
        "tasks": None if args.task is None else (args.task,),
        "size": args.size,
        "max_detections": args.max_detections,
        "batch_size": args.batch_size,
    }
    if args.backend == "onnx":
        predictor = onnx_predictor(args.model, **common)
    else:
        predictor = MaskDINOPredictor.from_config(args.config_file, opts=args.opts, **common)
    task = next(task for task in TASKS if task in predictor.options.tasks)
    predictor.options = replace(predictor.options, tasks=(task,))
    return predictor


def run_pictures(
    predictor: MaskDINOPredictor, outputs: dict[Path, Path], report: Report, *, with_json: bool
) -> None:
    """Draws pictures.

    Args:
        predictor: the model.
        outputs: where the drawing of each picture goes.
        report: takes a message for each picture that could not be read.
        with_json: also write a JSON file beside each drawing.
    """
    bar = tqdm(total=len(outputs), unit="picture", desc="pictures")

    def read() -> Iterator[tuple[Path, np.ndarray]]:
        for path in outputs:
            try:
                image = load_image(path)
            except ImageError as error:
                report.failures.append(str(error))
                bar.update()
            else:
                yield path, image

    def work(batch: list[tuple[Path, np.ndarray]]) -> Iterator[ImageResult]:
        results = predictor([image for _, image in batch])
        for (path, _), result in zip(batch, results, strict=True):
            yield replace(result, name=str(path))

    def write(result: ImageResult) -> None:
        target = outputs[Path(result.name)]
        result.save(target)
        if with_json:
            result.save(target.with_name(f"{target.name}.json"))
        report.drawn += 1
        bar.update()

    with closing(bar):
        Overlap(read(), work, write, batch_size=predictor.options.batch_size).run()


def draw_tracked(result: ImageResult, tracks: Tracks) -> np.ndarray:
    """Draws a frame; objects keep the colours that they had in the frames before."""
    task = result.tasks[0]
    if task == "semantic":
        return result.draw(task)
    boxes, labels = (
        (result.boxes, result.class_ids) if task == "instance" else result.segment_boxes()
    )
    return result.draw(task, colors=tracks.update(boxes, labels))


def run_frames(
    predictor: MaskDINOPredictor,
    reader: VideoReader,
    write: Callable[[np.ndarray], None],
) -> None:
    """Draws frame by frame; a broken frame shows the drawing of the one before it.

    Broken frames at the beginning show the first one that is whole.
    """
    tracks, last, owed = Tracks(), None, 0
    bar = tqdm(total=reader.frames, unit="frame", desc=Path(reader.name).name)

    def work(batch: list[np.ndarray | None]) -> Iterator[ImageResult | None]:
        results = iter(predictor([frame for frame in batch if frame is not None]))
        for frame in batch:
            yield None if frame is None else next(results)

    def write_drawing(result: ImageResult | None) -> None:
        nonlocal last, owed
        last = last if result is None else draw_tracked(result, tracks)
        owed += 1
        while last is not None and owed > 0:
            write(last)
            owed -= 1
        bar.update()

    with closing(bar):
        Overlap(reader, work, write_drawing, batch_size=predictor.options.batch_size).run()


def damage_of(check: DamageCheck, reader: VideoReader) -> str:
    """Which frames were decoded, but not as they should be; "" if none was."""
    try:
        damaged = sorted(set(check.frames()) - set(reader.broken))
    except RuntimeError as error:
        return str(error)
    if not damaged:
        return ""
    return f"its decoder found damage near frame {ranges(damaged)}; what it made of it is drawn"


def run_video(predictor: MaskDINOPredictor, path: Path, target: Path, codec: str) -> str:
    """Draws a video; returns what was wrong with its frames, or "".

    Raises:
        VideoError: it cannot be read or written at all.
    """
    reader = VideoReader.of_file(path)
    with DamageCheck(path) as check:
        with closing(VideoWriter(target, reader.rate, codec)) as writer:
            run_frames(predictor, reader, writer.write)
        if writer.frames == 0:
            raise VideoError(f"cannot read video {path}: none of its frames can be decoded")
        problems = [reader.problem(), damage_of(check, reader)]
    problem = "; ".join(filter(None, problems))
    return f"video {path}: {problem}" if problem else ""


def run_camera(predictor: MaskDINOPredictor, number: int, folder: Path, codec: str) -> None:
    """Draws what a camera sees, until Ctrl-C, or until it gives no more.

    Raises:
        VideoError: there is no such camera, or it ended.
    """
    target = unused(folder / f"camera_{number}.mp4")
    reader = VideoReader.of_camera(number)
    print(f"camera {number}: Ctrl-C ends, and leaves {target}", file=sys.stderr)
    with closing(VideoWriter(target, reader.rate, codec)) as writer:
        try:
            run_frames(predictor, reader, LiveWriter(writer).write)
        except VideoError as error:
            seen = f"; what it saw before is in {target}" if writer.frames else ""
            raise VideoError(f"{error}{seen}") from error


def run_files(
    predictor: MaskDINOPredictor, outputs: dict[Path, Path], args: argparse.Namespace
) -> Report:
    """Draws pictures, then videos."""
    report = Report()
    pictures = {path: target for path, target in outputs.items() if not is_video(path)}
    if pictures:
        run_pictures(predictor, pictures, report, with_json=args.json)
    for path, target in outputs.items():
        if is_video(path):
            try:
                problem = run_video(predictor, path, target, args.codec)
            except VideoError as error:
                report.failures.append(str(error))
            else:
                report.drawn += 1
                report.failures += [problem] * bool(problem)
    return report


def main(words: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = parse_arguments(words)
    try:
        outputs = output_paths(find_inputs(args.input), args.output, with_json=args.json)
        predictor = build_predictor(args)
        args.output.mkdir(parents=True, exist_ok=True)
        if args.webcam is not None:
            run_camera(predictor, args.webcam, args.output, args.codec)
            return 0
        report = run_files(predictor, outputs, args)
    except KeyboardInterrupt:
        print(f"\nstopped; what was drawn so far is in {args.output}", file=sys.stderr)
        return INTERRUPTED
    except (KeyError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    print(f"{report.drawn} of {len(outputs)} files drawn, in {args.output}")
    for failure in report.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
