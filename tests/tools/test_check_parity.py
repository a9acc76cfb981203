"""The worked cases of the released models pass, and the tool notices where they would not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.conftest import load_module


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    path = repository / "tools" / "check_parity.py"
    return load_module(path)


@pytest.mark.parametrize("name", ["instance", "semantic_ce", "swin"])
def test_case_agrees(name: str, tool: ModuleType, parity: Path) -> None:
    """Every quantity within its bound, every kind of quantity present."""
    compared = list(tool.compare(tool.Case(parity, name)))
    beyond = {quantity: error for quantity, error, bound in compared if not error <= bound}
    assert not beyond
    groups = {quantity.split("/")[0] for quantity, *_ in compared}
    assert groups == {"eval", "result", "loss", "grad_norm"}
    assert {bound for *_, bound in compared} == {1e-4, 1e-3}


def test_all_cases_of_the_repository_are_compared_by_default(
    tool: ModuleType, parity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit status is 1 where one of them differs."""
    compared = []

    def of_case(folder: Path, name: str, device: str) -> str:
        assert folder == parity and device == "cpu"
        compared.append(name)
        return name

    monkeypatch.setattr(tool, "Case", of_case)
    monkeypatch.setattr(tool, "compare", lambda _: [("eval/pred_logits", 0.0, 1e-4)])
    assert tool.main([]) == 0
    assert compared == ["instance", "semantic_ce", "swin"]
    monkeypatch.setattr(
        tool, "compare", lambda case: [("eval/pred_logits", float(case == "instance"), 1e-4)]
    )
    assert tool.main([]) == 1
    assert tool.main(["--case", "swin"]) == 0


def test_a_case_that_is_not_there_is_refused(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for arguments in (["--case", "other"], ["--folder", str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):
            tool.main(arguments)
        assert "no case" in capsys.readouterr().err


def test_changed_weights_are_noticed(tool: ModuleType, parity: Path) -> None:
    case = tool.Case(parity, "semantic_ce")
    with torch.no_grad():
        case.model.decoder.layers[0].ffn.linear1.weight[0, 0] += 1.0
    for name, value in case.outputs():
        assert tool.relative_error(value.numpy(), case.expected[name]) > 1e-4, name


def test_relative_error(tool: ModuleType) -> None:
    expected = np.array([4.0, -10.0])
    assert tool.relative_error(np.array([4.0, -9.0]), expected) == pytest.approx(0.1)
    assert tool.relative_error(np.zeros(3), expected) == float("inf")
    assert tool.relative_error(np.zeros(0), np.zeros(0)) == 0
    assert not tool.relative_error(np.array([np.nan, 0.0]), expected) <= 1e-4


@pytest.mark.parametrize(
    ("ours", "released"),
    [
        ("loss_class", "loss/loss_ce"),
        ("loss_l1_layer2", "loss/loss_bbox_2"),
        ("loss_mask_dice_initial", "loss/loss_dice_0"),
        ("loss_giou_proposal", "loss/loss_giou_interm"),
        ("loss_mask_bce_denoising", "loss/loss_mask_dn"),
        ("loss_mask_bce_denoising_layer1", "loss/loss_mask_dn_1"),
    ],
)
def test_names_of_losses(ours: str, released: str, tool: ModuleType) -> None:
    assert tool.released_loss_name(ours) == released


def test_layers_count_from_zero_where_the_initial_prediction_is_not_supervised(
    tool: ModuleType,
) -> None:
    assert tool.released_loss_name("loss_l1_layer1", first_layer=1) == "loss/loss_bbox_0"
    assert tool.released_loss_name("loss_l1_denoising_layer2", 1) == "loss/loss_bbox_dn_1"


def test_instances_are_put_in_order(tool: ModuleType) -> None:
    def of_image(*rows: tuple[float, int]) -> dict[str, np.ndarray]:
        boxes = np.array([[x, 0.0, x + 1.0, 1.0] for x, _ in rows]).reshape(-1, 4)
        classes = np.array([label for _, label in rows], np.int64)
        return {"result/0/instances/boxes": boxes, "result/0/instances/classes": classes}

    expected, computed = of_image((0, 1), (0, 2), (5, 1)), of_image((5, 1), (0, 2), (0, 1))
    tool.align_instances(computed, expected, 0)
    for name, value in expected.items():
        assert np.array_equal(computed[name], value)
    nothing = of_image()
    tool.align_instances(nothing, of_image(), 0)
    tool.align_instances({}, expected, 0)
    assert len(nothing["result/0/instances/boxes"]) == 0


def test_maps_that_a_case_kept_in_part(tool: ModuleType) -> None:
    values = np.arange(32.0, dtype=np.float32).reshape(2, 4, 4)
    kept = values.reshape(2, 2, 2, 2, 2).mean((2, 4))
    assert np.array_equal(tool.pooled(values, kept), kept)
    assert np.array_equal(tool.pooled(values, values), values)
    segments = np.arange(16).reshape(4, 4)
    assert np.array_equal(tool.pooled(segments, segments[::2, ::2]), segments[::2, ::2])
    assert np.array_equal(tool.pooled(segments, segments), segments)
