"""The backward pass on the pretend device (`tests.pretend_device`).

PyTorch's engine asks CUDA for a context before it runs a function of the graph that claims to be on
a GPU. This one walks the same graph and calls the same functions, adds gradients where they meet,
and sums and converts them to what went in, as the engine does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

import torch
from torch import Tensor

Node = Any  # of the graph of autograd
Gradients = list[Tensor | None]


def backward(loss: Tensor) -> None:
    """Gradients of a scalar, into `grad` of the parameters, which must be None before."""
    with torch.no_grad():
        root = loss.grad_fn
        waiting = {root: [torch.ones_like(loss)]}
        missing, order = _uses(root), [(0, 0, root)]
        while order:
            *_, node = heapq.heappop(order)
            grads: Gradients = waiting.pop(node, [])
            found = _called(node, grads) if any(g is not None for g in grads) else None
            edges = node.next_functions
            for position, (following, number) in enumerate(edges):
                if following is None:
                    continue
                if found is not None and found[position] is not None:
                    _add(waiting, following, number, found[position])
                missing[following] -= 1
                if not missing[following]:
                    heapq.heappush(order, (-_sequence(following), id(following), following))


def _uses(root: Node) -> Counter[Node]:
    """How often each function's result is used in the graph below a root."""
    uses: Counter[Node] = Counter()
    stack, seen = [root], {root}
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return uses


def _sequence(node: Node) -> int:
    """The engine calls what was made last first, and keeps gradients of leaves at once."""
    return node._sequence_nr() if not hasattr(node, "variable") else 1 << 62


def _add(waiting: dict[Node, Gradients], node: Node, number: int, grad: Tensor) -> None:
    grads = waiting.setdefault(node, [])
    grads.extend([None] * (number + 1 - len(grads)))
    metadata = getattr(node, "_input_metadata", ())
    if number < len(metadata):
        grad = _as_it_went_in(grad, metadata[number].shape, metadata[number].dtype)
    before = grads[number]
    grads[number] = grad if before is None else before + grad


def _as_it_went_in(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if grad.shape != shape:
        grad = grad.sum_to_size(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)


def _called(node: Node, grads: Gradients) -> Gradients:
    """Gradients of what went in, one for each of `next_functions`."""
    if hasattr(node, "variable"):
        _keep(node.variable, grads[0])
        return []
    grads = grads + [None] * (len(node._input_metadata) - len(grads))
    if not hasattr(node, "needs_input_grad"):
        found = node(*grads)
        return list(found) if isinstance(found, tuple) else [found]
    found = node.apply(*grads)
    found = found if isinstance(found, tuple) else (found,)
    needed = node.needs_input_grad
    of_tensors = iter([g for g, n in zip(found[: len(needed)], needed, strict=True) if n])
    return [None if f is None else next(of_tensors) for f, _ in node.next_functions]


def _keep(leaf: Tensor, grad: Tensor) -> None:
    """Optimizers want gradients that lie in memory as parameters do."""
    if leaf.grad is not None:
        leaf.grad += grad
    elif grad.stride() == leaf.stride():
        leaf.grad = grad
    else:
        leaf.grad = torch.empty_like(leaf).copy_(grad)
