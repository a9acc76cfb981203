"""What an exported program computes, beside what the model computes.

Shape key: B images, N rows of an output (queries or detections).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskdino.export.engines import OnnxRuntime
from maskdino.export.trace import ExportOptions
from maskdino.system.errors import UserError

BOUND = 1e-3  # of an output's largest magnitude
ALLOWED_SHARE = 0.01  # of an output's values that may differ by more
# Outputs with one row for each query or detection, which may come in another order.
ROWS = {
    "predictions": ("class_logits", "boxes", "mask_embeddings"),
    "instance": ("boxes", "scores", "labels", "masks"),
}
Outputs = dict[str, Tensor]
Program = Callable[[list[Tensor]], Outputs]


class ExportError(UserError):
    """The exported program is not what the model computes."""


@dataclass(frozen=True)
class Difference:
    """How far an output of the program is from the model's, relative to its largest magnitude."""

    name: str
    largest: float
    share_beyond: float  # of the values that differ by more than BOUND

    def __str__(self) -> str:
        return (
            f"{self.name:<16} largest difference {self.largest:.1e}, "
            f"beyond {BOUND:g}: {self.share_beyond:.3%} of the values"
        )


def compare(expected: Outputs, found: Outputs, outputs: str) -> list[Difference]:
    """Compares what the model and the program computed; rows that swapped places are paired."""
    if set(expected) != set(found):
        raise ExportError(f"the program gives {sorted(found)}, the model {sorted(expected)}")
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise ExportError(
                f"{name} has the shape {tuple(found[name].shape)} instead of {tuple(value.shape)}"
            )
    found = _paired(expected, found, [n for n in ROWS.get(outputs, ()) if n in expected])
    return [_difference(name, value, found[name]) for name, value in expected.items()]


def _paired(expected: Outputs, found: Outputs, names: Sequence[str]) -> Outputs:
    """`found` with the rows of each image in the order in which they fit `expected` best."""
    found = dict(found)
    compact = [name for name in names if expected[name].dim() <= 3]
    for image in range(len(expected[names[0]]) if names else 0):
        ours, theirs = (
            torch.cat([_row_values(side[n][image], expected[n]) for n in compact], dim=1)
            for side in (expected, found)
        )
        cost = torch.cdist(ours[None], theirs[None], p=1)[0].nan_to_num(1e6)
        _, order = linear_sum_assignment(cost.numpy())
        for name in names:
            found[name] = found[name].clone()
            found[name][image] = found[name][image][torch.from_numpy(order)]
    return found


def _row_values(rows: Tensor, scale: Tensor) -> Tensor:
    """(N, ...) to (N, values) in units of the largest magnitude."""
    values = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
    return values.double() / _magnitude(scale)


def _magnitude(values: Tensor) -> float:
    return max(values.double().abs().max().item(), 1e-12) if values.numel() else 1.0


def _difference(name: str, expected: Tensor, found: Tensor) -> Difference:
    if expected.is_floating_point():
        distance = (expected.double() - found.double()).abs() / _magnitude(expected)
        distance = distance.nan_to_num(float("inf"))
    else:
        distance = (expected != found).double()
    if not distance.numel():
        return Difference(name, 0.0, 0.0)
    return Difference(name, distance.max().item(), (distance > BOUND).double().mean().item())


def program_of_trace(traced: torch.export.ExportedProgram) -> Program:
    """Runs a traced program in PyTorch."""
    module = traced.module()

    def run(arguments: list[Tensor]) -> Outputs:
        with torch.no_grad():
            return {name: value.cpu() for name, value in module(*arguments).items()}

    return run


def program_of_onnx(content: bytes, options: ExportOptions) -> Program:
    """Runs an ONNX file's content in onnxruntime, on the CPU."""
    engine = OnnxRuntime(content)
    return lambda arguments: engine.run(dict(zip(options.input_names, arguments, strict=True)))
