"""What the gradients of all compiled operators have in common."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from maskdino.ops import _library
from maskdino.ops.recompute import recomputed

# Operators of some tensors, the first of 2 x 4 x 3 x 8 numbers; what they give is read as a whole.
Operator = Callable[..., tuple[Tensor, ...]]


def _add_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Any:
    args = (weight, bias, 1e-5, True, position)
    return torch.ops.maskdino.add_norm_train(x, update, *args)[:3]


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, coarse: Tensor) -> Any:
    args = weight, bias, 2, 1e-5, False, coarse, torch.float32
    return torch.ops.maskdino.group_norm(x, None, *args)[:1]


def _affine(x: Tensor, residual: Tensor) -> Any:
    scale, shift = torch.tensor([[0.5, 2, 1, 1.5], [0.1, 0, -0.1, 0.2]])
    return (torch.ops.maskdino.affine(x, scale, shift, residual, True),)


def _attention(value: Tensor, locations: Tensor, weights: Tensor) -> Any:
    locations, weights = locations.unflatten(2, (3, 2, 1, 2)), weights.unflatten(2, (3, 2, 1))
    return (torch.ops.maskdino.ms_deform_attn(value, [1, 3, 1, 1], locations, weights),)


def _fused(value: Tensor, offsets_and_logits: Tensor, reference: Tensor) -> Any:
    args = offsets_and_logits, reference, 1
    return (torch.ops.maskdino.ms_deform_attn_fused(value, [1, 3, 1, 1], *args),)


OPERATORS: dict[str, tuple[Operator, list[tuple[int, ...]]]] = {
    "add_norm_train": (_add_norm, [(2, 4, 3, 8), (8,), (8,), (3, 8)]),
    "group_norm": (_group_norm, [(4,), (4,), (2, 4, 2, 3)]),
    "affine": (_affine, [(2, 4, 3, 8)]),
    "ms_deform_attn": (_attention, [(2, 5, 12), (2, 5, 6)]),
    "ms_deform_attn_fused": (_fused, [(2, 5, 18), (2, 5, 4)]),
}


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest) -> tuple[Operator, list[Tensor]]:
    """An operator and its tensors."""
    if not _library.has(request.param):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    operator, shapes = OPERATORS[request.param]
    torch.manual_seed(1)
    return operator, [torch.randn(2, 4, 3, 8), *(torch.rand(shape) for shape in shapes)]


def gradients(operator: Operator, tensors: list[Tensor], frozen: int | None) -> list[Tensor | None]:
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(tensors)]
    made = operator(*leaves)
    torch.manual_seed(2)
    torch.autograd.backward(made, [torch.randn_like(x) for x in made])
    return [x.grad for x in leaves]


def test_what_is_frozen_has_no_gradient(case: tuple[Operator, list[Tensor]]) -> None:
    """And all others have the same as before."""
    operator, tensors = case
    expected = gradients(operator, tensors, None)
    for frozen in range(len(tensors)):
        for i, grad in enumerate(gradients(operator, tensors, frozen)):
            assert grad is None if i == frozen else torch.equal(grad, expected[i])


def test_without_gradients_results_are_the_same(case: tuple[Operator, list[Tensor]]) -> None:
    operator, tensors = case
    expected = operator(*(x.clone().requires_grad_() for x in tensors))
    with torch.no_grad():
        assert all(map(torch.equal, operator(*tensors), expected))


def test_nothing_is_left_of_what_was_computed_again(case: tuple[Operator, list[Tensor]]) -> None:
    """Where it is the last of what the backward pass computes again, it is stopped in between."""
    operator, (first, *others) = case
    kept: list[StorageWeakRef] = []

    def part(x: Tensor) -> tuple[Tensor, ...]:
        hidden = x.exp()
        kept.append(StorageWeakRef(hidden.untyped_storage()))
        return operator(hidden, *others)

    made = recomputed(part, first.clone().requires_grad_())
    sum(x.sum() for x in made).backward()
    del made
    gc.collect()
    assert len(kept) == 2 and all(storage.expired() for storage in kept)
