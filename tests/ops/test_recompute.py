"""What autograd keeps and makes again, of small functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from maskdino.ops.recompute import made_of, recomputed, remade, remaking


class Layers(nn.Module):
    """Two linear layers, of which the hidden numbers may be made again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.made: list[StorageWeakRef] = []

    def hidden(self, x: Tensor) -> Tensor:
        made = torch.relu_(self.first(x))
        self.made.append(StorageWeakRef(made.untyped_storage()))
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.second(remade(self.hidden, x))


class Doubled:
    """A function, whether its last input was a leaf with gradient, and what was made."""

    def __init__(self) -> None:
        self.learns_by_itself = False
        self.made: list[StorageWeakRef] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.learns_by_itself = x.requires_grad and x.is_leaf
        made = 2 * x
        self.made.append(StorageWeakRef(made.untyped_storage()))
        return made

    def kept(self) -> int:
        """How many of the results are in memory."""
        return sum(not x.expired() for x in self.made)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_gradients_and_what_is_kept(shape: tuple[int, ...], half: bool) -> None:
    """Autocast is that of the forward pass; what was made again is let go."""
    found = []
    for again in (False, True):
        layers = Layers()
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), remaking(when=again):
            out = layers(x)
        assert layers.made[0].expired() == again
        out.float().square().sum().backward()
        assert len(layers.made) == 1 + again
        assert all(made.expired() for made in layers.made)
        found.append([x.grad, *(p.grad for p in layers.parameters())])
    assert all(map(torch.equal, *found))


def test_a_graph_that_is_kept_is_gone_through_again() -> None:
    layers, x = Layers(), torch.randn(5, 4, requires_grad=True)
    with remaking():
        out = layers(x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    assert all(made.expired() for made in layers.made)
    assert torch.equal(torch.autograd.grad(out, x)[0], first[0])
    assert len(layers.made) == 3


def test_what_is_made_of_what_is_made_again() -> None:
    """All are let go, and made again in turn, each once."""
    first, second = Doubled(), Doubled()
    x = torch.randn(3, requires_grad=True)
    with remaking():
        doubled = remade(first, x)
        again = remade(second, doubled)
        out = again.sin() + again.cos() + doubled.sin()
        del doubled, again
    assert (first.kept(), second.kept()) == (0, 0)
    out.sum().backward(retain_graph=True)  # by itself it would let go of all
    assert (len(first.made), len(second.made)) == (2, 2)
    assert (first.kept(), second.kept()) == (0, 0)
    assert second.learns_by_itself
    expected = x.detach().clone().requires_grad_()
    again = 4 * expected
    (again.sin() + again.cos() + (2 * expected).sin()).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_what_nobody_reads_is_not_made_again() -> None:
    first, second = Doubled(), Doubled()
    x = torch.randn(3, requires_grad=True)
    with remaking():
        remade(second, remade(first, x)).exp().sum().backward()  # `exp` keeps its result alone
    assert (len(first.made), len(second.made)) == (1, 1)


def test_checkpoints_keep_what_their_arguments_are_made_of() -> None:
    make = Doubled()
    x = torch.randn(3, requires_grad=True)

    def part(made: Tensor, factor: float) -> Tensor:
        return (made.exp() * factor).exp()

    with remaking():
        made = remade(make, x)
        out = recomputed(part, made, 3.0)
        del made
    assert make.kept() == 0
    out.sum().backward()
    assert len(make.made) == 2 and make.kept() == 0
    expected = x.detach().clone().requires_grad_()
    ((2 * expected).exp() * 3).exp().sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_what_comes_about_in_another_way() -> None:
    total = torch.randn(3, requires_grad=True)
    make = Doubled()
    with remaking():
        given = total + total
        made_of((given,), lambda x: (make(x),), total)
        seen = StorageWeakRef(given.untyped_storage())
        out = given.sin().sum()
        del given
    assert seen.expired() and not make.made
    out.backward()
    assert len(make.made) == 1 and torch.equal(total.grad, 2 * (2 * total.detach()).cos())


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[:1], lambda x: x.view(torch.int32).view(torch.float32)]
)
def test_other_views_are_kept(view: Callable[[Tensor], Tensor]) -> None:
    """What begins where a tensor does need not be that tensor."""
    x = torch.randn(2, 3)
    expected = view(2 * x)
    scale = torch.ones(expected.shape, requires_grad=True)
    with remaking():
        (view(remade(lambda x: 2 * x, x)) * scale).sum().backward()
    assert torch.equal(scale.grad, expected)


def test_memory_that_is_used_again_is_another_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tensor lay that was let go, the next one may lie."""
    scale = torch.ones((), requires_grad=True)
    monkeypatch.setattr(Tensor, "data_ptr", lambda _: 1)
    with remaking():
        made = remade(lambda x: x * 2, torch.ones(3))
        del made
        out = (torch.full((3,), 5.0) * scale).sum()
    out.backward()
    assert scale.grad == 15


def test_outside_nothing_is_made_again() -> None:
    make, x = Doubled(), torch.randn(3, requires_grad=True)
    with remaking(when=False):
        remade(make, x).sin().sum().backward()
    with remaking():
        pass
    remade(make, x).sin().sum().backward()
    with pytest.raises(ValueError, match="stop"), remaking():
        raise ValueError("stop")
    remade(make, x).sin().sum().backward()
    assert len(make.made) == 3
