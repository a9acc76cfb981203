r"""Exports a trained model to ONNX, to torch.export, or to ONNX with TensorRT's plugin.

    maskdino export --config-file F --weights W --images photos/*.jpg --output maskdino.onnx
    ... --size 800 1344 --output fixed.onnx               # one canvas only, exported sooner
    ... --outputs instance --output instances.onnx        # with post-processing
    ... --sampling gather --output gather.onnx            # for engines that sample wrongly
    ... --sampling plugin --size 800 1344 --output tensorrt.onnx   # or --format tensorrt
    ... --precision float16 --output half.onnx            # half the size
    ... --format torch --output maskdino.pt2

The program is compared with the model in PyTorch on the given images before it is written; the
largest differences are printed. Nothing is written, and the exit status is 1, if more than 1 % of
the values of an output differ by more than 0.001 of its largest magnitude. (Rounding may turn over
single choices, as which of two equal queries comes first, or whether a pixel belongs to a mask; a
wrong program differs everywhere.) TensorRT's plugin runs only there: of that variant the traced
program is compared, and the graph is checked. With --sampling gather the graph is free of
GridSample, which some engines compute wrongly (docs/export.md). Of a float16 program the objects
count: 95 % of the model's (score 0.3 and more) must be seen, of the same class, at IoU 0.9 or more.

The batch size always varies, and so do height and width (multiples of 32) without --size.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch import Tensor

from maskdino.checkpoint.loading import load_trained
from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.export.check import (
    ALLOWED_SHARE,
    BOUND,
    Difference,
    ExportError,
    Program,
    compare,
    program_of_onnx,
    program_of_trace,
)
from maskdino.export.objects import LEAST_SCORE, LEAST_SHARE, Agreement, objects_of
from maskdino.export.onnx import METADATA_KEY, ExportedMetadata, batch_of
from maskdino.export.plugin import PLUGIN, PLUGIN_DOMAIN
from maskdino.export.trace import (
    MASK_SIZES,
    OUTPUTS,
    PRECISIONS,
    SAMPLINGS,
    ExportableNetwork,
    ExportOptions,
    size_unit,
    smallest_size,
    to_onnx,
    trace,
)
from maskdino.integration.extensions import add_import_option
from maskdino.model import MaskDINO
from maskdino.model_zoo import read_config
from maskdino.system.devices import pick_device
from maskdino.system.files import written_whole
from maskdino.system.progress import Bar
from maskdino.system.words import counted
from maskdino.visualization.images import fitting_size, load_image, network_image, network_size

FORMATS = ("onnx", "torch", "tensorrt")


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Says what is being done, which may take minutes, and then how long it took."""
    print(f"{name} ...", end=" ", flush=True)
    start = time.perf_counter()
    try:
        yield
    except Exception:
        print(flush=True)  # what is wrong has a line of its own
        raise
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def check(
    model: MaskDINO, options: ExportOptions, program: Program, batches: list[list[Tensor]]
) -> None:
    """Prints the largest differences between program and model; ExportError if too large."""
    exact = replace(options, precision="float32")
    network = ExportableNetwork(model, exact, traceable=False)
    worst: dict[str, Difference] = {}
    agreement = Agreement()
    for arguments in Bar(batches, desc="program against model", unit="batch"):
        with torch.no_grad():
            expected = {k: v.cpu() for k, v in network(*arguments).items()}
        found = program(arguments)
        if options.precision != "float32":
            seen = (objects_of(model, options.outputs, arguments, x) for x in (expected, found))
            for pair in zip(*seen, strict=True):
                agreement = agreement.and_of(*pair)
        for new in compare(expected, found, options.outputs):
            old = worst.get(new.name, new)
            worst[new.name] = Difference(
                new.name, max(old.largest, new.largest), max(old.share_beyond, new.share_beyond)
            )
    for difference in worst.values():
        print(f"  {difference}")
    if options.precision != "float32":
        _check_objects(agreement)
        return
    wrong = [d.name for d in worst.values() if d.share_beyond > ALLOWED_SHARE]
    if wrong:
        raise ExportError(
            f"{', '.join(wrong)}: more than {ALLOWED_SHARE:.0%} of the values differ by more than "
            f"{BOUND:g} of the largest; nothing is written"
        )


def _check_objects(agreement: Agreement) -> None:
    """Refuses a program in half precision that sees other objects, or none to compare."""
    print(f"  {agreement}")
    if not agreement.expected:
        raise ExportError(
            f"the model sees no object of score {LEAST_SCORE} in the images, so nothing shows that "
            "float16 is right: give images with objects; nothing is written"
        )
    if agreement.share < LEAST_SHARE:
        raise ExportError(
            f"in float16 {agreement}, fewer than {LEAST_SHARE:.0%}; export this model in float32; "
            "nothing is written"
        )


def image_batches(
    paths: Sequence[str], model: MaskDINO, options: ExportOptions, sizes: tuple[int, int], form: str
) -> list[list[Tensor]]:
    """Arguments of the program for each image, and for a batch of two different ones."""
    images = []
    for path in paths:
        image = load_image(path)
        own = (image.shape[0], image.shape[1])
        fitted = options.size and fitting_size(own, options.size)
        images.append(network_image(image, fitted or network_size(own, *sizes), form))
    groups = [[image] for image in images]
    groups.append([images[0], images[-1].flip(2)])
    return [_arguments(group, model, options) for group in groups]


def _arguments(images: list[Tensor], model: MaskDINO, options: ExportOptions) -> list[Tensor]:
    sizes = torch.tensor([image.shape[1:] for image in images])
    mean = model.pixel_mean.cpu()
    batch = batch_of(images, mean, options.size, size_unit(model), smallest_size(model))
    arguments = [batch, sizes] if options.needs_image_sizes else [batch]
    return [argument.to(model.device) for argument in arguments]


def check_graph(content: bytes, options: ExportOptions, layers: int) -> None:
    """Checks how the graph of an ONNX file samples: as its options say, or an ExportError.

    Without "grid-sample", not by GridSample; with "plugin", by a node of it for each of the layers.
    """
    if options.sampling == "grid-sample":
        return
    import onnx

    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    operators = Counter((node.domain, node.op_type) for node in nodes)
    plugins = [node for node in nodes if node.op_type == PLUGIN]
    alien = [f"{d}::{t}" for d, t in operators if d and (d, t) != (PLUGIN_DOMAIN, PLUGIN)]
    expected = layers if options.plugin else 0
    if len(plugins) != expected or alien or ("", "GridSample") in operators:
        raise ExportError(
            f"the graph has {len(plugins)} nodes {PLUGIN} instead of {expected}, the unknown "
            f"operators {alien} and {operators['', 'GridSample']} GridSample"
        )
    for node in plugins:
        if len(node.input) != 5 or len(node.output) != 1 or not all(node.input):
            raise ExportError(f"node {node.name} has the inputs {list(node.input)}, not five")
    if options.plugin:
        print(
            f"  {expected} nodes {PLUGIN_DOMAIN}::{PLUGIN}, each with 5 inputs; others are ONNX's"
        )
    else:
        print(f"  {operators['', 'Gather']} nodes Gather, none GridSample; all are ONNX's")


def export(
    model: MaskDINO, options: ExportOptions, form: str, opset: int, config: str
) -> tuple[torch.export.ExportedProgram, bytes | None]:
    """Traces and translates.

    Returns:
        The traced program, and the content of the ONNX file, or None with the form "torch".
    """
    with stage("tracing for {}".format("any size" if options.size is None else options.size)):
        traced = trace(ExportableNetwork(model, options))
    if form == "torch":
        return traced, None
    metadata = ExportedMetadata(
        config, options.outputs, options.mask_size, size_unit(model), smallest_size(model)
    )
    texts = {METADATA_KEY: metadata.to_json()}
    with stage("translating to ONNX"):
        return traced, to_onnx(traced, options, opset=opset, metadata=texts).SerializeToString()


def attention_layers(model: MaskDINO) -> int:
    """How often the tested part of the model computes deformable attention."""
    layers = model.inference.decoder_layer
    decoder = len(model.decoder.layers) if layers < 0 else layers
    return len(model.encoder.layers) + decoder


def check_packages(args: argparse.Namespace) -> None:
    """Asks for what the export needs (ExportError) before it is traced, which may take minutes."""
    needed = [] if args.format == "torch" else ["onnx", "onnxscript"]
    if needed and args.sampling != "plugin":
        needed.append("onnxruntime")  # compares the program with the model
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{', '.join(missing)}: not installed, and needed for --format {args.format} with "
            f"--sampling {args.sampling}: pip install 'maskdino[export]'"
        )


def check_output(path: Path, inputs: Sequence[str | os.PathLike]) -> None:
    """Makes the folder of a file that is written minutes later; refuses what cannot be written."""
    if path.is_dir():
        raise CommandError(f"--output {path} is a folder: give a file")
    if path.resolve() in (Path(name).resolve() for name in inputs):
        raise CommandError(f"--output {path} is an input: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"cannot write into {path.parent}: give another --output")


def run(args: argparse.Namespace) -> None:
    """Exports, checks and writes."""
    check_packages(args)
    cfg = read_config(args.config_file, args.weights, args.opts, whole=True)
    check_output(args.output, [args.config_file, cfg.MODEL.WEIGHTS, *args.images])
    cfg.MODEL.DEVICE = str(pick_device(args.device, cfg.MODEL.DEVICE))
    cfg.MODEL.MASK_DINO.TEST.PRECISION = "float32"  # in which programs are traced and compared
    model = build_model(cfg).eval()
    load_trained(model, cfg)
    cfg.MODEL.WEIGHTS = ""  # the file holds its weights
    options = ExportOptions(
        args.outputs, args.mask_size, args.size and tuple(args.size), args.sampling, args.precision
    )
    sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    batches = image_batches(args.images, model, options, sizes, cfg.INPUT.FORMAT)
    traced, content = export(model, options, args.format, args.opset, cfg.dump())
    with written_whole(args.output) as partial:
        if content is None:
            torch.export.save(traced, partial)
            with partial.open("rb") as file:  # by its name torch would not know the format
                program = program_of_trace(torch.export.load(file))
        else:
            partial.write_bytes(content)
            plugin = options.plugin
            program = program_of_trace(traced) if plugin else program_of_onnx(content, options)
        images = counted(len(args.images), "image")
        print(f"{images}, and a batch of two, program against model:", flush=True)
        check(model, options, program, batches)
        if content is not None:
            check_graph(content, options, attention_layers(model))
    print(f"wrote {args.output} ({args.output.stat().st_size / 2**20:.1f} MiB)")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="path or name")
    add("--weights", metavar="FILE", help="checkpoint, or 'released' (MODEL.WEIGHTS)")
    add("--output", required=True, type=Path, metavar="FILE")
    add("--images", required=True, nargs="+", metavar="FILE", help="for the check")
    add_import_option(parser)
    add("--format", choices=FORMATS, default="onnx", help="tensorrt: the plugin's")
    add(
        "--sampling",
        choices=SAMPLINGS,
        help="how attention reads the maps (grid-sample; with --format tensorrt: plugin)",
    )
    add("--precision", choices=PRECISIONS, default="float32", help="(float32)")
    add("--outputs", choices=OUTPUTS, default="predictions")
    add("--mask-size", choices=MASK_SIZES, default="full")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    add("--opset", type=int, default=18, help="version of ONNX's operators (18)")
    add("--device", help="on which the model is traced; default: the config's")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="keys and values, at the end")
    args = parser.parse_args(words)
    args.sampling = args.sampling or ("plugin" if args.format == "tensorrt" else "grid-sample")
    plugin = args.sampling == "plugin"
    if plugin and args.precision != "float32":
        parser.error("--precision float16 is not for the plugin: TensorRT chooses its precision")
    if args.format == ("torch" if plugin else "tensorrt"):
        parser.error(f"--format {args.format} and --sampling {args.sampling} exclude each other")
    return args


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(words)
    # Of the tracer's and the translator's own workings; what went wrong is raised.
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run(args)
