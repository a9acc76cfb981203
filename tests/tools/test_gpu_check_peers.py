"""What stands beside this package on a GPU is compared rightly, and the sides are kept apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

STAND_IN = """
import torch

def ms_deform_attn_forward(value, sizes, starts, locations, weights, step):
    from maskdino.ops.ms_deform_attn import ms_deform_attn_reference
    assert starts.tolist() == [0, 64, 80, 84] and step == 128
    return ms_deform_attn_reference(value, sizes.tolist(), locations, weights)

def ms_deform_attn_backward(value, sizes, starts, locations, weights, grad, step):
    inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(inputs[0], sizes, starts, *inputs[1:], step)
    return torch.autograd.grad(output, inputs, grad)
"""


pytestmark = pytest.mark.usefixtures("tools")


@pytest.fixture
def tools(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the tools is on the module path while a test runs."""
    monkeypatch.syspath_prepend(str(repository / "tools"))


def test_queries_are_paired_by_nearness_before_they_are_compared() -> None:
    from gpu_checks.peers import differences

    torch.manual_seed(0)
    expected = {
        "logits": torch.randn(20, 5),
        "boxes": torch.rand(20, 4),
        "masks": torch.randn(20, 3, 3),
    }
    order = torch.randperm(20)
    shuffled = {part: tensor[order] for part, tensor in expected.items()}
    errors, moved = differences(shuffled, expected)
    assert errors == {"logits": 0.0, "boxes": 0.0, "masks": 0.0}
    assert moved == int((order != torch.arange(20)).sum()) > 0
    shuffled["masks"] = shuffled["masks"] + 0.01 * expected["masks"].abs().max()
    errors, _ = differences(shuffled, expected)
    assert errors["masks"] == pytest.approx(0.01, rel=0.05) and errors["logits"] == 0.0


def test_both_sides_are_given_the_same_images() -> None:
    from benchmarks.drawn import drawn_input

    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(drawn_input(96, 96, 10, 80, lambda masks: masks))
    first, again = drawn
    assert torch.equal(first["image"], again["image"])
    masks, boxes = first["instances"].gt_masks, first["instances"].gt_boxes.tensor
    assert masks.shape == (10, 96, 96) and torch.equal(masks, again["instances"].gt_masks)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        rows, columns = mask.nonzero().unbind(1)
        assert left <= columns.min() and columns.max() < right
        assert top <= rows.min() and rows.max() < bottom


def test_the_package_of_the_other_side_is_refused(tmp_path: Path) -> None:
    from gpu_checks.peers import _check_origin

    package = ModuleType("maskdino")
    package.__file__ = str(tmp_path / "maskdino" / "__init__.py")
    _check_origin(package, tmp_path)
    with pytest.raises(ImportError, match="not from"):
        _check_origin(package, tmp_path / "other")


def operator_speed(folder: Path, released: str, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the step says beside a released module of this text."""
    from benchmarks.operator import RELEASED
    from gpu_checks import operators
    from gpu_checks.common import LINES, Run

    (folder / f"{RELEASED}.py").write_text(released)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    try:
        operators.speed(Run("operator_speed", folder, "cpu", True, folder))
    finally:
        sys.modules.pop(RELEASED, None)
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def test_the_released_operator_is_called_as_it_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = operator_speed(tmp_path, STAND_IN, monkeypatch)
    released = [line for line in lines if line["contender"] == "released"]
    cases = [("tokens", 1), ("tokens", 2), (300, 1), (300, 2)]
    assert [(line["queries"], line["batch"]) for line in released] == cases
    assert not any("FAILED" in line for line in lines)
    assert all(len(line["errors"]) == 4 for line in released)
    assert all(error < 1e-5 for line in lines for error in line["errors"])


def test_a_released_operator_that_cannot_be_imported_costs_no_times_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = operator_speed(tmp_path, "raise ImportError('undefined symbol')", monkeypatch)
    failed = [line["FAILED"] for line in lines if "FAILED" in line]
    assert failed == ["ImportError: undefined symbol"] * 4
    ours = [line["errors"] for line in lines if line["contender"] == "PyTorch (grid_sample)"]
    assert len(ours) == 4 and all(error < 1e-5 for errors in ours for error in errors)
