"""Inference by stages: preprocessing, the network, results of each task."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.drawn import drawn_input, drawn_model
from benchmarks.operator import compare
from benchmarks.report import Report, load_peer
from benchmarks.timing import median_milliseconds
from maskdino.model import MaskDINO
from maskdino.system.precision import network_precision

NAME = "infer"
HELP = "inference: stages, tasks, batch, precision"
CONFIGS = "configs/coco/{}/maskdino_R50.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this family."""
    parser.add_argument("--tasks", nargs="+", default=["instance"], help="instance, panoptic")
    parser.add_argument("--config-file", help="in place of the R50 model of each task")
    parser.add_argument("--height", type=int, default=800, help="image height in pixels")
    parser.add_argument("--width", type=int, default=1067, help="image width in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images, each tried")
    parser.add_argument("--precision", nargs="+", default=["float32"], help="as TEST.PRECISION")
    parser.add_argument(
        "--peer",
        help="package.module:function that makes of our model a module which takes detectron2's "
        "batches and returns a list of dicts",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each stage")


def run(args: argparse.Namespace) -> Report:
    """Compare predictions, then the time of each stage; return a report."""
    rows = []
    for task in args.tasks:
        name = args.config_file or CONFIGS.format(task)
        model = drawn_model(name, args.device)[1].eval()
        for precision in args.precision:
            model.inference = replace(model.inference, precision=precision)
            for batch in args.batch:
                rows += _rows(model, f"{task}, {precision}, batch {batch}", batch, args)
    headings = ["case", "stage", "largest relative difference", "time"]
    about = (
        f"Random weights, images of {args.height} x {args.width}, {args.device}; medians of "
        f"{args.repeats} runs in turns. Differences are those of class logits and boxes from the "
        "network as it trains, in float32."
    )
    return Report(about, headings, rows)


def _rows(model: MaskDINO, case: str, batch: int, args: argparse.Namespace) -> list[list[str]]:
    inputs = [drawn_input(args.height, args.width) for _ in range(batch)]
    images = model.preprocess(inputs).tensor

    @torch.no_grad()
    def exact() -> list[Tensor]:
        predictions, _ = model.predict(images)
        return [predictions.class_logits, predictions.boxes]

    def plain() -> list[Tensor]:
        with network_precision(model.inference.precision, model.device):
            return exact()

    @torch.no_grad()
    def prepared() -> list[Tensor]:
        predictions, _ = model.predict_precisely(images)
        return [predictions.class_logits, predictions.boxes]

    @torch.no_grad()
    def results() -> list[dict]:
        return model(inputs)

    networks = {"network as it trains": plain, "prepared network": prepared}
    differences = compare({"exact": exact(), **{n: call() for n, call in networks.items()}})
    stages: dict[str, Callable[[], object]] = {
        "preprocessing": lambda: model.preprocess(inputs),
        **networks,
        "images to results": results,
    }
    if args.peer:
        peer = load_peer(args.peer)(model)
        stages[args.peer] = torch.no_grad()(lambda: peer(inputs))
    times = median_milliseconds(stages, args.repeats, args.device)
    return [
        [case, stage, differences.get(stage, ""), f"{time:.1f} ms"] for stage, time in times.items()
    ]
