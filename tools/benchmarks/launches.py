"""Operations of a training step and of inference that launch kernels on a GPU."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.drawn import drawn_input, drawn_model
from benchmarks.report import Report
from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.model import MaskDINO
from maskdino.system.words import counted

NAME = "launches"
HELP = "operations of a step and of inference, which are launches on a GPU"
NO_LAUNCH = ("empty", "detach", "view", "alias", "split", "unbind", "lift", "reshape_alias")
NO_LAUNCH += ("promote_types", "record_function")
COMMON = 8  # operations that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this family."""
    parser.add_argument("--config-file", default="configs/coco/instance/maskdino_R50.yaml")
    parser.add_argument("--size", type=int, default=256, help="height and width of images")
    parser.add_argument("--objects", type=int, nargs="+", default=[5, 3], help="of each image")
    parser.add_argument("--precision", default="bfloat16", help="float32 or bfloat16")


class Counting(TorchDispatchMode):
    """Counts operations; views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts one."""
        name = func._schema.name.partition("::")[2]
        if not (func.is_view or name.strip("_").startswith(NO_LAUNCH)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def run(args: argparse.Namespace) -> Report:
    """Count operations; return a report."""
    keys = ("MODEL.MASK_DINO.TEST.PRECISION", args.precision)
    cfg, model = drawn_model(args.config_file, args.device, *keys)
    inputs = [drawn_input(args.size, args.size, number) for number in args.objects]
    rows = [*_training(model, cfg, inputs, args), _inference(model, inputs)]
    about = (
        f"{args.config_file}, {args.precision}, images of {args.size} x {args.size} with "
        f"{args.objects} objects; as counted on {args.device}: an operation of PyTorch counts one, "
        "however many kernels it is."
    )
    return Report(about, ["what", "operations", "the most common", "result"], rows)


def _training(
    model: MaskDINO, cfg: Any, inputs: list[dict], args: argparse.Namespace
) -> list[list[str]]:
    optimizer, clip = build_optimizer(cfg, model.train()), build_gradient_clipper(cfg)
    rows = []
    for _ in range(2):  # constants and the optimizer's state are made once
        half = args.precision != "float32"
        autocast = torch.autocast(args.device, dtype=torch.bfloat16, enabled=half)
        with Counting() as forward, autocast:
            losses = model(inputs)
        with Counting() as backward:
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            total.backward()
        with Counting() as update:
            norm = clip(model.parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rows = [
            _row("forward and losses of a step", forward, f"loss {total.item():.6g}"),
            _row("backward", backward, f"norm of the gradient {norm.item():.4g}"),
            _row("clipping and optimizer", update, ""),
            _row("step", forward, "", backward, update),
        ]
    return rows


def _inference(model: MaskDINO, inputs: list[dict]) -> list[str]:
    model.eval()
    results: Callable[[], list[dict]] = torch.no_grad()(lambda: model(inputs[:1]))
    results()
    with Counting() as counting:
        found = results()
    objects = counted(len(found[0].get("instances", ())), "object")
    return _row("an image to results", counting, objects)


def _row(what: str, first: Counting, result: str, *others: Counting) -> list[str]:
    counts = sum((other.counts for other in others), first.counts)
    common = ", ".join(f"{name} {number}" for name, number in counts.most_common(COMMON))
    return [what, f"{counts.total():,}", common, result]
