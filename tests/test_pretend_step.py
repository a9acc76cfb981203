"""Whole models on the pretend device: launches and waits of steps and images; gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils import _foreach_utils

from maskdino.config import load_config
from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.engine.train_step import TrainStep
from maskdino.losses import matcher
from maskdino.model import MaskDINO
from maskdino.modeling import layers, norms
from maskdino.ops import _library
from maskdino.ops.recompute import LEVELS
from tests.helpers import CHANNELS, NARROW, NODE, drawn_batch, tiny_cfg
from tests.pretend_backward import backward
from tests.pretend_device import OnDevice, PretendDevice, missing_api
from tests.test_pretend_device import SIZES, TRAINING, autocast, entered, infer, on_device

pytestmark = [
    pytest.mark.skipif(bool(missing_api()), reason=missing_api()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
]

# The R50 model's layers; widths, queries and points are few, and launch no less.
LAYERS = {
    f"{NODE}ENCODER.NUM_LAYERS": 6,
    f"{NODE}DECODER.NUM_LAYERS": 9,
    f"{NODE}DENOISING.NUM_QUERIES": 100,
}
OBJECTS = (5, 3)
OUTPUTS_AT_ONCE = 4  # whose costs that model's 300 queries and 12,544 points leave room for
FORWARD, STEP = 1140, 2690  # launches: forward pass with losses, and the whole step
INFERENCE = {"instance": (450, 1), "panoptic": (480, 2)}  # launches and waits from image to results


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    """The device, with gradients, and with one launch for many tensors where CUDA has it."""
    monkeypatch.setattr(OnDevice, "backward", backward, raising=False)
    known = [*_foreach_utils._foreach_supported_types, OnDevice]
    monkeypatch.setattr(_foreach_utils, "_foreach_supported_types", known)
    with entered() as device:
        yield device


@pytest.mark.skipif(not _library.has("add_norm_train"), reason="PyTorch's operators need more")
def test_launches_and_waits_of_a_step(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config(None, [word for item in (NARROW | LAYERS).items() for word in item])
    elements = OUTPUTS_AT_ONCE * (12 + CHANNELS) * 64
    monkeypatch.setattr(matcher, "ELEMENTS_AT_ONCE", elements)
    model = device.put(MaskDINO(cfg))
    step = TrainStep(
        model,
        build_optimizer(cfg, model),
        build_gradient_clipper(cfg),
        accumulation_steps=1,
        mixed_precision=True,
    )
    forward: list[int] = []
    losses = model.losses

    def counted(*args: object) -> dict[str, torch.Tensor]:
        try:
            return losses(*args)
        finally:
            forward.append(device.launches.total())

    monkeypatch.setattr(model, "losses", counted)
    step.run(iter([drawn_batch(SIZES, OBJECTS)]))
    device.clear()
    scalars = step.run(iter([drawn_batch(SIZES, OBJECTS)]))
    assert np.isfinite(list(scalars.values())).all()
    assert device.waits == TRAINING
    assert forward[-1] <= FORWARD
    assert device.launches.total() <= STEP, device.launches.most_common(12)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_what_a_graph_would_hold_asks_nothing_of_the_host(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    """The network of a step (SOLVER.CUDA_GRAPHS): a capture allows neither waits nor such copies.

    The first call may: it makes what depends on sizes alone.
    """
    _, model = on_device(device, "instance", "bfloat16", RECOMPUTE=recompute)
    model.train()
    network, inside = model._network, []

    def watched(*inputs: torch.Tensor) -> object:
        device.clear()
        found = network(*inputs)
        inside.append((device.launches.total(), dict(device.waits), dict(device.copies)))
        return found

    monkeypatch.setattr(model, "_network", watched)
    for objects in (OBJECTS, (1, 2)):
        with autocast(torch.bfloat16):
            losses = model(drawn_batch(SIZES, objects))
        waits = device.waits.total(), device.copies.total()
        backward(torch.stack(list(losses.values())).sum())
        assert (device.waits.total(), device.copies.total()) == waits  # nor does the way back
    launches, *asked = inside[1]
    assert launches > 100 and asked == [{}, {}]


@pytest.mark.skipif(not _library.has("predict_boxes"), reason="PyTorch's operators need more")
@pytest.mark.parametrize("task", INFERENCE)
def test_launches_and_waits_of_an_image(device: PretendDevice, task: str) -> None:
    layers = {"ENCODER__NUM_LAYERS": 6, "DECODER__NUM_LAYERS": 9}
    _, model = on_device(device, task, "bfloat16", **layers)
    model.inference = replace(model.inference, semantic_on=False)
    infer(device, model)
    launches, waits = INFERENCE[task]
    assert device.launches.total() <= launches, device.launches.most_common(12)
    assert device.waits.total() == waits


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predictions_are_those_of_the_steps_one_by_one(
    device: PretendDevice, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms and boxes of inference, which the compiled library makes in one launch each."""
    if not (_library.has("add_norm") and _library.has("predict_boxes")):
        pytest.skip("the compiled library is not built, or it was built before these operators")
    _, model = on_device(device, "instance", precision)
    images = model.preprocess(drawn_batch(SIZES, (0, 0))).tensor
    found = model.predict_precisely(images)[0]
    device.clear()
    model.predict_precisely(images)
    fused = device.launches.total()
    monkeypatch.setattr(layers, "has_compiled", lambda *_: False)
    device.clear()
    expected = model.predict_precisely(images)[0]
    assert device.launches.total() >= fused + 10
    for name in ("class_logits", "boxes", "mask_embeddings", "content"):
        assert torch.equal(getattr(found, name).numbers, getattr(expected, name).numbers), name


@torch.no_grad()
@pytest.mark.skipif(not _library.has("group_norm"), reason="built before this operator, or not")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_predictions_are_those_of_pytorchs_group_norms(
    device: PretendDevice, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = on_device(device, "instance", precision)
    images = model.preprocess(drawn_batch(SIZES, (0, 0))).tensor
    device.clear()
    predictions, pixels = model.predict_precisely(images)
    assert device.launches["group_norm"] == 6  # four levels, two of the pixel embedding
    assert not {"native_group_norm", "upsample_bilinear2d"} & device.launches.keys()
    monkeypatch.setattr(norms, "has_compiled", lambda *_: False)
    expected, expected_pixels = model.predict_precisely(images)
    assert pixels.dtype == expected_pixels.dtype
    bounds = (
        {"atol": 1e-4, "rtol": 1e-4} if precision == "float32" else {"atol": 0.05, "rtol": 0.05}
    )
    torch.testing.assert_close(pixels.numbers.float(), expected_pixels.numbers.float(), **bounds)
    if precision == "float32":  # in half precision other queries may be chosen
        torch.testing.assert_close(predictions.boxes.numbers, expected.boxes.numbers, **bounds)


@pytest.mark.parametrize("objects", [OBJECTS, (0, 0)], ids=str)
def test_gradients_are_those_of_the_cpu(device: PretendDevice, objects: tuple[int, int]) -> None:
    """An error in the pretended backward pass would hide those that it is to find."""
    models = []
    for place in (lambda model: model, device.put):
        torch.manual_seed(1)
        model = place(MaskDINO(tiny_cfg())).train()
        torch.manual_seed(2)
        batch = drawn_batch(SIZES, objects)
        sum(model(batch).values()).backward()
        models.append(model)
    plain, pretended = (dict(model.named_parameters()) for model in models)
    for name, parameter in plain.items():
        if parameter.requires_grad:
            found = pretended[name].grad.numbers
            scale = parameter.grad.norm().clamp(min=1e-6)
            assert (found - parameter.grad).norm() < 1e-3 * scale, name


def learning(device: PretendDevice, level: str) -> tuple[MaskDINO, dict[str, torch.Tensor]]:
    """A model that recomputes, and its losses in half precision; only these are recorded."""
    torch.manual_seed(1)
    model = MaskDINO(tiny_cfg(RECOMPUTE=level, ENCODER__NUM_LAYERS=2)).train()
    for name, weight in model.named_parameters():  # zeros at first: queries had no gradient
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            torch.nn.init.normal_(weight, std=0.05)
    device.put(model)
    torch.manual_seed(2)
    device.clear()
    with autocast(torch.bfloat16):
        return model, model(drawn_batch(SIZES, OBJECTS))


@pytest.mark.skipif(not _library.has("add_norm_train"), reason="the library was built earlier")
@pytest.mark.parametrize("level", ["none", "cheap", "all"])
def test_gradients_are_those_of_the_norms_one_by_one(
    device: PretendDevice, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, also where layers are computed again."""
    found = []
    for has in (layers.has_compiled, lambda *_: False):
        monkeypatch.setattr(layers, "has_compiled", has)
        model, losses = learning(device, level)
        sum(losses.values()).backward()
        grads = {n: p.grad.numbers for n, p in model.named_parameters() if p.grad is not None}
        found.append((losses, grads, device.launches["add_norm_backward"]))
    (losses, grads, launches), (expected_losses, expected, others) = found
    assert (launches, others) == (10, 0)
    for name, loss in expected_losses.items():
        assert torch.equal(losses[name].numbers, loss.numbers), name
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        error = (grads[name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, error)


@pytest.mark.skipif(not _library.has("add_norm_train"), reason="the library was built earlier")
def test_levels_of_recomputing_have_the_same_gradients(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in half precision: as a GPU computes, with ReLU in products and without."""
    found, launches = [], []
    for worth in (1 << 62, 0):
        monkeypatch.setattr(layers, "WORTH_FUSING", worth)
        for level in LEVELS:
            model, losses = learning(device, level)
            launches.append(device.launches["_addmm_activation"])
            sum(losses.values()).backward()
            named = model.named_parameters()
            found.append(losses | {n: p.grad for n, p in named if p.grad is not None})
    assert launches[:3] == [0] * 3 and min(launches[3:]) > 0
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, tensor in found[0].items():
            assert torch.equal(other[name].numbers, tensor.numbers), name
