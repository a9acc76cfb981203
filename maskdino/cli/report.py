"""Writes one HTML file about an evaluation: tables, curves, classes, best and worst images.

    maskdino evaluate --config-file F MODEL.WEIGHTS W OUTPUT_DIR DIR
    maskdino report --config-file F --output DIR/report.html --opts OUTPUT_DIR DIR

It reads what the evaluation left in OUTPUT_DIR/inference; no model is run. With --report, the
first command writes the same file itself. With --weights, the model is run for one thing more: the
loss of each image, whose largest are of wrong labels or hard images.
"""

import argparse
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode

from maskdino.checkpoint.loading import load_trained
from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.config import load_config
from maskdino.engine.evaluating import build_model
from maskdino.evaluation.image_losses import image_losses
from maskdino.evaluation.report import report_paths, write_report
from maskdino.integration.extensions import add_import_option
from maskdino.model import MaskDINO
from maskdino.model_zoo import find_config, read_config
from maskdino.system.devices import settle_device


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="path or name")
    add("--dataset", metavar="NAME", help="default: all of DATASETS.TEST")
    add("--output", type=Path, metavar="HTML", help="default: report.html in OUTPUT_DIR")
    add("--confidence-threshold", type=float, default=0.5, metavar="T")
    add("--num-images", type=int, default=3, metavar="N", help="drawn of each kind")
    add(
        "--weights",
        metavar="FILE",
        help="checkpoint or 'released': computes the loss of each image",
    )
    add_import_option(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="keys and values")
    args = parser.parse_args(words)
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold {args.confidence_threshold} must be in [0, 1]")
    if args.num_images < 0:
        parser.error(f"--num-images {args.num_images} must be 0 or more")
    return args


def find_paths(args: argparse.Namespace, cfg: CfgNode) -> dict[str, Path]:
    """The file of each dataset's report."""
    datasets = [args.dataset] if args.dataset else list(cfg.DATASETS.TEST)
    if not datasets:
        raise ValueError("DATASETS.TEST is empty: name a dataset with --dataset")
    if args.output is None:
        return report_paths(datasets, Path(cfg.OUTPUT_DIR))
    if len(datasets) != 1:
        raise ValueError(f"--output is one file; name one of {datasets} with --dataset")
    return {datasets[0]: args.output}


def build_trained(args: argparse.Namespace) -> tuple[CfgNode, MaskDINO]:
    """The model of --weights in evaluation mode, and its configuration."""
    cfg = settle_device(read_config(args.config_file, args.weights, args.opts, whole=True))
    model = build_model(cfg)
    if not isinstance(model, MaskDINO):
        raise CommandError(
            f"--weights: losses of images are Mask DINO's, not {type(model).__name__}'s"
        )
    load_trained(model, cfg)
    return cfg, model.eval()


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(words)
    cfg, losses_of = load_config(find_config(args.config_file), args.opts), None
    paths = find_paths(args, cfg)
    if args.weights is not None:
        losses_of = partial(image_losses, *build_trained(args))
    for dataset, path in paths.items():
        write_report(
            path,
            dataset,
            Path(cfg.OUTPUT_DIR),
            threshold=args.confidence_threshold,
            num_images=args.num_images,
            losses_of=losses_of,
        )
        print(f"the report is {path}")
