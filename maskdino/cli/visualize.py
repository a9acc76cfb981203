"""Draws what a model is trained with, and what it predicts.

    maskdino visualize data --config-file F --output DIR
    maskdino visualize predictions --config-file F --weights W --dataset NAME --output DIR
    maskdino visualize attention --config-file F --weights W --input photo.jpg --output DIR

`data` draws ground truth after augmentation, as the training mapper hands it to the model.
`predictions` draws ground truth and predictions side by side.
`attention` follows the best queries through the decoder, as in appendix A of the paper: mask (red),
box (green) and sampling points of the deformable attention (blue) after each layer.
"""

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from PIL import Image

from maskdino.categories import Categories
from maskdino.cli.common import errors_in_one_line, make_parser
from maskdino.config import load_config
from maskdino.data import build_train_mapper
from maskdino.data.checks import check_known
from maskdino.data.mixing import build_mixing
from maskdino.evaluation.files import unique_pngs
from maskdino.inference.attention_maps import follow_queries
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.sources import refuse_to_replace
from maskdino.integration.extensions import add_import_option
from maskdino.model_zoo import find_config
from maskdino.system.files import write_errors
from maskdino.system.words import counted
from maskdino.visualization.drawing import below, beside, enlarge
from maskdino.visualization.ground_truth import ground_truth_of, ground_truth_of_example
from maskdino.visualization.images import load_image
from maskdino.visualization.results import ImageResult

CONFIDENCE = 0.4  # least score of what is drawn
COLUMNS = 5  # decoder layers in a row
PANEL_PIXELS = 560  # smaller images are enlarged to about this, so that lines look thin
LAYER_PIXELS = 380  # likewise, in figures of decoder layers


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `words` stands in for it in tests."""
    parser = make_parser(__doc__)
    common = argparse.ArgumentParser(add_help=False)
    add_import_option(common)
    common.add_argument("--config-file", required=True, metavar="FILE", help="a YAML file")
    common.add_argument("--output", required=True, type=Path, metavar="DIR")
    common.add_argument("--num-images", type=int, default=8, metavar="N")
    common.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="keys and values, at the end"
    )
    views = parser.add_subparsers(dest="view", required=True)
    data = views.add_parser("data", parents=[common], help="augmented ground truth")
    data.add_argument("--seed", type=int, default=0, help="of the augmentations")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--weights", metavar="FILE", help="default: MODEL.WEIGHTS")
    model.add_argument("--device", help="default: MODEL.DEVICE, or the CPU without a GPU")
    predictions = views.add_parser(
        "predictions", parents=[common, model], help="predictions beside ground truth"
    )
    predictions.add_argument("--dataset", metavar="NAME", help="default: first of DATASETS.TEST")
    predictions.add_argument("--confidence-threshold", type=float, default=CONFIDENCE, metavar="T")
    attention = views.add_parser(
        "attention", parents=[common, model], help="queries at each decoder layer"
    )
    attention.add_argument("--input", nargs="+", metavar="IMG", help="default: DATASETS.TEST")
    attention.add_argument("--num-queries", type=int, default=3, metavar="N", help="the N best")
    attention.add_argument("--queries", type=int, nargs="+", metavar="Q", help="these, by number")
    args = parser.parse_args(words)
    if args.num_images < 1:
        parser.error(f"--num-images {args.num_images} must be at least 1")
    if args.view == "attention" and args.num_queries < 1:
        parser.error(f"--num-queries {args.num_queries} must be at least 1")
    return args


def spread(records: list[dict], number: int) -> list[dict]:
    """At most `number` of the records, evenly over all of them."""
    if not records:
        raise ValueError("the dataset has no images")
    indices = np.linspace(0, len(records) - 1, min(number, len(records))).round().astype(int)
    return [records[i] for i in indices]


def enlargement(size: tuple[int, int]) -> int:
    """Whole factor that brings an image near to `PANEL_PIXELS`."""
    return max(1, round(PANEL_PIXELS / max(size)))


def in_pixels(size: Sequence[int]) -> str:
    """(height, width, ...) in words."""
    return f"{size[1]} x {size[0]} px"


def caption(heading: str, result: ImageResult, task: str) -> str:
    """What stands above a panel."""
    if task == "instance":
        return f"{heading}: {counted(len(result), 'object')}"
    if task == "panoptic":
        return f"{heading}: {counted(len(result.segments or ()), 'segment')}"
    return f"{heading}: classes"


def comparison(truth: ImageResult, predicted: ImageResult, threshold: float) -> np.ndarray:
    """One row for each task: ground truth where there is any, and predictions."""
    scale = enlargement(truth.size)
    rows = []
    for task in predicted.tasks:
        panels = []
        if task in truth.tasks:
            drawn = truth.draw(task, scale=scale)
            panels.append((caption("ground truth", truth, task), drawn))
        heading = f"predicted, score {threshold:g}+" if task == "instance" else "predicted"
        drawn = predicted.draw(task, scale=scale)
        panels.append((caption(heading, predicted, task), drawn))
        rows.append(beside(panels))
    return below(rows)


def draw_predictions(args: argparse.Namespace, cfg: CfgNode) -> list[Path]:
    """Writes one figure for each image; returns the paths."""
    name = args.dataset or cfg.DATASETS.TEST[0]
    check_known(name)
    predictor = MaskDINOPredictor.from_config(
        args.config_file,
        args.weights,
        device=args.device,
        confidence_threshold=args.confidence_threshold,
        dataset=name,
        opts=args.opts,
    )
    return draw_comparisons(predictor, name, args.output, args.num_images)


def draw_comparisons(
    predictor: MaskDINOPredictor, dataset: str, output: Path, number: int
) -> list[Path]:
    """Writes predictions beside ground truth, of images from all over the dataset."""
    records = spread(DatasetCatalog.get(dataset), number)
    files = [record["file_name"] for record in records]
    paths = [output / name for name in unique_pngs(files)]
    refuse_to_replace(paths, map(Path, files), "--output")
    output.mkdir(parents=True, exist_ok=True)
    for record, predicted, path in zip(records, predictor.stream(files), paths, strict=True):
        truth = ground_truth_of(record, predictor.categories)
        sheet = comparison(truth, predicted, predictor.options.confidence_threshold)
        Image.fromarray(sheet).save(path)
    return paths


def draw_attention(args: argparse.Namespace, cfg: CfgNode) -> list[Path]:
    """Writes one figure for each image and query; returns the paths."""
    names, dataset = args.input, None if args.input else cfg.DATASETS.TEST[0]
    if dataset is not None:
        check_known(dataset)
        records = spread(DatasetCatalog.get(dataset), args.num_images)
        names = [record["file_name"] for record in records]
    predictor = MaskDINOPredictor.from_config(
        args.config_file, args.weights, device=args.device, dataset=dataset, opts=args.opts
    )
    paths = []
    for name, target in zip(names, unique_pngs(names), strict=True):
        image = load_image(name)
        scale = max(1, math.ceil(LAYER_PIXELS / max(image.shape[:2])))
        for query, layers in follow_queries(predictor, name, args.queries or args.num_queries):
            panels = []
            for view in layers:
                label = predictor.categories.names[view.label]
                heading = f"layer {view.layer}" if view.layer else "selected query"
                panels.append((f"{heading}: {label} {view.score:.2f}", view.draw(image, scale)))
            rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
            paths.append(args.output / f"{Path(target).stem}_query{query}.png")
            Image.fromarray(below([beside(row) for row in rows])).save(paths[-1])
    return paths


def draw_data(args: argparse.Namespace, cfg: CfgNode) -> list[Path]:
    """Writes one figure for each training example; returns the paths."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    for name in cfg.DATASETS.TRAIN:
        check_known(name)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
    categories = Categories.from_config(cfg)
    mapper = build_mixing(cfg, build_train_mapper(cfg), records, torch.ones(len(records)))
    paths = []
    for number, record in enumerate(spread(records, args.num_images)):
        example = mapper(record)
        seen = ground_truth_of_example(example, categories, cfg.INPUT.FORMAT)
        original = load_image(record["file_name"])
        panels = [
            (
                f"file, {in_pixels(original.shape)}",
                enlarge(original, enlargement(original.shape[:2])),
            ),
            (
                caption(f"augmented, {in_pixels(seen.size)}", seen, "instance"),
                seen.draw("instance", scale=enlargement(seen.size), show_boxes=True),
            ),
        ]
        paths.append(args.output / f"{number:03d}_{Path(record['file_name']).stem}.png")
        Image.fromarray(beside(panels)).save(paths[-1])
    return paths


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(words)
    cfg = load_config(find_config(args.config_file), args.opts)
    draw = {"data": draw_data, "predictions": draw_predictions, "attention": draw_attention}
    with write_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        paths = draw[args.view](args, cfg)
    print(f"{counted(len(paths), 'figure')} in {args.output}")
