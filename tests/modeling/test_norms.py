"""Group norms where the compiled library makes them, on tensors that claim to be on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdino.modeling import norms
from maskdino.modeling.norms import group_norm, pointwise, projected
from maskdino.ops import _library

TYPES = (torch.float32, torch.float16, torch.bfloat16)


class OnGpu(Tensor):
    """Claims it."""

    is_cuda = True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Of the library's operator, one entry each."""
    if not _library.has("group_norm"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    calls: list[object] = []
    monkeypatch.setattr(norms, "has_compiled", lambda *asked: calls.append(asked) or True)
    return calls


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).as_subclass(OnGpu)


def drawn_norm() -> nn.GroupNorm:
    norm = nn.GroupNorm(3, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES)
def test_group_norm(calls: list[object], dtype: torch.dtype) -> None:
    norm, x, shift, coarse = drawn_norm(), on_gpu(2, 6, 5, 4, dtype=dtype), *drawn_others(dtype)
    exact = norm(torch.Tensor(x.float()))
    moved = norm(torch.Tensor(x.float() + shift.float()[:, None, None]))
    resized = F.interpolate(coarse, (5, 4), mode="bilinear")
    rtol = torch.finfo(dtype).eps
    for found, expected in (
        (group_norm(norm, x), exact),
        (group_norm(norm, x, relu=True), exact.relu()),
        (group_norm(norm, x, shift=shift), moved),
        (group_norm(norm, x, coarse=coarse), exact + resized),
    ):
        assert found.dtype == dtype and found.shape == x.shape
        assert found.is_contiguous() == (dtype == torch.float32)
        assert found.is_contiguous(memory_format=torch.channels_last) != found.is_contiguous()
        torch.testing.assert_close(torch.Tensor(found.float()), expected, atol=1e-5, rtol=rtol)
    assert group_norm(norm, x, to=torch.float32).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert group_norm(norm, x).dtype == torch.float32
    assert len(calls) == 6


def drawn_others(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(6).to(dtype), torch.randn(2, 6, 2, 3)


def test_whoever_would_see_a_norm_sees_it(calls: list[object]) -> None:
    """A hook, a norm in another type or of another kind: PyTorch's form, the same."""
    norm, x = drawn_norm(), on_gpu(2, 6, 5, 4)
    with torch.no_grad():
        assert torch.equal(group_norm(nn.Sequential(norm), x), norm(x))
        assert torch.equal(group_norm(norm.double(), x.double()), norm(x.double()))
        norm.float().register_forward_hook(lambda *_: torch.zeros(1))
        assert torch.equal(group_norm(norm, x), torch.zeros(1))
    for kind in ("full_backward", "full_backward_pre"):
        norm, seen = drawn_norm(), list[object]()
        getattr(norm, f"register_{kind}_hook")(lambda *_, to=seen: to.append(0))
        group_norm(norm, x.requires_grad_()).sum().backward()
        assert len(seen) == 1
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("hooked", [None, 0, 1])
def test_projection(calls: list[object], hooked: int | None) -> None:
    """The bias of the convolution counts once, and hooks are called."""
    projection = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), drawn_norm())
    nn.init.normal_(projection[0].bias)
    x, seen = on_gpu(2, 4, 5, 6), []
    expected = projection(torch.Tensor(x))
    if hooked is not None:
        projection[hooked].register_forward_hook(lambda *_: seen.append(0))
    torch.testing.assert_close(torch.Tensor(projected(projection, x)), expected)
    assert len(seen) == (hooked is not None)
    assert len(calls) == {None: 2, 0: 2, 1: 0}[hooked]
    assert torch.equal(projected(nn.Identity(), x), x)


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_of_a_projection(calls: list[object], learned: bool) -> None:
    """Of all that is learned, a bias before the norm, too: those of PyTorch's form."""
    projection, x = nn.Sequential(nn.Conv2d(4, 6, 1), drawn_norm()), on_gpu(2, 4, 5, 6)
    projection[0].bias.requires_grad_(learned)
    grads = []
    for run in (projection, lambda x: projected(projection, x)):
        projection.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad for p in projection.parameters() if p.requires_grad])
    assert calls
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pointwise() -> None:
    """Of maps in rows of channels a product, of others and for hooks the convolution."""
    convolution, x, seen = nn.Conv2d(4, 6, 1), on_gpu(2, 4, 5, 3), []
    rows = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pointwise(convolution, x), convolution(x))
    found = pointwise(convolution, rows)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, convolution(rows))
    convolution.register_forward_hook(lambda *_: seen.append(0))
    pointwise(convolution, rows)
    assert seen
