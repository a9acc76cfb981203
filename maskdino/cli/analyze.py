"""Counts the parameters and the multiply-adds of a model, part by part.

    maskdino analyze --config-file coco/instance/maskdino_R50
    maskdino analyze --config-file F --size 1024 1024
    maskdino analyze --config-file F --dataset coco_2017_val   # mean over its images

Nothing is computed or downloaded: the network runs on tensors without values. Counted are the
products of convolutions, linear layers and attention, as papers do (and call them FLOPs), and on
a line of its own the sampling of deformable attention, which papers leave out. Not counted: norms,
activations, sums.
"""

import argparse
from collections import Counter
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maskdino.cli.common import CommandError, errors_in_one_line, make_parser
from maskdino.config import load_config
from maskdino.config.checks import check_values
from maskdino.data.checks import check_known
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.integration.extensions import add_import_option
from maskdino.model import MaskDINO
from maskdino.model_zoo import find_config
from maskdino.system.words import counted
from maskdino.visualization.images import padded_size

SAMPLING = "deformable sampling"
MASKS = "masks of all queries"


def sampling_flops(*_: object, out_shape: torch.Size, **__: object) -> int:
    """Twice the multiply-adds of bilinear sampling: four pixels for each sampled value."""
    return 2 * 4 * out_shape.numel()


class PartCounter:
    """Counts multiply-adds and gives them to the part of the model that is running.

    Parts are direct children; one that is called inside of another keeps its own share.
    """

    def __init__(self, model: nn.Module) -> None:
        self._flops = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: sampling_flops}
        )
        self._running = ["rest"]
        self._seen = 0
        self.counts: Counter[str] = Counter()
        for name, module in model.named_modules():
            if name:
                part = name.partition(".")[0]
                module.register_forward_pre_hook(lambda *_, part=part: self._enter(part))
                module.register_forward_hook(lambda *_: self._leave())

    def __enter__(self) -> "PartCounter":
        self._flops.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._flops.__exit__(*error)
        self.take()

    def take(self, part: str | None = None) -> None:
        """Gives what was counted since the last call to ``part``, or to the running part."""
        counts = Counter(self._flops.get_flop_counts().get("Global", {}))
        self.counts[SAMPLING] = counts.pop(torch.ops.aten.grid_sampler_2d, 0) // 2
        self.counts[part or self._running[-1]] += (counts.total() - self._seen) // 2
        self._seen = counts.total()

    def _enter(self, part: str) -> None:
        self.take()
        self._running.append(part)

    def _leave(self) -> None:
        self.take()
        self._running.pop()


def count_multiply_adds(cfg: CfgNode, sizes: Counter[tuple[int, int]]) -> dict[str, float]:
    """The multiply-adds of each part, the mean over images of these sizes, before padding."""
    padding = cfg.MODEL.MASK_DINO.SIZE_DIVISIBILITY
    padded: Counter[tuple[int, int]] = Counter()
    for (height, width), number in sizes.items():
        padded[padded_size((height, width), padding)] += number
    sums: Counter[str] = Counter()
    for size, number in padded.items():
        for part, count in _count_one(build_on_meta(cfg).eval(), *size).items():
            sums[part] += count * number
    return {part: count / padded.total() for part, count in sums.items()}


def _count_one(model: MaskDINO, height: int, width: int) -> dict[str, int]:
    counter = PartCounter(model)
    with torch.no_grad(), counter:
        predictions, pixels = model.predict(torch.zeros(1, 3, height, width, device="meta"))
        counter.take()
        embeddings = predictions.mask_embeddings  # (1, Q, C)
        if pixels is not None and embeddings is not None:
            torch.matmul(embeddings, pixels.flatten(2))  # as post-processing, for all queries
            counter.take(MASKS)
    return dict(counter.counts)


def sizes_of_dataset(cfg: CfgNode, name: str) -> Counter[tuple[int, int]]:
    """Returns the sizes of a dataset's images as the evaluation resizes them."""
    check_known(name, images=False)
    smallest, largest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return Counter(
        ResizeShortestEdge.get_output_shape(image["height"], image["width"], smallest, largest)
        for image in DatasetCatalog.get(name)
    )


def build_on_meta(cfg: CfgNode) -> MaskDINO:
    """Builds the model without memory for its weights."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    return cast(MaskDINO, MaskDINOTrainer.build_model(cfg))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the parameters of each part, statistics of frozen norms included."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    return dict(counts)


def print_table(parameters: dict[str, int], products: dict[str, float]) -> None:
    """Prints both counts, part by part and in all."""
    print(f"{'part':<24}{'parameters (M)':>16}{'multiply-adds (G)':>20}")
    others = [part for part in products if part not in parameters and products[part]]
    for part in [*parameters, *others]:
        if part != SAMPLING:
            count, size = products.get(part, 0), parameters.get(part, 0)
            print(f"{part:<24}{size / 1e6:>16.2f}{count / 1e9:>20.2f}")
    total = sum(count for part, count in products.items() if part != SAMPLING)
    print(f"{'total':<24}{sum(parameters.values()) / 1e6:>16.2f}{total / 1e9:>20.2f}")
    print(f"{SAMPLING:<24}{'':>16}{products[SAMPLING] / 1e9:>20.2f}   (not in the total)")


@errors_in_one_line()
def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path or name")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dataset", metavar="NAME", help="mean over the images of this dataset")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(words)
    cfg = load_config(find_config(args.config_file), args.opts)
    check_values(cfg)
    if args.dataset:
        sizes = sizes_of_dataset(cfg, args.dataset)
        print(f"Mean over {counted(sizes.total(), 'image')} of {args.dataset}:")
    else:
        height, width = args.size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        if min(height, width) < 1:
            raise CommandError(f"an image of {height} x {width} pixels: give a --size of 1 or more")
        sizes = Counter({(height, width): 1})
        print(f"One image of {height} x {width} pixels:")
    print_table(count_parameters(build_on_meta(cfg)), count_multiply_adds(cfg, sizes))
