"""Deformable attention of one encoder layer: compiled, PyTorch, and peers that are installed.

Shape key: B images, S tokens, Q queries, M heads, D channels of a head, L levels, P points.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from benchmarks.report import Report
from benchmarks.timing import median_milliseconds, peak_mebibytes
from maskdino.ops.ms_deform_attn import (
    choose_backend,
    locations_and_weights,
    ms_deform_attn,
    ms_deform_attn_fused,
)

NAME = "op"
HELP = "deformable attention of one encoder layer"
HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)
BACKENDS = {
    "reference": "PyTorch (grid_sample)",
    "triton": "Triton, fused",
    "compiled": "compiled, fused",
}
RELEASED = "MultiScaleDeformableAttention"  # the compiled module of the released code
AT_ONCE = 128  # images that it takes, as its own module asks
Shapes = list[tuple[int, int]]
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """Random inputs of one call."""

    shapes: Shapes
    value: Tensor  # (B, S, M, D)
    raw: Tensor  # (B, Q, M * L * P * 3)
    reference: Tensor | None  # (B, Q, 4), None where the tokens are the queries
    grad: Tensor  # (B, Q, M * D)

    @staticmethod
    def draw(
        shapes: Shapes,
        batch: int,
        queries: int | None = None,
        spread: float = 2.0,
        channels: int = CHANNELS,
    ) -> Problem:
        """Float32 on the CPU; `spread` is the deviation of the offsets, in cells."""
        torch.manual_seed(1)
        tokens = sum(height * width for height, width in shapes)
        samples, number = HEADS * len(shapes) * POINTS, queries or tokens
        offsets = spread * torch.randn(batch, number, 2 * samples)
        return Problem(
            shapes,
            torch.randn(batch, tokens, HEADS, channels),
            torch.cat([offsets, torch.randn(batch, number, samples)], dim=2),
            None if queries is None else torch.rand(batch, queries, 4),
            torch.randn(batch, number, HEADS * channels),
        )

    def on(self, device: str, dtype: torch.dtype) -> Problem:
        """The same numbers elsewhere; the reference stays float32, or becomes float64."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        moved = None if self.reference is None else self.reference.to(device, wide)
        value, raw, grad = (t.to(device, dtype) for t in (self.value, self.raw, self.grad))
        return Problem(self.shapes, value, raw, moved, grad)

    def fused(self, backend: str) -> Operator:
        """A form of this package; takes value, and offsets and logits."""
        return lambda value, raw: ms_deform_attn_fused(
            value, self.shapes, raw, self.reference, POINTS, backend
        )

    def located(self, value: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, locations and weights, as models without fusion compute them."""
        where = locations_and_weights(value, self.shapes, raw, self.reference, POINTS)
        return value, *where


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this family."""
    parser.add_argument("--height", type=int, default=1024, help="image height in pixels")
    parser.add_argument("--width", type=int, default=1024, help="image width in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--spread", type=float, default=2.0, help="offsets' deviation in cells")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts the seconds of all threads, which other programs hardly disturb",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each contender")


def run(args: argparse.Namespace) -> Report:
    """Compare results, then time and memory; return a report."""
    shapes = [(-(-args.height // s), -(-args.width // s)) for s in STRIDES]
    problem = Problem.draw(shapes, args.batch, spread=args.spread)
    problem = problem.on(args.device, getattr(torch, args.dtype))
    inputs = (problem.value, problem.raw)
    operators = contenders(problem, args.device)
    passes: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {n: torch.no_grad()(partial(o, *inputs)) for n, o in operators.items()},
        "forward + backward": {
            n: partial(gradients, o, inputs, problem.grad) for n, o in operators.items()
        },
    }
    peaks = {
        f"peak memory {name}": {n: peak_mebibytes(call, args.device) for n, call in calls.items()}
        for name, calls in passes.items()
    }
    found = {name: call() for name, call in passes["forward + backward"].items()}
    columns = {"largest difference (output, value, offsets and logits)": compare(found)}
    for name, calls in passes.items():
        times = median_milliseconds(calls, args.repeats, args.device, args.clock)
        columns[name] = ratios(times, "ms")
    columns |= {name: ratios(numbers, "MiB") for name, numbers in peaks.items()}
    rows = [[name, *(column[name] for column in columns.values())] for name in operators]
    sizes = (
        f"{args.batch} x {problem.value.shape[1]} tokens ({args.height} x {args.width}), {HEADS} "
        f"heads of {CHANNELS}, {len(shapes)} levels, {POINTS} points, {args.dtype}, {args.device}; "
        f"offsets spread by {args.spread:g} cells; medians of {args.repeats} runs in turns, "
        f"{args.clock} clock; in brackets the gain over the first line."
    )
    return Report(sizes, ["contender", *columns], rows)


def contenders(problem: Problem, device: str) -> dict[str, Operator]:
    """Return what can run here, by name; all take (value, offsets and logits)."""

    def textbook(call: Operator) -> Operator:
        return lambda value, raw: call(*problem.located(value, raw))

    fused = {
        name: problem.fused(backend)
        for backend, name in BACKENDS.items()
        if not why_not(backend, device)
    }
    return fused | {n: textbook(call) for n, call in others(problem, device).items()}


def why_not(backend: str, device: str) -> str:
    """Say why a form of the operator cannot run on a device; empty where it can."""
    try:
        choose_backend(device, backend)
    except RuntimeError as error:
        return str(error)
    return ""


def gradients(call: Operator, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Output, and gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def sum_of_samples(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute deformable attention as it is usually written, features of all samples first.

    Shapes are those of `maskdino.ops.ms_deform_attn.ms_deform_attn`. (Deformable DETR, eq. 3)
    """
    batch, queries, heads, _, _, _ = locations.shape
    maps = value.split([height * width for height, width in shapes], dim=1)
    samples = []
    for level, (height, width) in enumerate(shapes):
        features = maps[level].permute(0, 2, 3, 1).reshape(-1, value.shape[3], height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples.append(grid_sample(features, grid.to(features.dtype), align_corners=False))
    per_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1).to(value.dtype)
    output = (torch.cat(samples, dim=3) * per_head).sum(dim=3)
    return output.view(batch, -1, queries).transpose(1, 2)


class Released(torch.autograd.Function):
    """The released compiled module, called as its own wrapper calls it."""

    @staticmethod
    def forward(ctx: Any, module: Any, sizes: Tensor, starts: Tensor, *inputs: Tensor) -> Tensor:
        """Value, locations and weights to the output."""
        value, locations, weights = inputs
        ctx.module = module
        ctx.save_for_backward(value, sizes, starts, locations, weights)
        return module.ms_deform_attn_forward(value, sizes, starts, locations, weights, AT_ONCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of value, locations and weights."""
        grads = ctx.module.ms_deform_attn_backward(*ctx.saved_tensors, grad, AT_ONCE)
        return None, None, None, *grads


def others(problem: Problem, device: str) -> dict[str, Operator]:
    """Forms that take (value, locations, weights); of other libraries those that are installed."""
    shapes, sizes = problem.shapes, torch.tensor(problem.shapes, device=device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(dim=1).cumsum(0)[:-1]))
    found: dict[str, Operator] = {
        "PyTorch, all samples at once": lambda value, *where: sum_of_samples(value, shapes, *where)
    }
    if not why_not("compiled", device):
        found["compiled, locations and weights"] = lambda value, *where: ms_deform_attn(
            value, shapes, *where, "compiled"
        )
    mmcv = _optional("mmcv.ops.multi_scale_deform_attn")
    if mmcv is not None and device == "cuda":
        found["mmcv"] = lambda value, *where: mmcv.MultiScaleDeformableAttnFunction.apply(
            value, sizes, starts, *(tensor.to(value.dtype) for tensor in where), 64
        )
    elif mmcv is not None:
        found["mmcv"] = lambda value, *where: mmcv.multi_scale_deformable_attn_pytorch(
            value, sizes, *where
        )
    transformers = _optional("transformers.models.deformable_detr.modeling_deformable_detr")
    if transformers is not None:
        module = transformers.MultiScaleDeformableAttention()
        found["transformers"] = lambda value, *where: module(
            value, sizes, shapes, starts, *(tensor.to(value.dtype) for tensor in where), 64
        )
    released = _optional(RELEASED)
    if released is not None and problem.value.dtype is torch.float32:  # float64 besides, no other
        found["released"] = lambda *inputs: Released.apply(released, sizes, starts, *inputs)
    deformops = _optional("deformops.registry")
    if deformops is not None and device == "cuda":
        for backend in (deformops.Backend.CUDA, deformops.Backend.TRITON):
            found[f"deformops, {backend.name}"] = lambda value, locations, weights, b=backend: (
                deformops.msda(value, sizes, starts, locations, weights.to(value.dtype), backend=b)
            )
    return found


def _optional(name: str) -> Any:
    """Import a module of a library that need not be installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        return None
    return importlib.import_module(name)


def compare(results: dict[str, list[Tensor]]) -> dict[str, str]:
    """Return each contender's differences from the first, relative to the largest number."""
    expected = next(iter(results.values()))
    texts = {}
    for name, tensors in results.items():
        differences = [
            ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
            for a, b in zip(tensors, expected, strict=True)
        ]
        texts[name] = ", ".join(f"{difference:.1e}" for difference in differences)
    return texts


def ratios(numbers: dict[str, float], unit: str) -> dict[str, str]:
    """Write numbers with their gain over the first."""
    first = next(iter(numbers.values()))
    return {name: f"{n:.1f} {unit} ({first / n:.1f}x)" for name, n in numbers.items()}
