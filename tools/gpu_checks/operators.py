"""Deformable attention alone: is it right, and how long does it take.

Shape key: that of `benchmarks.operator`; 8 heads of 32 channels, 4 levels, 4 points.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch
from benchmarks.operator import (
    BACKENDS,
    CHANNELS,
    HEADS,
    POINTS,
    Operator,
    Problem,
    gradients,
    others,
    sum_of_samples,
    why_not,
)
from torch import Tensor

from gpu_checks.common import Run, milliseconds, relative_error, replayed_microseconds
from maskdino.ops.ms_deform_attn import locations_and_weights

# Bounds of the relative error of outputs and gradients, by the type of features.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Channels of a head, and spread of the offsets in cells: as a model begins, and far.
CASES = ((CHANNELS, 2.0), (CHANNELS, 12.0), (16, 2.0))


def is_right(run: Run) -> None:
    """Output and gradients on the device, in each type, against float64 on the CPU."""
    shapes = [(9, 7), (5, 4), (3, 2), (1, 1)] if run.dry else [(32, 44), (16, 22), (8, 11), (4, 6)]
    cases = itertools.product((None, 40 if run.dry else 300), CASES, BOUNDS)
    backends = _backends(run)
    for queries, (channels, spread), dtype in cases:
        # What rounding the inputs costs is not the operator's error.
        rounded = Problem.draw(shapes, 2, queries, spread, channels).on("cpu", dtype)
        rounded = off_the_kinks(rounded)
        exact = _results(rounded.on("cpu", torch.float64), "reference")
        case = {**_case(rounded), "channels": channels, "spread": spread}
        for backend in backends:
            if backend == "triton" and (channels, spread) != CASES[0]:
                continue  # seconds of compilation each; its tests have all of them
            with run.attempt(backend=backend, **case):
                found = _results(rounded.on(run.device, dtype), backend)
                errors = [relative_error(*pair) for pair in zip(found, exact, strict=True)]
                ok = all(error < BOUNDS[dtype] for error in errors)
                run.say(backend=backend, **case, errors=errors, ok=ok)


def off_the_kinks(problem: Problem) -> Problem:
    """The same, with samples moved away from pixel centers, where gradients jump.

    Rounded offsets from a token's own cell often meet one, and then float32 and float64 may
    stand on different sides of it.
    """
    raw = problem.raw.clone()
    samples = HEADS * len(problem.shapes) * POINTS
    sizes = torch.tensor([(w, h) for h, w in problem.shapes], dtype=torch.float64)[:, None]
    for _ in range(20):
        locations, _ = locations_and_weights(
            problem.value.double(), problem.shapes, raw.double(), problem.reference, POINTS
        )
        pixels = locations * sizes - 0.5
        near = ((pixels - pixels.round()).abs() < 1e-3).flatten(2)
        if not near.any():
            break
        raw[..., : 2 * samples] += (0.3 * near).to(raw.dtype)
    return replace(problem, raw=raw)


def speed(run: Run) -> None:
    """Every form and every peer that is installed: its errors, and its time on the GPU alone."""
    if run.peer is not None:
        sys.path.append(str(run.peer))  # last: its `maskdino` stays hidden
    shapes = [(side, side) for side in ((8, 4, 2, 1) if run.dry else (128, 64, 32, 16))]
    backends = _backends(run)
    for dtype in (torch.bfloat16, torch.float32) if run.on_gpu else (torch.float32,):
        for queries, batch in itertools.product((None, 300), (1, 2)):
            problem = Problem.draw(shapes, batch, queries).on(run.device, dtype)
            _speed_of(run, problem, backends)


def _speed_of(run: Run, problem: Problem, backends: list[str]) -> None:
    """All but the fused forms are given locations and weights that were made before."""
    fused = (problem.value, problem.raw)
    value, locations, weights = problem.located(*fused)
    located = (value, locations, weights.to(value.dtype))
    contenders = {BACKENDS[backend]: (problem.fused(backend), fused) for backend in backends}
    with run.attempt(contender="others", **_case(problem)):  # a library may be broken
        found = others(problem, run.device)
        contenders |= {name: (call, located) for name, call in found.items()}
    exact = gradients(
        lambda features, *where: sum_of_samples(features, problem.shapes, *where),
        (value.float(), locations, weights),
        problem.grad.float(),
    )
    for name, (call, inputs) in contenders.items():
        case = {"contender": name, **_case(problem)}
        with run.attempt(**case):
            results = gradients(call, inputs, problem.grad)
            if inputs is fused:
                results = results[:2]  # output, and gradient of the value
            errors = [relative_error(*pair) for pair in zip(results, exact, strict=False)]
            run.say(**case, errors=errors, **_times(run, call, inputs, problem.grad))


def _case(problem: Problem) -> dict[str, object]:
    batch, queries, _ = problem.raw.shape
    of_tokens = "tokens" if problem.reference is None else queries
    return {"dtype": str(problem.value.dtype)[6:], "queries": of_tokens, "batch": batch}


def _backends(run: Run) -> list[str]:
    """The forms that can run on the device."""
    reasons = {backend: why_not(backend, run.device) for backend in BACKENDS}
    for backend, reason in reasons.items():
        if reason and run.on_gpu:
            run.say(backend=backend, skipped=reason[:300])
    return [backend for backend, reason in reasons.items() if not reason]


def _results(problem: Problem, backend: str) -> list[Tensor]:
    return gradients(problem.fused(backend), (problem.value, problem.raw), problem.grad)


def _times(run: Run, call: Operator, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, object]:
    if not run.on_gpu:
        return {}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    calls = {
        "forward_us": torch.no_grad()(lambda: call(*inputs)),
        "both_us": lambda: torch.autograd.grad(call(*leaves), leaves, grad),
    }
    try:
        return {name: replayed_microseconds(part) for name, part in calls.items()}
    except RuntimeError as error:  # it waits for the GPU, which a graph cannot
        run.wait()
        times = {name: round(1e3 * milliseconds(run, part), 1) for name, part in calls.items()}
        return {**times, "clock": f"with the host: {error}"[:200]}
