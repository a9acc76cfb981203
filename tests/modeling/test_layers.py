"""Embeddings and positions against their formulas, one number at a time."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from maskdino.modeling import attention, layers
from maskdino.modeling.layers import (
    MLP,
    add_norm,
    box_sine_embedding,
    copy_of,
    has_onednn,
    linear,
    linear_relu,
    map_sine_embedding,
    rounded,
)
from maskdino.ops.recompute import remaking

CPU = torch.device("cpu")


def slow_sine(value: float, channels: int) -> list[float]:
    """Embedding of a value in turns: sine on even channels, cosine on odd ones."""
    embedding = []
    for channel in range(channels):
        angle = 2 * math.pi * value / 10000 ** (2 * (channel // 2) / channels)
        embedding.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return embedding


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_map_embedding(size: tuple[int, int]) -> None:
    height, width = size
    first, found = map_sine_embedding(((2, 3), size), 16, CPU).split([6, height * width])
    assert torch.equal(first, map_sine_embedding(((2, 3),), 16, CPU))
    for row in range(height):
        for column in range(width):
            y, x = (row + 1) / (height + 1e-6), (column + 1) / (width + 1e-6)
            expected = torch.tensor(slow_sine(y, 8) + slow_sine(x, 8))
            torch.testing.assert_close(found[row * width + column], expected, atol=1e-5, rtol=0)


def test_box_embedding_is_of_y_x_width_height() -> None:
    x, y, width, height = 0.1, 0.7, 0.3, 0.25
    found = box_sine_embedding(torch.tensor([x, y, width, height]), 6)
    expected = torch.tensor([v for part in (y, x, width, height) for v in slow_sine(part, 6)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_constants_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        first = map_sine_embedding(((7, 11),), 8, CPU)
    assert map_sine_embedding(((7, 11),), 8, CPU) is first  # kept
    assert not first.is_inference()
    weight = torch.ones(8, requires_grad=True)
    (first * weight).sum().backward()
    torch.testing.assert_close(weight.grad, first.sum(0))


@pytest.mark.parametrize("learned", [True, False])
def test_sums_are_rounded_once(learned: bool) -> None:
    first = torch.rand(3, 5, 4).transpose(0, 1).requires_grad_()  # not dense
    second = torch.rand(3, 4).bfloat16()
    with torch.set_grad_enabled(learned):
        found = rounded(torch.add, first, second, to=torch.bfloat16)
    assert torch.equal(found, (first + second).bfloat16()) and found.requires_grad == learned
    assert found.stride() == first.stride()
    assert rounded(torch.sin, first, to=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("learned", [True, False])
def test_add_norm(learned: bool) -> None:
    """Of a sum; what is read next has the position, in the type of the update."""
    norm, x, position = torch.nn.LayerNorm(6), torch.randn(2, 3, 6), torch.randn(3, 6)
    torch.nn.init.normal_(norm.weight)
    for dtype in (torch.float32, torch.bfloat16):
        update = torch.randn(2, 3, 6).to(dtype)
        expected = norm(x + update)
        with torch.set_grad_enabled(learned):
            normed, read, *_ = add_norm(norm, x, update, read=True)
            assert torch.equal(normed, expected) and torch.equal(read, expected.to(dtype))
            normed, read, placed, total = add_norm(norm, x, update, position, read=True)
        assert torch.equal(normed, expected) and normed.requires_grad == learned
        assert torch.equal(read, expected.to(dtype)) and torch.equal(total, x + update)
        assert torch.equal(placed, (expected + position).to(dtype))


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_of_a_sum_is_made_again(dtype: torch.dtype, placed: bool) -> None:
    norm = torch.nn.LayerNorm(6)
    torch.nn.init.normal_(norm.weight)
    x, update = torch.randn(2, 3, 6), torch.randn(2, 3, 6).to(dtype).requires_grad_()
    position = torch.randn(3, 6) if placed else None
    scales = torch.randn(3, 6, requires_grad=True)  # whose gradient is what is read
    found = []
    for again in (False, True):
        with remaking(when=again):
            tokens, values, queries, _ = add_norm(norm, x, update, position, read=True)
            read = (tokens, values, queries) if placed else (tokens, values)
            storages = [StorageWeakRef(x.untyped_storage()) for x in read]
            total = torch.stack([(x * scales.to(x.dtype)).sum().float() for x in read]).sum()
            del tokens, values, queries, read
        assert all(x.expired() == again for x in storages)
        found.append(torch.autograd.grad(total, [scales, update, *norm.parameters()]))
    assert all(map(torch.equal, *found))


def test_readers_of_a_copy_send_their_gradients_one_by_one() -> None:
    """Sums of two numbers far apart: in half precision the small one would be lost."""
    x = torch.ones(3, requires_grad=True)
    half = x.to(torch.bfloat16)
    first, second = copy_of(x, half), copy_of(x, half)
    assert first.data_ptr() == second.data_ptr() == half.data_ptr()
    (first.float().sum() * 256 + second.float().sum()).backward()
    assert torch.equal(x.grad, torch.full((3,), 257.0))
    assert copy_of(x, x) is x
    with torch.no_grad():
        assert copy_of(x, half) is half


def test_a_norm_with_a_hook_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fused", lambda *_, **__: True)
    norm, x = torch.nn.LayerNorm(6), torch.randn(2, 6)
    assert layers.is_norm_fused(norm, x)
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        hook = getattr(norm, f"register_{kind}_hook")(lambda *_: None)
        assert not layers.is_norm_fused(norm, x)
        hook.remove()
    assert layers.is_norm_fused(norm, x)


class OnGpu(torch.Tensor):
    """Claims it."""

    is_cuda = True


@torch.no_grad()
@pytest.mark.parametrize("hooked", [True, False])
def test_hooks_of_a_layer_whose_relu_is_within(
    hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fused = [], []
    layer, x = torch.nn.Linear(4, 5), torch.randn(2, 3, 4).as_subclass(OnGpu)
    original = torch._addmm_activation
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda *args: fused.append(0) or original(*args)
    )
    if hooked:
        layer.register_forward_hook(lambda *_: seen.append(0))
    found = linear_relu(layer, x)
    assert (len(seen), len(fused)) == (hooked, not hooked)
    torch.testing.assert_close(found, (x @ layer.weight.T + layer.bias).clamp(min=0))


class Quantized(torch.Tensor):
    """Weights of a type of their own."""


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_linear_layers_on_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are oneDNN's, but where somebody looks on or gradients are asked for."""
    if not has_onednn(dtype):
        pytest.skip("oneDNN is not in this PyTorch, or has not the type on this processor")
    used = []
    monkeypatch.setattr(layers, "has_onednn", lambda _: used.append(0) or True)
    monkeypatch.setattr(layers, "WORTH_ONEDNN", 2 * 3 * 5 * 7)
    layer, x = torch.nn.Linear(5, 7).to(dtype), torch.randn(2, 5, 3).mT  # not dense
    expected = torch.nn.functional.linear(x.to(dtype), layer.weight, layer.bias)
    for found, wanted in (
        (linear(layer, x), expected),
        (linear_relu(layer, x), expected.relu()),
        (linear(layer, x.to(dtype)[0, :0]), expected[0, :0]),
    ):
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(
            found, wanted, atol=1e-2 if dtype.itemsize == 2 else 1e-6, rtol=0
        )
    assert len(used) == 2
    with torch.enable_grad():
        assert linear(layer, x.to(dtype)).requires_grad
    layer.register_forward_hook(lambda *_: expected + 1)
    assert torch.equal(linear(layer, x.to(dtype)), expected + 1)
    quantized = torch.nn.Linear(5, 7).to(dtype)
    quantized.weight = torch.nn.Parameter(quantized.weight.detach().as_subclass(Quantized))
    assert linear(quantized, x.to(dtype)).shape == (2, 3, 7)
    assert len(used) == 2


def test_processors_on_which_onednn_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it raises an error, and PyTorch's own layer does not."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    layers._is_built_with_onednn.cache_clear()
    try:
        assert not has_onednn(torch.bfloat16) and not has_onednn(torch.float64)
    finally:
        layers._is_built_with_onednn.cache_clear()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_that_is_switched_off_stays_off() -> None:
    usual = has_onednn(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not has_onednn(torch.float32)
    assert has_onednn(torch.float32) == usual


def test_rows_of_a_feedforward_network_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = attention.LayerSizes(
        hidden_dim=4, num_heads=1, num_levels=1, num_points=1, feedforward_dim=6
    )
    network, x = attention.FeedForward(sizes), torch.randn(2, 5, 4)
    expected = network(x)
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", 3)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
        assert network(x[:, :0]).shape == (2, 0, 4)
        rows: list[int] = []
        network.linear1.register_forward_hook(lambda *args: rows.append(len(args[2])))
        torch.testing.assert_close(network(x), expected)
    assert rows == [10]  # who looks on sees all of them


def test_mlp() -> None:
    mlp = MLP(input_dim=3, hidden_dim=5, output_dim=2, num_layers=3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]
    x = torch.randn(4, 3)
    expected = x
    for i, layer in enumerate(mlp.layers):
        expected = expected @ layer.weight.t() + layer.bias
        expected = expected if i == 2 else expected.clamp(min=0)
    torch.testing.assert_close(mlp(x), expected)
