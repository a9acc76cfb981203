"""Trains Mask DINO on own data, in one command.

    maskdino train-custom --data FOLDER --output OUT
    maskdino train-custom --train-json A.json --train-images DIR --epochs 50 --output OUT
    maskdino train-custom --output OUT --resume

FOLDER holds images and labels: objects of COCO, Roboflow, YOLO, Pascal VOC, LabelMe or CVAT,
segments of COCO's panoptic format, or label images; its folders train and val are taken as such.
What follows from the data and this machine is printed, and is in OUT/config.yaml.
"""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

import torch

from maskdino.cli.common import errors_in_one_line, make_parser
from maskdino.cli.visualize import CONFIDENCE, draw_comparisons
from maskdino.config import load_config
from maskdino.custom import TASKS, Request, Run, plan_run, register_prepared, train_run
from maskdino.engine.launch import launch
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.integration.extensions import add_import_option
from maskdino.system.devices import configured_device

PREDICTED = 0.5  # least score of `maskdino predict`, and of reports
# Options of model and schedule that a plan is made of, and nothing later.
PLANNED = ("config_file", "weights", "boxes_only", "epochs", "minutes", "batch_size", "image_size")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="FOLDER", help="images and labels together")
    data.add_argument("--train-json", type=Path, metavar="FILE", help="or folder: annotations")
    data.add_argument("--train-images", type=Path, metavar="DIR", help="folder of their images")
    data.add_argument("--val-json", type=Path, metavar="FILE")
    data.add_argument("--val-images", type=Path, metavar="DIR")
    data.add_argument("--task", choices=TASKS, help="where the data teach more than one")
    data.add_argument("--classes", metavar="A,B,C", help="of label images: names, or their file")
    data.add_argument(
        "--skip-invalid", action="store_true", help="leave out wrong images and annotations"
    )
    model = parser.add_argument_group("model and schedule; by default they follow from the data")
    model.add_argument("--config-file", metavar="FILE", help="path, or name in the model zoo")
    model.add_argument(
        "--weights", metavar="W", help='to start from: file, URL, "released" or "none"'
    )
    model.add_argument("--boxes-only", action="store_true", help="do not learn masks")
    time = model.add_mutually_exclusive_group()
    time.add_argument("--epochs", type=_positive, metavar="N", help="passes over all images")
    time.add_argument("--minutes", type=_positive, metavar="N", help="as many epochs as they last")
    model.add_argument("--batch-size", type=_positive, metavar="N", help="images, of all GPUs")
    model.add_argument("--image-size", type=_positive, metavar="PIXELS", help="longest side")
    model.add_argument(
        "--early-stop",
        type=_positive,
        default=0,
        metavar="N",
        help="stop after N evaluations in a row without a better result",
    )
    add = parser.add_argument
    add("--num-gpus", type=_positive, default=1, metavar="N")
    add("--num-pictures", type=int, default=8, metavar="N")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--resume", action="store_true", help="go on with the run in --output")
    add_import_option(parser)
    add(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="have the last word: SOLVER.BASE_LR 0.0002",
    )
    args = parser.parse_args(words)
    if (args.val_json is None) != (args.val_images is None):
        parser.error("--val-json and --val-images belong together")
    if args.data is not None and (args.train_json or args.train_images or args.val_json):
        parser.error("--data holds all of the data: leave out --train-json and the like")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def prepare(args: argparse.Namespace) -> Run:
    """Plans a new run, or finds the one that goes on."""
    run = Run(args.output)
    if args.resume and run.is_planned():
        configured_device(load_config(run.config).MODEL.DEVICE, args.num_gpus)
        print(f"Going on with the run in {run.output}, as {run.config} says.")
        options = [f"--{name.replace('_', '-')}" for name in PLANNED if getattr(args, name)]
        if options or args.opts:
            print(f"Not used, since the plan is made: {' '.join([*options, *args.opts])}")
        return run
    if run.is_planned():
        raise ValueError(f"{run.output} holds a run: go on with --resume, or choose another folder")
    if args.resume and args.data is args.train_json is None:
        raise ValueError(f"{run.output} holds no run to go on with: name the data, to begin one")
    if args.data is None and (args.train_json is None or args.train_images is None):
        raise ValueError("a new run needs --data, or --train-json and --train-images")
    if args.output.resolve() in (x.resolve() for x in (args.data, args.train_images) if x):
        raise ValueError(f"--output {args.output} is the folder of the data: choose one inside")
    if not torch.cuda.is_available() and args.num_gpus > 1:
        raise ValueError(f"--num-gpus {args.num_gpus}, but there is no GPU")
    configured_device(load_config(None, args.opts).MODEL.DEVICE, args.num_gpus)
    same = {x.name for x in fields(Request)} & vars(args).keys()
    other = {"config": args.config_file, "processes": args.num_gpus, "overrides": args.opts}
    known = args.epochs and args.batch_size
    measured = "" if known else ", and measuring memory and time, which takes a minute or so"
    print(f"Reading the data{measured} ...", flush=True)
    run, text = plan_run(Request(**{name: getattr(args, name) for name in same}, **other))
    print(text, flush=True)
    return run


def finish(run: Run, num_pictures: int) -> None:
    """Prints the result, draws predictions, and tells where everything is."""
    print(f"\n{run.results()}\n")
    register_prepared(run.output)  # several processes have done so in their own memory
    lowest = run.lowest_shown()
    run.write_report(min(PREDICTED, lowest))
    if num_pictures > 0:
        (dataset,) = load_config(run.config).DATASETS.TEST
        predictor = MaskDINOPredictor.from_config(
            run.config,
            str(run.best_weights),
            confidence_threshold=min(CONFIDENCE, lowest),
            dataset=dataset,
        )
        draw_comparisons(predictor, dataset, run.drawings, num_pictures)
    for path, what in (
        (run.best_weights, "the best model"),
        (run.config, "the whole configuration"),
        (run.output / "best" / "history.json", "results of all evaluations, of each class"),
        (run.drawings, "predictions beside ground truth"),
        (run.report, "page about the last evaluation: curves, errors, best and worst images"),
        (run.output / "metrics.json", "losses and results over time"),
        (run.output / "data", "annotations as they were trained on, and what was found in them"),
    ):
        if path.exists():
            print(f"{path}: {what}")
    if run.best_weights.exists():
        words = ["--config-file", str(run.config), "--weights", str(run.best_weights)]
        if lowest < PREDICTED:
            words += ["--confidence-threshold", f"{lowest:g}"]
        print(f"to use it: maskdino predict {shlex.join(words)} --input FOLDER --output drawn")


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(words)
    run = prepare(args)
    launch(train_run, run, args.resume, args.early_stop, processes=args.num_gpus)
    finish(run, args.num_pictures)
