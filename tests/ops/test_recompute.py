"""What autograd keeps and makes again, of small functions."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from maskdino.ops.recompute import Again, recomputed, remade


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

    def forward(self, x: Tensor, again: bool) -> Tensor:
        entering = x.detach()
        with remade(lambda: (self.hidden(entering),), when=again) as forget:
            hidden = self.hidden(x)
            out = self.second(hidden)
            forget(hidden)
        return out


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_gradients_and_what_is_kept(shape: tuple[int, ...], half: bool) -> None:
    """Autocast is that of the forward pass; what was made again is let go."""
    found = []
    for again in (False, True):
        layers = Layers()
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layers(x, again)
        assert layers.made[0].expired() == again
        out.float().square().sum().backward()
        assert len(layers.made) == 1 + again
        assert all(made.expired() for made in layers.made)
        found.append([x.grad, *(p.grad for p in layers.parameters())])
    assert all(map(torch.equal, *found))


def test_a_graph_that_is_kept_is_gone_through_again() -> None:
    layers, x = Layers(), torch.randn(5, 4, requires_grad=True)
    out = layers(x, True).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, x)[0], first[0])
    assert len(layers.made) == 3


def test_what_is_handed_over_is_made_again_for_a_checkpoint() -> None:
    total = torch.randn(3, requires_grad=True)
    calls = []

    def make() -> list[Tensor]:
        calls.append(1)
        return [2 * total.detach()]

    given = 2 * total
    seen = weakref.ref(given)
    read = Again([given], make)
    del given
    recomputed(lambda read: (read()[0].exp() * 3).exp().sum(), read).backward()
    assert calls == [1] and seen() is None
    expected = total.detach().clone().requires_grad_()
    ((2 * expected).exp() * 3).exp().sum().backward()
    assert torch.equal(total.grad, expected.grad)


def test_what_is_made_again_has_gradient_where_the_first_had_it() -> None:
    first = torch.ones(2, requires_grad=True) * 2, torch.ones(2)
    read = Again(first, lambda: [torch.full((2,), 2.0), torch.ones(2)])
    assert read() is first
    assert [x.requires_grad for x in read()] == [True, False]
