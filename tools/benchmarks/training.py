"""A training step: time, memory, and what the backward pass keeps, form by form."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.drawn import drawn_input, drawn_model
from benchmarks.report import Report, load_peer
from benchmarks.timing import MEBIBYTE, median_milliseconds, peak_mebibytes
from maskdino.engine.compiled import compile_layers
from maskdino.model import MaskDINO
from maskdino.ops.recompute import LEVELS

NAME = "train"
HELP = "a training step: batch, objects, precision, compiled layers, memory"
RECOMPUTE = "MODEL.MASK_DINO.RECOMPUTE"
SEED = 7  # of the points and the noise that a step draws


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this family."""
    parser.add_argument("--config-file", default="configs/coco/instance/maskdino_R50.yaml")
    parser.add_argument("--size", type=int, default=1024, help="height and width of images")
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="images, each tried")
    parser.add_argument("--objects", type=int, nargs="+", default=[10], help="of an image")
    parser.add_argument(
        "--precision", nargs="+", default=["float32"], help="float32, bfloat16, float16"
    )
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument(
        "--peer",
        help="package.module:function that makes of our model a module which takes detectron2's "
        "batches and returns a dict of losses",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each form; 0: none")


def run(args: argparse.Namespace) -> Report:
    """Compare losses and gradients, then memory and time; return a report."""
    models = _models(args)
    rows = []
    for precision in args.precision:
        for batch in args.batch:
            for objects in args.objects:
                inputs = [drawn_input(args.size, args.size, objects) for _ in range(batch)]
                steps = {n: _step(m, inputs, args.device, precision) for n, m in models.items()}
                rows += _rows(steps, f"{precision}, {batch} x {objects} objects", models, args)
    headings = ["step", "form", "loss", "largest difference of a gradient", "kept for backward"]
    headings += ["peak memory", "forward and backward"]
    about = (
        f"{args.config_file}, random weights, images of {args.size} x {args.size}, {args.device}; "
        f"medians of {args.repeats} steps in turns, without the optimizer. Differences are norms, "
        "relative to the gradient of the same weight in the first form; that of the whole gradient."
    )
    return Report(about, headings, rows)


def _models(args: argparse.Namespace) -> dict[str, nn.Module]:
    def drawn(level: str = "none") -> MaskDINO:
        return drawn_model(args.config_file, args.device, RECOMPUTE, level)[1].train()

    models: dict[str, nn.Module] = {f"RECOMPUTE {level}": drawn(level) for level in LEVELS}
    if args.compile and compile_layers(compiled := drawn()):
        models["compiled"] = compiled
    if args.peer:
        models[args.peer] = load_peer(args.peer)(drawn())
    return models


def _step(
    model: nn.Module, inputs: list[dict], device: str, precision: str
) -> Callable[[], Tensor]:
    dtype = getattr(torch, precision)

    def step() -> Tensor:
        torch.manual_seed(SEED)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=precision != "float32"):
            losses = model(inputs)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        total.backward()
        return total.detach()

    return step


def _rows(
    steps: dict[str, Callable[[], Tensor]],
    case: str,
    models: dict[str, nn.Module],
    args: argparse.Namespace,
) -> list[list[str]]:
    rows: dict[str, list[str]] = {}
    expected: dict[str, Tensor] = {}
    for name, step in steps.items():
        kept = kept_mebibytes(step)
        loss = step()
        grads = {
            key: p.grad.clone() for key, p in models[name].named_parameters() if p.grad is not None
        }
        expected = expected or grads
        rows[name] = [case, name, f"{loss.item():.6g}", _difference(grads, expected)]
        rows[name] += [f"{kept:.1f} MiB", f"{peak_mebibytes(step, args.device):.0f} MiB"]
        models[name].zero_grad(set_to_none=True)
    times = dict.fromkeys(steps, 0.0)
    if args.repeats:
        times = median_milliseconds(steps, args.repeats, args.device)
    first = next(iter(times.values()))
    return [
        [*row, f"{times[name]:.0f} ms ({first / times[name]:.2f}x)" if first else "not timed"]
        for name, row in rows.items()
    ]


def _difference(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    if grads.keys() != expected.keys():
        return "other weights"
    squares = [
        torch.stack([(grads[k] - g).square().sum(), g.square().sum()]) for k, g in expected.items()
    ]
    difference, whole = torch.stack(squares).double().sum(0).sqrt().tolist()
    return f"{difference / max(whole, 1e-30):.1e}"


def kept_mebibytes(step: Callable[[], Any]) -> float:
    """What a step's forward pass made and left for its backward pass, each piece of memory once.

    Also what autograd's hooks for saved tensors do not see: arguments of what is recomputed, and
    what functions keep in their own way.
    """
    with _Made() as made:
        step()
    return made.left / MEBIBYTE


class _Made(TorchDispatchMode):
    """Notes the memory of tensors that are made, and how much is left as a backward pass begins."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.left = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch._C._current_graph_task_id() != -1:  # in the backward pass
            if not self.left:
                self.left = sum(n for storage, n in self.made.values() if not storage.expired())
            return func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _has_memory(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if _has_memory(x) and (storage := x.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out


def _has_memory(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided
