"""Deformable attention of one encoder layer: compiled, PyTorch, and peers that are installed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from benchmarks.report import Report
from benchmarks.timing import median_milliseconds, peak_mebibytes
from maskdino.ops.ms_deform_attn import (
    cell_centers,
    choose_backend,
    compiled_op_available,
    ms_deform_attn,
    ms_deform_attn_fused,
)

NAME = "op"
HELP = "deformable attention of one encoder layer"
HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)
Operator = Callable[[Tensor, Tensor], Tensor]


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
    torch.manual_seed(0)
    shapes = [(-(-args.height // s), -(-args.width // s)) for s in STRIDES]
    tokens = sum(height * width for height, width in shapes)
    dtype = getattr(torch, args.dtype)
    samples = HEADS * len(shapes) * POINTS
    value = torch.randn(args.batch, tokens, HEADS, CHANNELS)
    offsets = args.spread * torch.randn(args.batch, tokens, 2 * samples)
    raw = torch.cat((offsets, torch.randn(args.batch, tokens, samples)), dim=2)
    inputs = [t.to(args.device, dtype).requires_grad_() for t in (value, raw)]
    grad_output = torch.randn(args.batch, tokens, HEADS * CHANNELS).to(args.device, dtype)
    operators = contenders(shapes, args.device)

    def forward(operator: Operator) -> Tensor:
        with torch.no_grad():
            return operator(*inputs)

    def both(operator: Operator) -> list[Tensor]:
        output = operator(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]

    runs = {name: (lambda o=o: forward(o)) for name, o in operators.items()}
    runs_both = {name: (lambda o=o: both(o)) for name, o in operators.items()}
    peaks = [
        {name: peak_mebibytes(call, args.device) for name, call in calls.items()}
        for calls in (runs, runs_both)
    ]
    differences = compare({name: call() for name, call in runs_both.items()})
    times = [
        median_milliseconds(calls, args.repeats, args.device, args.clock)
        for calls in (runs, runs_both)
    ]
    columns = [
        differences,
        *(ratios(numbers, "ms") for numbers in times),
        *(ratios(numbers, "MiB") for numbers in peaks),
    ]
    rows = [[name, *(column[name] for column in columns)] for name in operators]
    headings = [
        "contender",
        "largest difference (output, value, offsets and logits)",
        "forward",
        "forward + backward",
        "peak memory forward",
        "peak memory forward + backward",
    ]
    sizes = (
        f"{args.batch} x {tokens} tokens ({args.height} x {args.width}), {HEADS} heads of "
        f"{CHANNELS}, {len(shapes)} levels, {POINTS} points, {args.dtype}, {args.device}; "
        f"offsets spread by {args.spread:g} cells; medians of {args.repeats} runs in turns, "
        f"{args.clock} clock; "
        "in brackets the gain over the first line."
    )
    return Report(sizes, headings, rows)


def contenders(shapes: list[tuple[int, int]], device: str) -> dict[str, Operator]:
    """Return what can run here, by name; all take (value, offsets and logits)."""

    def fused(backend: str) -> Operator:
        return lambda value, raw: ms_deform_attn_fused(value, shapes, raw, None, POINTS, backend)

    def textbook(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Operator:
        return lambda value, raw: call(value, *locate(raw, shapes))

    found: dict[str, Operator] = {
        "PyTorch (grid_sample)": fused("reference"),
        "PyTorch, all samples at once": textbook(
            lambda value, locations, weights: sum_of_samples(value, shapes, locations, weights)
        ),
    }
    if not why_not("triton", device):
        found["Triton, fused"] = fused("triton")
    if compiled_op_available(device):
        found["compiled, fused"] = fused("compiled")
        found["compiled, locations and weights"] = textbook(
            lambda value, locations, weights: ms_deform_attn(
                value, shapes, locations, weights, "compiled"
            )
        )
    for name, call in peers(shapes, device).items():
        found[name] = textbook(call)
    return found


def why_not(backend: str, device: str) -> str:
    """Say why a form of the operator cannot run on a device; empty where it can."""
    try:
        choose_backend(device, backend)
    except RuntimeError as error:
        return str(error)
    return ""


def locate(raw: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Compute float32 locations and weights of an encoder layer, as models without fusion do."""
    batch, tokens, _ = raw.shape
    samples = HEADS * len(shapes) * POINTS
    offsets = raw[..., : 2 * samples].float().view(batch, tokens, HEADS, len(shapes), POINTS, 2)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=raw.device)
    centers = cell_centers(shapes, raw.device)[None, :, None, None, None]
    weights = raw[..., 2 * samples :].float().view(batch, tokens, HEADS, -1).softmax(dim=-1)
    return centers + offsets / sizes[:, None], weights.view(offsets.shape[:-1])


def sum_of_samples(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
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


def peers(
    shapes: list[tuple[int, int]], device: str
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return other libraries' operators, where the libraries are installed."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    sizes = torch.tensor(shapes, device=device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(dim=1).cumsum(0)[:-1]))
    mmcv = _optional("mmcv.ops.multi_scale_deform_attn")
    if mmcv is not None and device == "cuda":
        found["mmcv"] = lambda value, locations, weights: (
            mmcv.MultiScaleDeformableAttnFunction.apply(
                value, sizes, starts, locations.to(value.dtype), weights.to(value.dtype), 64
            )
        )
    elif mmcv is not None:
        found["mmcv"] = lambda value, locations, weights: mmcv.multi_scale_deformable_attn_pytorch(
            value, sizes, locations, weights
        )
    transformers = _optional("transformers.models.deformable_detr.modeling_deformable_detr")
    if transformers is not None:
        module = transformers.MultiScaleDeformableAttention()
        found["transformers"] = lambda value, locations, weights: module(
            value, sizes, shapes, starts, locations.to(value.dtype), weights.to(value.dtype), 64
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
