"""An exported network in onnxruntime and OpenVINO, beside the model in PyTorch, image by image."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.timing import median_milliseconds
from maskdino.checkpoint.loading import load_trained
from maskdino.export.check import BOUND, compare
from maskdino.export.engines import ENGINES
from maskdino.export.objects import Agreement, objects_of
from maskdino.export.onnx import OnnxNetwork
from maskdino.export.trace import ExportableNetwork, ExportOptions
from maskdino.model import MaskDINO
from maskdino.visualization.images import fitting_size, load_image, network_image, network_size

NAME = "engines"
HELP = "exported networks: the time of each engine, and whether it sees the same objects"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this family."""
    add = parser.add_argument
    add("--models", nargs="+", type=Path, required=True, help="of maskdino export, one model's")
    add("--weights", required=True, help="checkpoint that was exported")
    add("--images", nargs="+", required=True, metavar="FILE")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--repeats", type=int, default=5, help="timed runs of each image and engine")


def run(args: argparse.Namespace) -> Report:
    """Compare the objects, then the times in turns; return a report."""
    threads = torch.get_num_threads()
    networks = {
        f"{engine}, {path.name}": OnnxNetwork(path, args.device, engine, threads)
        for path in args.models
        for engine in args.engines
    }
    first = next(iter(networks.values()))
    cfg = first.metadata.cfg()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = args.weights, args.device
    model = MaskDINO(cfg).eval()
    load_trained(model, cfg)
    images = []
    for path in args.images:
        image = load_image(path)
        own = image.shape[0], image.shape[1]
        size = network_size(own, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        size = size if first.canvas is None else fitting_size(own, first.canvas)
        images.append(first.batch([network_image(image, size, cfg.INPUT.FORMAT)]))
    exact = ExportableNetwork(model, ExportOptions(), traceable=False)

    @torch.no_grad()
    def pytorch() -> None:
        for batch in images:
            model.predict_precisely((batch.to(model.device) - model.pixel_mean) / model.pixel_std)

    rows = []
    contenders = {"PyTorch": pytorch}
    for name, network in networks.items():
        contenders[name] = partial(_all, network, images)
        rows.append([name, *_differences(model, exact, network, images)])
    times = median_milliseconds(contenders, args.repeats, args.device)
    each = {name: f"{time / len(images):.1f} ms" for name, time in times.items()}
    rows = [["PyTorch", "", ""], *rows]
    about = (
        f"{len(images)} images, one at a time; medians of {args.repeats} runs in turns, by image. "
        f"Class logits count as off by more than {BOUND:g} of the largest of the model in float32."
    )
    headings = ["engine, file", "objects", "class logits off", "time"]
    return Report(about, headings, [[*row, each[row[0]]] for row in rows])


def _all(network: OnnxNetwork, images: list[torch.Tensor]) -> None:
    for batch in images:
        network.engine.run({"images": batch})


@torch.no_grad()
def _differences(
    model: MaskDINO, exact: ExportableNetwork, network: OnnxNetwork, images: list[torch.Tensor]
) -> tuple[str, str]:
    agreement, beyond = Agreement(), 0.0
    for batch in images:
        expected = {name: value.cpu() for name, value in exact(batch.to(model.device)).items()}
        found = network.engine.run({"images": batch})
        seen = (objects_of(model, "predictions", [batch], side) for side in (expected, found))
        for pair in zip(*seen, strict=True):
            agreement = agreement.and_of(*pair)
        first, *_ = compare(expected, found, "predictions")
        beyond += first.share_beyond / len(images)
    return f"{agreement.same} of {agreement.expected}, {agreement.new} new", f"{beyond:.2%}"
