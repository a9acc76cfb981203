"""The whole model with the compiled operator and without: encoder, network, results, training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.drawn import drawn_input, drawn_model
from benchmarks.operator import BACKENDS, compare, ratios, why_not
from benchmarks.report import Report
from benchmarks.timing import median_milliseconds, peak_mebibytes

NAME = "model"
HELP = "the whole model, with the compiled operator and without"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this family."""
    parser.add_argument("--config-file", default="configs/coco/instance/maskdino_R50.yaml")
    parser.add_argument("--height", type=int, default=800, help="image height in pixels")
    parser.add_argument("--width", type=int, default=1067, help="image width in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--train", action="store_true", help="also a training step")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="see `op`")


@patch.dict(os.environ)  # `_with` changes them
def run(args: argparse.Namespace) -> Report:
    """Compare predictions, then time and memory of each part; return a report."""
    model = drawn_model(args.config_file, args.device)[1].eval()
    inputs = [drawn_input(args.height, args.width)]
    backends = [backend for backend in BACKENDS if not why_not(backend, args.device)]

    @torch.no_grad()
    def encode() -> Tensor:
        return model.encoder(features).tokens

    @torch.no_grad()
    def network() -> Tensor:
        return model.predict(images)[0].class_logits

    @torch.no_grad()
    def results() -> list[dict]:
        return model(inputs)

    def train() -> None:
        model.train()
        sum(model(inputs).values()).backward()
        model.zero_grad()
        model.eval()

    with torch.no_grad():
        images = model.preprocess(inputs).tensor
        features = model.backbone(images)
    parts: dict[str, Callable[[], Any]] = {
        "encoder": encode,
        "network": network,
        "image to results": results,
    }
    if args.train:
        parts["training step"] = train
    peaks = {
        name: {b: peak_mebibytes(_with(b, part), args.device) for b in backends}
        for name, part in parts.items()
    }
    rows = [_row(name, part, peaks[name], args) for name, part in parts.items()]
    headings = ["part", *(f"{unit}, {b}" for unit in ("time", "peak memory") for b in backends)]
    differences = "; ".join(
        f"{name}: {_difference(parts[name], backends)}" for name in ("encoder", "network")
    )
    return Report(
        f"{args.config_file}, random weights, one image of {args.height} x {args.width}, "
        f"{args.device}; medians of {args.repeats} runs in turns, {args.clock} clock; in brackets "
        f"the gain over the first column.\n\nLargest relative difference from the {backends[0]} "
        f"operator: {differences}",
        headings,
        rows,
    )


def _with(backend: str, part: Callable[[], Any]) -> Callable[[], Any]:
    """The part with an operator that is chosen as a user chooses it."""

    def call() -> Any:
        os.environ["MASKDINO_OP"] = backend
        return part()

    return call


def _difference(part: Callable[[], Tensor], backends: Sequence[str]) -> str:
    """Of each form from the first."""
    found = compare({name: [_with(name, part)()] for name in backends})
    return ", ".join(f"{found[name]} {name}" for name in backends[1:]) or "nothing to compare"


def _row(
    name: str, part: Callable[[], object], peaks: dict[str, float], args: argparse.Namespace
) -> list[str]:
    calls = {backend: _with(backend, part) for backend in peaks}
    times = ratios(median_milliseconds(calls, args.repeats, args.device, args.clock), "ms")
    return [name, *times.values(), *ratios(peaks, "MiB").values()]
