"""MODEL.MASK_DINO.RECOMPUTE: the same losses and gradients, and less that is kept for them."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from maskdino.backbones.resnet import recompute_first_stages
from maskdino.model import MaskDINO
from maskdino.modeling import layers
from maskdino.ops import _library
from maskdino.ops.recompute import LEVELS, set_recompute
from tests.helpers import drawn_batch, tiny_cfg, tiny_model

# Shares of the layers as in the published models: feed-forward networks are wide, points many.
SHAPE = {
    "ENCODER__NUM_LAYERS": 3,
    "ENCODER__FEEDFORWARD_DIM": 512,
    "LOSS__NUM_POINTS": 1024,
}
SIZES, OBJECTS = ((128, 128), (96, 128)), (3, 2)
KEPT = {"cheap": 0.46, "all": 0.29}  # at most, of what is kept without recomputing


def model(level: str) -> MaskDINO:
    torch.manual_seed(0)
    return tiny_model(RECOMPUTE=level, **SHAPE).train()


def step(trained: MaskDINO) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    torch.manual_seed(1)
    total = torch.stack(list(trained(drawn_batch(SIZES, OBJECTS)).values())).sum()
    total.backward()
    return total.detach(), {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("level", KEPT)
def test_gradients_stay_and_less_is_kept(
    level: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(repository / "tools")
    kept_mebibytes = importlib.import_module("benchmarks.training").kept_mebibytes
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    kept = {}
    for form in ("none", level):
        trained = model(form)
        kept[form] = kept_mebibytes(lambda t=trained, f=form: found.update({f: step(t)}))
    (loss, gradients), (expected, expected_gradients) = found[level], found["none"]
    assert torch.equal(loss, expected) and gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    assert kept[level] <= KEPT[level] * kept["none"], kept


@pytest.mark.skipif(not _library.has("add_norm_train"), reason="the library was built earlier")
@pytest.mark.parametrize("level", LEVELS)
def test_norms_of_sums_keep_no_more(
    level: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's way to norm, in which a layer hands on what the next one reads."""
    monkeypatch.syspath_prepend(repository / "tools")
    kept_mebibytes = importlib.import_module("benchmarks.training").kept_mebibytes
    found, kept = [], []
    for fused in (False, True):
        monkeypatch.setattr(layers, "is_norm_fused", lambda *_, f=fused: f)
        trained = model(level)
        kept.append(kept_mebibytes(lambda t=trained: found.append(step(t))))
    (expected_loss, expected), (loss, gradients) = found
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert kept[1] <= kept[0] * 1.001


def test_a_backbone_keeps_its_names_and_its_copies_compute_by_themselves() -> None:
    plain, trained = model("none"), model("all")
    assert trained.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(trained)
    torch.nn.init.zeros_(trained.backbone.stem.conv1.weight)
    images = torch.randn(1, 3, 64, 64)
    found, expected = (m.backbone(images)["res5"] for m in (copied, plain))
    assert torch.equal(found, expected)


def test_a_frozen_stem_has_nothing_to_recompute() -> None:
    cfg = tiny_cfg(RECOMPUTE="all")
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    _, gradients = step(MaskDINO(cfg).train())
    assert not any(name.startswith(("backbone.stem", "backbone.res2")) for name in gradients)
    assert "backbone.res3.0.conv1.weight" in gradients


def test_nothing_is_recomputed_in_evaluation() -> None:
    trained = model("all").eval()
    assert isinstance(trained.backbone, ResNet)
    calls = []
    trained.backbone.stem.conv1.register_forward_hook(lambda *_: calls.append(1))
    trained.backbone(torch.randn(1, 3, 64, 64))["res3"].sum().backward()
    assert len(calls) == 1


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"RECOMPUTE is 'much'; it must be one of \('none', 'ch"):
        set_recompute(torch.nn.Linear(1, 1), "much")


def test_other_backbones_stay_as_they_are() -> None:
    backbone = torch.nn.Linear(1, 1)
    recompute_first_stages(backbone, "all")
    assert "forward" not in vars(backbone)
