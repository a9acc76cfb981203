"""The part of `maskdino predict` that draws videos, streams and what a camera sees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sources import json_beside, unused
from maskdino.inference.streams import Stream, file_stem
from maskdino.inference.tracking import CERTAIN, Tracker
from maskdino.inference.video import Camera, VideoError, VideoReader, VideoWriter
from maskdino.inference.video_results import (
    IdentityFile,
    VideoLabels,
    draw_followed,
    named_counts,
)
from maskdino.system.progress import Bar
from maskdino.system.words import counted
from maskdino.visualization.results import ImageResult

Item = TypeVar("Item")
Result = TypeVar("Result")

BAR = "{desc}: {n_fmt}/{total_fmt} frames {bar} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
BAR_WITHOUT_END = "{desc}: {n_fmt} frames [{elapsed}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class WantedOfVideos:
    """What is made of videos besides drawings."""

    track: bool = False  # name identities, and write them to a JSON file beside each drawing
    threshold: float = 0.0  # score from which an object may begin a track
    every: int = 1  # of so many frames, one is looked at
    labels: VideoLabels | None = None  # where objects are collected, or None


def run_overlapped(
    items: Iterable[Item],
    work: Callable[[list[Item]], list[Result]],
    write: Callable[[Result], None],
    batch_size: int,
) -> None:
    """Works on batches here, while one thread reads the next batch and another writes the last.

    Order is kept; the last batch may be smaller. On an error or Ctrl-C, what was worked on is still
    written, and both threads have ended, so that a caller can close its files.
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


def draw_frames(
    predictor: MaskDINOPredictor,
    frames: VideoReader | Stream | Camera,
    writer: VideoWriter,
    wanted: WantedOfVideos,
) -> None:
    """Draws frame by frame, with the times of the frames; objects keep their colors."""
    tracker = Tracker(threshold=wanted.threshold)
    beside = json_beside(writer.path)
    file = IdentityFile(beside, frames.name, predictor.categories) if wanted.track else None
    size = (0, 0)
    if predictor.options.slices is not None:  # options of the command name none for videos
        edge = predictor.options.slices[0]
        print(
            f"{frames.name}: frames are predicted in slices of {edge} pixels, as TEST.SLICES of "
            "the configuration says; --slice 0 predicts them whole",
            file=sys.stderr,
        )

    def work(
        batch: list[tuple[int, tuple[np.ndarray, float]]],
    ) -> list[tuple[int, float, ImageResult]]:
        results = predictor.stream(image for _, (image, _) in batch)
        return [(i, seconds, x) for x, (i, (_, seconds)) in zip(results, batch, strict=True)]

    def write(found: tuple[int, float, ImageResult]) -> None:
        nonlocal size
        i, seconds, result = found
        seen, drawn = draw_followed(result, tracker, seconds, named=wanted.track)
        writer.write(drawn, seconds)
        size = result.size
        if file is not None:
            file.write(i, seconds, size, seen)
        if wanted.labels is not None:
            wanted.labels.add_frame(writer.path.stem, i, seen)
        bar.update()

    total = None if frames.frames is None else -(-frames.frames // wanted.every)
    form = BAR_WITHOUT_END if total is None else BAR
    chosen = islice(enumerate(frames), 0, None, wanted.every)
    try:
        with Bar(total=total, unit="frames", desc=frames.name, bar_format=form) as bar:
            run_overlapped(chosen, work, write, predictor.options.batch_size)
    finally:
        if file is not None:
            file.close(tracker)
        if wanted.labels is not None:
            wanted.labels.end_video(size)
    if wanted.track:
        counts = named_counts(tracker, predictor.categories)
        told = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
        print(f"{frames.name}: objects seen in {CERTAIN} frames or more: {told}")


def draw_video(
    predictor: MaskDINOPredictor, path: Path, target: Path, wanted: WantedOfVideos
) -> str:
    """Draws a video; returns what was wrong with its frames, or ""."""
    with (
        closing(VideoReader(path)) as reader,
        closing(VideoWriter(target, reader.rate / wanted.every)) as writer,
    ):
        draw_frames(predictor, reader, writer, wanted)
    if writer.frames == 0:
        raise VideoError(f"cannot read video {path}: none of its frames can be decoded")
    if reader.skipped == 0:
        return ""
    frames = counted(reader.decoded + reader.skipped, "frame")
    return f"video {path}: skipped {reader.skipped} of {frames}, damaged or missing"


def draw_stream(
    predictor: MaskDINOPredictor, address: str, target: Path, wanted: WantedOfVideos
) -> None:
    """Draws what an address shows, until its end, Ctrl-C, or until it cannot be opened again."""
    with closing(Stream(address)) as stream:
        if stream.frames is None:
            print(f"{stream.name}: Ctrl-C ends, and leaves {target}", file=sys.stderr)
        _draw_all_there_is(predictor, stream, target, stream.rate / wanted.every, wanted)
        if stream.reopened:
            times = counted(stream.reopened, "time")
            print(f"{stream.name}: broke off, and was opened again {times}")
        if stream.passed:
            late = counted(stream.passed, "image")
            print(f"{stream.name}: passed over {late} that came too late")


def draw_camera(
    predictor: MaskDINOPredictor, number: int, folder: Path, wanted: WantedOfVideos
) -> None:
    """Draws what a camera sees, until Ctrl-C, or until it gives no more."""
    target = unused(folder / f"camera_{number}.mp4", list(folder.glob("camera_*.mp4")))
    with closing(Camera(number)) as camera:
        print(f"camera {number}: Ctrl-C ends, and leaves {target}", file=sys.stderr)
        _draw_all_there_is(predictor, camera, target, None, wanted)


def _draw_all_there_is(
    predictor: MaskDINOPredictor,
    frames: Stream | Camera,
    target: Path,
    rate: float | None,
    wanted: WantedOfVideos,
) -> None:
    """Draws to the end; an error says where what was seen before is."""
    writer = VideoWriter(target) if rate is None else VideoWriter(target, rate)
    try:
        with closing(writer):
            draw_frames(predictor, frames, writer, wanted)
    except VideoError as error:
        seen = f"; what it saw before is in {target}" if target.exists() else ""
        raise VideoError(f"{error}{seen}") from error


def stream_targets(addresses: Iterable[str], folder: Path) -> dict[str, Path]:
    """Where the drawing of each stream goes: a name of its own, as that of a camera."""
    targets: dict[str, Path] = {}
    for address in addresses:
        stem = file_stem(address)
        there = [*folder.glob(f"{stem}*.mp4"), *targets.values()]
        targets[address] = unused(folder / f"{stem}.mp4", there)
    return targets
