"""Deformable attention of other packages beside this one's, on the GPU alone, from replayed graphs.

Contenders that are not installed are left out. All but the fused form are given locations and
weights that were made before the clock started; gradients are those of all floating-point inputs.

Shape key: B images, S tokens, Q queries, M heads, D channels of a head, L levels, P points.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_checks.common import Run, milliseconds, relative_error, replayed_microseconds
from gpu_checks.operators import POINTS, Problem
from maskdino.ops.ms_deform_attn import (
    compiled_op_available,
    locations_and_weights,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_reference,
)

RELEASED = "MultiScaleDeformableAttention"
STEP_SIZE = 128  # images that the released operator takes at once, as its module asks
Call = Callable[..., Tensor]


class Released(torch.autograd.Function):
    """The released compiled module, called as its own wrapper calls it."""

    @staticmethod
    def forward(ctx: Any, module: Any, sizes: Tensor, starts: Tensor, *inputs: Tensor) -> Tensor:
        """Value, locations and weights to the output."""
        value, locations, weights = inputs
        ctx.module = module
        ctx.save_for_backward(value, sizes, starts, locations, weights)
        return module.ms_deform_attn_forward(value, sizes, starts, locations, weights, STEP_SIZE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of value, locations and weights."""
        grads = ctx.module.ms_deform_attn_backward(*ctx.saved_tensors, grad, STEP_SIZE)
        return None, None, None, *grads


def compare(run: Run) -> None:
    """Encoder form at 1024 x 1024, one and two images, of every contender."""
    sys.path.append(str(run.peer))  # last: its `maskdino` stays hidden
    sides = (8, 4, 2, 1) if run.dry else (128, 64, 32, 16)
    shapes = [(side, side) for side in sides]
    for dtype in (torch.float32, torch.bfloat16) if run.on_gpu else (torch.float32,):
        for batch in (1, 2):
            problem = Problem.draw(shapes, batch, None).on(run.device, dtype)
            _compare(run, problem, {"dtype": str(dtype)[6:], "batch": batch})


def _compare(run: Run, problem: Problem, case: dict) -> None:
    value, raw = problem.value, problem.raw
    locations, weights = locations_and_weights(value, problem.shapes, raw, None, POINTS)
    inputs = (value, locations, weights.to(value.dtype))
    exact = _results(
        lambda v, xy, w: ms_deform_attn_reference(v, problem.shapes, xy, w.float()),
        (value.float(), locations, weights),
        problem.grad.float(),
    )
    contenders = {name: (call, inputs) for name, call in _others(run, problem).items()}
    if compiled_op_available(run.device):
        contenders["ours, locations and weights"] = (
            lambda v, xy, w: ms_deform_attn(v, problem.shapes, xy, w, "compiled"),
            inputs,
        )
        contenders["ours, fused"] = (
            lambda v, r: ms_deform_attn_fused(v, problem.shapes, r, None, POINTS, "compiled"),
            (value, raw),
        )
    for name, (call, arguments) in contenders.items():
        try:
            found = _results(call, arguments, problem.grad)
            same = len(found) if len(arguments) == len(inputs) else 2  # output, gradient of value
            pairs = zip(found[:same], exact[:same], strict=True)
            errors = [float(f"{relative_error(*pair):.2g}") for pair in pairs]
            times = _times(run, call, arguments, problem.grad)
        except Exception as error:  # noqa: BLE001 - it costs its own line only
            times, errors = {"FAILED": f"{type(error).__name__}: {error}"[:500]}, None
        run.say("peer", what="operator", contender=name, **case, errors=errors, **times)


def _others(run: Run, problem: Problem) -> dict[str, Call]:
    """Calls of other packages by name; all take (value, locations, weights)."""
    sizes = torch.tensor(problem.shapes, device=run.device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(dim=1).cumsum(0)[:-1]))
    found: dict[str, Call] = {}
    # It knows float32 and float64 alone.
    if importlib.util.find_spec(RELEASED) is not None and problem.value.dtype is torch.float32:
        module = importlib.import_module(RELEASED)
        found["released"] = lambda *inputs: Released.apply(module, sizes, starts, *inputs)
    if importlib.util.find_spec("deformops") is not None and run.on_gpu:
        registry = importlib.import_module("deformops.registry")
        for backend in (registry.Backend.CUDA, registry.Backend.TRITON):
            found[f"deformops, {backend.name}"] = lambda value, locations, weights, b=backend: (
                registry.msda(value, sizes, starts, locations, weights, backend=b)
            )
    return found


def _results(call: Call, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Output, and gradients of all inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _times(run: Run, call: Call, inputs: Sequence[Tensor], grad: Tensor) -> dict[str, object]:
    if not run.on_gpu:
        return {}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    @torch.no_grad()
    def forward() -> Tensor:
        return call(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves), leaves, grad)

    calls = {"forward_us": forward, "both_us": both}
    try:
        return {name: replayed_microseconds(part) for name, part in calls.items()}
    except RuntimeError as error:  # it waits for the GPU, which a graph cannot
        torch.cuda.synchronize()
        times = {name: round(1e3 * milliseconds(run, part), 1) for name, part in calls.items()}
        return {**times, "clock": f"with the host: {error}"[:200]}
