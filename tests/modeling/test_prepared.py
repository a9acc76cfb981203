"""The network prepared for inference computes what the model computes, and follows its weights."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maskdino.model import MaskDINO
from maskdino.structures import Predictions
from maskdino.system.precision import network_precision
from tests.helpers import drawn_batch, tiny_model

CPU = torch.device("cpu")


def drawn_model(**overrides: object) -> MaskDINO:
    """With norms that have seen images."""
    torch.manual_seed(0)
    model = tiny_model(**overrides).eval()
    for module in model.backbone.modules():
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.running_mean.normal_()
            module.bias.normal_()
    return model


@torch.no_grad()
def predicted(model: MaskDINO, *, prepared: bool = True) -> list[Tensor]:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    if prepared:
        predictions, pixels = model.predict_precisely(images)
    else:
        with network_precision(model.inference.precision, CPU):
            predictions, pixels = model.predict(images)
    return parts(predictions, pixels)


def parts(predictions: Predictions, pixels: Tensor) -> list[Tensor]:
    found = (predictions.class_logits, predictions.boxes, predictions.mask_embeddings, pixels)
    return [part.float() for part in found]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def used(model: MaskDINO) -> MaskDINO:
    with torch.no_grad():
        return model._prepared.of(model, model.heads.in_full, CPU)


def test_it_computes_the_same() -> None:
    model = drawn_model()
    assert_close(predicted(model), predicted(model, prepared=False))
    network = used(model)
    assert network is not model and used(model) is network
    assert network.backbone.stem.conv1.norm is None
    assert network.heads.class_head.weight is model.heads.class_head.weight
    assert model.backbone.stem.conv1.norm is not None


def test_in_bfloat16_it_is_as_near_to_float32() -> None:
    exact = predicted(drawn_model())[-1]
    model = drawn_model(TEST__PRECISION="bfloat16")
    errors = [
        (predicted(model, prepared=p)[-1] - exact).norm() / exact.norm() for p in (True, False)
    ]
    assert 0 < errors[0] < 1.1 * errors[1] < 0.05
    with network_precision("bfloat16", CPU):
        network = used(model)
    assert network.encoder.layers[0].ffn.linear1.weight.dtype == torch.bfloat16
    assert network.heads.class_head.weight.dtype == torch.float32


def change_in_place(model: MaskDINO) -> None:
    with torch.no_grad():
        model.backbone.stem.conv1.weight.mul_(2)
        model.backbone.res2[0].conv1.norm.bias.add_(0.5)
        model.encoder.layers[0].self_attn.sampling_offsets.bias.add_(1)


def load(model: MaskDINO) -> None:
    model.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in state(model)})


def assign(model: MaskDINO) -> None:
    model.load_state_dict(
        {k: 1.1 * v if v.is_floating_point() else v for k, v in state(model)}, assign=True
    )


def state(model: MaskDINO) -> list[tuple[str, Tensor]]:
    return [(key, value.clone()) for key, value in model.state_dict().items()]


def replace_data(model: MaskDINO) -> None:
    weight = model.backbone.stem.conv1.weight
    weight.data = 2 * weight.data


def train(model: MaskDINO) -> None:
    model.train()
    model.backbone.stem.conv1.weight.data.mul_(2)
    model.eval()


def set_option(model: MaskDINO) -> None:
    model.query_selection.num_queries = 5


def replace_layer(model: MaskDINO) -> None:
    layer = model.encoder.layers[0].ffn.linear1
    model.encoder.layers[0].ffn.linear1 = torch.nn.Linear(layer.in_features, layer.out_features)


def replace_norm(model: MaskDINO) -> None:
    norm = copy.deepcopy(model.backbone.stem.conv1.norm)
    norm.weight.data.mul_(2)
    model.backbone.stem.conv1.norm = norm


def replace_tables(model: MaskDINO) -> None:
    """Also what changes in the new one is seen."""
    norm = model.backbone.res2[0].conv1.norm
    norm._buffers = dict(norm._buffers)
    norm._parameters = dict(norm._parameters)
    used(model)
    name = "weight" if "weight" in norm._parameters else "running_var"
    value = getattr(norm, name)
    setattr(norm, name, type(value)(2 * value.detach()))


def add_bias(model: MaskDINO) -> None:
    conv = model.backbone.stem.conv1
    assert conv.bias is None
    conv.bias = torch.nn.Parameter(torch.full((conv.out_channels,), 0.5))


def swap_tensors(model: MaskDINO) -> None:
    weight = model.backbone.stem.conv1.weight
    torch.utils.swap_tensors(weight, torch.nn.Parameter(2 * weight.detach()))


CHANGES = [
    change_in_place, load, assign, replace_data, train, set_option, replace_layer, replace_norm,
    replace_tables, add_bias, swap_tensors,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_the_model(change) -> None:
    model = drawn_model()
    before = predicted(model)
    change(model)
    expected = predicted(model, prepared=False)
    assert_close(predicted(model), expected)
    assert before[0].shape != expected[0].shape or (before[0] - expected[0]).abs().max() > 1e-2


@torch.no_grad()
def test_it_follows_attributes_that_were_not_there() -> None:
    model = drawn_model()
    used(model)
    for value in (3, 4, "a word", ["no longer plain"], None, 5.0):
        model.query_selection.of_a_user = value
        assert used(model).query_selection.of_a_user == value
    del model.query_selection.of_a_user
    model.query_selection.other = 6
    assert used(model).query_selection.other == 6


def test_a_graph_with_an_attribute_of_before_is_not_replayed() -> None:
    """Graphs are kept by network."""
    model = drawn_model()
    for name in ("size_divisibility", "of_a_user"):
        before = used(model)
        setattr(model, name, 64)
        after = used(model)
        assert after is not before and used(model) is after
        assert getattr(after, name) == 64
        assert after.backbone.stem.conv1.weight is before.backbone.stem.conv1.weight
        model.inference = replace(model.inference, max_detections=7)  # has its own place in keys
        assert used(model) is after


def test_in_place_changes_keep_the_addresses_that_graphs_read() -> None:
    model = drawn_model()
    predicted(model)
    network = used(model)
    change_in_place(model)
    predicted(model)
    assert used(model) is network


def test_hooks_gradients_and_training_see_the_model_itself() -> None:
    model = drawn_model()
    assert model._prepared.of(model, (), CPU) is model  # gradients are asked for
    seen: list[object] = []
    handle = model.decoder.register_forward_hook(lambda *_: seen.append(_[2]))
    predicted(model)
    assert len(seen[0]) == 1 + len(model.decoder.layers)
    handle.remove()
    assert used(model) is not model
    assert used(model.train()) is model


def test_hooks_wherever_they_are() -> None:
    model = drawn_model()
    network = used(model)
    layer = model.encoder.layers[0].self_attn
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert used(model) is model
        handle.remove()
        assert used(model) is network
    layer._forward_hooks = OrderedDict()  # an idiom for leaving out all hooks
    layer.register_forward_hook(lambda *_: None)
    assert used(model) is model
    layer._forward_hooks.clear()
    model.decoder.layers[0].ffn.linear2 = layer = torch.nn.Linear(8, 8)
    assert used(model) is not network
    layer.register_forward_hook(lambda *_: None)
    assert used(model) is model


def test_copies_of_a_model_begin_without() -> None:
    model = drawn_model()
    expected = predicted(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._prepared._copies
        assert_close(predicted(other), expected)
    names = [name for name, _ in model.named_modules()]
    assert not any("prepared" in name for name in (*names, *model.state_dict()))


def test_a_model_that_cannot_be_copied_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = drawn_model()
    model.backbone.generator = (i for i in range(3))
    assert len(model(drawn_batch([(64, 64)], [0]))[0]["instances"])
    assert used(model) is model
    assert "not prepared" in caplog.text
