"""Deformable attention alone: is it right, and how long does it take.

Shape key: B images, S tokens, Q queries; 8 heads of 32 channels, 4 levels, 4 points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from benchmarks.operator import peers, why_not
from torch import Tensor

from gpu_checks.common import Run, relative_error, replayed_microseconds
from maskdino.ops.ms_deform_attn import (
    compiled_op_available,
    locations_and_weights,
    ms_deform_attn,
    ms_deform_attn_fused,
)

HEADS, CHANNELS, POINTS = 8, 32, 4
BACKENDS = ("compiled", "triton", "reference")
DRY_SHAPES = [(9, 7), (5, 4), (3, 2), (1, 1)]
# Bounds of the relative error of outputs and gradients, by the type of features.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Channels of a head, and spread of the offsets in cells: as a model begins, and far.
CASES = ((CHANNELS, 2.0), (CHANNELS, 12.0), (16, 2.0))


@dataclass(frozen=True)
class Problem:
    """Random inputs of one call, in float32 on the CPU."""

    shapes: list[tuple[int, int]]
    value: Tensor  # (B, S, M, D)
    raw: Tensor  # (B, Q, M * L * P * 3)
    reference: Tensor | None  # (B, Q, 4), None where the tokens are the queries
    grad: Tensor  # (B, Q, M * D)

    @staticmethod
    def draw(
        shapes: list[tuple[int, int]],
        batch: int,
        queries: int | None,
        spread: float = 2.0,
        channels: int = CHANNELS,
    ) -> Problem:
        """Random tensors; `spread` is the deviation of the offsets, in cells."""
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

    def off_the_kinks(self) -> Problem:
        """The same, with samples moved away from pixel centers, where gradients jump.

        Rounded offsets from a token's own cell often meet one, and then float32 and float64 may
        stand on different sides of it.
        """
        raw = self.raw.clone()
        samples = HEADS * len(self.shapes) * POINTS
        sizes = torch.tensor([(w, h) for h, w in self.shapes], dtype=torch.float64)[:, None]
        for _ in range(20):
            locations, _ = locations_and_weights(
                self.value.double(), self.shapes, raw.double(), self.reference, POINTS
            )
            pixels = locations * sizes - 0.5
            near = ((pixels - pixels.round()).abs() < 1e-3).flatten(2)
            if not near.any():
                break
            raw[..., : 2 * samples] += (0.3 * near).to(raw.dtype)
        return replace(self, raw=raw)

    def on(self, device: str, dtype: torch.dtype) -> Problem:
        """The same numbers elsewhere; the reference stays float32, or becomes float64."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        moved = None if self.reference is None else self.reference.to(device, wide)
        value, raw, grad = (t.to(device, dtype) for t in (self.value, self.raw, self.grad))
        return Problem(self.shapes, value, raw, moved, grad)


def is_right(run: Run) -> None:
    """Output and gradients on the device, in each type, against float64 on the CPU."""
    shapes = DRY_SHAPES if run.dry else [(32, 44), (16, 22), (8, 11), (4, 6)]
    cases = itertools.product((None, 40 if run.dry else 300), CASES, BOUNDS)
    backends = _backends(run)
    for queries, (channels, spread), dtype in cases:
        # What rounding the inputs costs is not the operator's error.
        rounded = Problem.draw(shapes, 2, queries, spread, channels).on("cpu", dtype)
        rounded = rounded.off_the_kinks()
        exact = _results(rounded.on("cpu", torch.float64), "reference")
        case = {
            "dtype": str(dtype)[6:],
            "queries": queries or "tokens",
            "channels": channels,
            "spread": spread,
        }
        for backend in backends:
            if backend == "triton" and (channels, spread) != CASES[0]:
                continue  # seconds of compilation each; its tests have all of them
            _compare(run, {"backend": backend, **case}, rounded.on(run.device, dtype), exact)


def _compare(run: Run, case: dict, problem: Problem, exact: list[Tensor]) -> None:
    try:
        found = _results(problem, case["backend"])
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    except Exception as error:  # noqa: BLE001 - the next case is worth trying
        run.say("operator_is_right", **case, FAILED=f"{type(error).__name__}: {error}"[:400])
        return
    bound = BOUNDS[problem.value.dtype]
    rounded = [float(f"{error:.2g}") for error in errors]
    run.say("operator_is_right", **case, errors=rounded, ok=all(e < bound for e in errors))


def speed(run: Run) -> None:
    """Times on the GPU alone, from a replayed graph, of every form and every peer."""
    if not run.on_gpu:
        run.say("operator_speed", skipped="times are taken on a GPU alone")
        return
    shapes, backends = [(128, 128), (64, 64), (32, 32), (16, 16)], _backends(run)
    for dtype in (torch.bfloat16, torch.float32):
        for queries in (None, 300):
            for batch in (1, 2):
                problem = Problem.draw(shapes, batch, queries).on("cuda", dtype)
                for name, call in _contenders(problem, backends).items():
                    _time(run, name, call, problem)


def _backends(run: Run) -> list[str]:
    """The forms that can run on the device."""
    reasons = {backend: why_not(backend, run.device) for backend in BACKENDS}
    for backend, reason in reasons.items():
        if reason and run.on_gpu:
            run.say("operator_is_right", backend=backend, skipped=reason[:300])
    return [backend for backend, reason in reasons.items() if not reason]


def _results(problem: Problem, backend: str) -> list[Tensor]:
    """Output, and gradients of value and offsets and logits."""
    value, raw = (t.clone().requires_grad_() for t in (problem.value, problem.raw))
    output = ms_deform_attn_fused(
        value, problem.shapes, raw, problem.reference, POINTS, backend=backend
    )
    return [output.detach(), *torch.autograd.grad(output, (value, raw), problem.grad)]


Contender = Callable[[Tensor, Tensor], Tensor]


def _contenders(problem: Problem, backends: list[str]) -> dict[str, Contender]:
    """All take (value, offsets and logits); peers are given locations and weights made before."""

    def fused(backend: str) -> Contender:
        return lambda value, raw: ms_deform_attn_fused(
            value, problem.shapes, raw, problem.reference, POINTS, backend=backend
        )

    found = {f"{backend}, fused": fused(backend) for backend in backends}
    locations, weights = locations_and_weights(
        problem.value, problem.shapes, problem.raw, problem.reference, POINTS
    )
    if compiled_op_available("cuda"):
        found["compiled, locations and weights"] = lambda value, _: ms_deform_attn(
            value, problem.shapes, locations, weights, "compiled"
        )
    for name, call in peers(problem.shapes, "cuda").items():
        found[name] = lambda value, _, call=call: call(value, locations, weights)
    return found


def _time(run: Run, name: str, call: Contender, problem: Problem) -> None:
    """Forward alone, and forward with backward, of the value and, where it has one, the raw."""
    value, raw = problem.value, problem.raw
    case = {
        "dtype": str(value.dtype)[6:],
        "queries": raw.shape[1],
        "batch": raw.shape[0],
        "contender": name,
    }

    @torch.no_grad()
    def forward() -> Tensor:
        return call(value, raw)

    inputs = [value.clone().requires_grad_(), raw.clone().requires_grad_()]
    wanted = inputs if "fused" in name else inputs[:1]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*inputs), wanted, problem.grad)

    try:
        times = {"forward_us": replayed_microseconds(forward)}
        times["both_us"] = replayed_microseconds(both)
    except Exception as error:  # noqa: BLE001 - a peer that fails costs its own line only
        run.say("operator_speed", **case, FAILED=f"{type(error).__name__}: {error}"[:300])
        return
    run.say("operator_speed", **case, **times)
