"""The network of a training step as two CUDA graphs, forward and backward (`SOLVER.CUDA_GRAPHS`).

A step asks for thousands of small kernels, and a fast GPU waits for the host most of the time. Two
graphs are two launches. Matching and losses, whose sizes differ from batch to batch, are no part of
them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from maskdino.modeling.layers import is_hooked
from maskdino.ops.constants import holding_constants
from maskdino.ops.graph_memory import GraphMemory

logger = logging.getLogger(__name__)

# The first steps with a shape run as they are: a shape that does not come again is worth no graph.
CALLS_BEFORE = 2
MOST_GRAPHS = 8  # they share memory, but each keeps its inputs, results and gradients

T = TypeVar("T", bound="Mapped")


class Mapped(Protocol):
    """A structure of tensors."""

    def map(self: T, function: Callable[[Tensor], Tensor]) -> T:
        """Applies a function to each tensor, always in the same order."""
        ...


@dataclass(frozen=True)
class Step:
    """The two passes of a network, which read what they need where it is, and write over the last.

    Attributes:
        inputs: of the forward pass.
        forward: fills `result`.
        result: of the network; `requires_grad` tells which tensors have a gradient.
        output_gradients: of those tensors, before the backward pass.
        backward: fills `gradients`.
        gradients: of the inputs and then of the weights; None where there is none.
        kept: what else the passes read.
    """

    inputs: Sequence[Tensor]
    forward: Callable[[], None]
    result: Any
    output_gradients: Sequence[Tensor]
    backward: Callable[[], None]
    gradients: Sequence[Tensor | None]
    kept: object = None


class TrainingGraphs:
    """Graphs of one network, for the shapes of its inputs that come again first.

    The backward pass of a call must come before the next call. Copies of this object, and so of a
    model that holds it, begin without graphs.
    """

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self._most = most
        self._steps: dict[Hashable, Step] = {}
        self._calls: Counter[Hashable] = Counter()
        self._read: tuple[tuple[int, int], ...] = ()  # what is known of weights, and of buffers
        self._memory: GraphMemory | None = None
        self._said: set[str] = set()

    def __call__(self, model: nn.Module, network: Callable[..., T], *inputs: Tensor) -> T:
        """Computes `network(*inputs)`, with gradients to the model's weights and to the inputs.

        Args:
            model: whose weights the network reads. Where a module within has a hook, or all have,
                there is no replay, which would pass it over; so it is where batch norm learns its
                statistics, which also the passes before a capture would change.
            network: a function of tensors that asks nothing of the host.
            inputs: on a GPU.

        Returns:
            What the network returns. The next call writes over it.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return network(*inputs)
        reason = _why_not(model)
        if reason:
            self._say(reason)
            return network(*inputs)
        parameters = list(model.parameters())
        weights = [weight for weight in parameters if weight.requires_grad]
        kind = inputs[0].device.type
        # Of buffers, such as those of frozen norms, modules keep what follows from them.
        buffers = [(x.data_ptr(), x._version) for x in model.buffers()]
        places = [(weight.data_ptr(), weight.requires_grad) for weight in parameters]
        read = (*places, *buffers)
        if read != self._read:  # others are trained, or something has moved or was loaded
            self._read, self._memory = read, None
            self._steps.clear()
            self._calls.clear()
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (half, *((tuple(x.shape), x.dtype, x.requires_grad) for x in inputs))
        step = self._steps.get(key) or self._add(key, model, network, inputs, weights)
        if step is None:
            return network(*inputs)
        self._keep_gradients(weights)
        replayed = iter(_Replayed.apply(step, *inputs, *weights))
        return step.result.map(lambda _: next(replayed))

    def __deepcopy__(self, memo: dict) -> TrainingGraphs:
        return TrainingGraphs(self._most)

    def __reduce__(self) -> tuple:
        return TrainingGraphs, (self._most,)

    def __len__(self) -> int:
        return len(self._steps)

    def _add(
        self,
        key: Hashable,
        model: nn.Module,
        network: Callable[..., Mapped],
        inputs: Sequence[Tensor],
        weights: Sequence[nn.Parameter],
    ) -> Step | None:
        """Captures a shape that comes again, if there is room; one that cannot be is tried once."""
        if len(self._steps) == self._most:
            self._say(f"batches have more than {self._most} shapes, the others are replayed")
            return None
        self._calls[key] += 1
        if self._calls[key] != CALLS_BEFORE + 1:
            return None
        try:
            if self._memory is None:
                self._memory = GraphMemory(inputs[0].device)
            with stand_ins(model, weights) as parameters:
                self._steps[key] = capture_step(network, inputs, parameters, self._memory)
        except RuntimeError as error:
            self._say(str(error).partition("\n")[0])
        return self._steps.get(key)

    def _keep_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Moves gradients of passes before, to which this one adds: graphs write over each other's.

        Autograd lets a weight's first gradient be where a graph has left it.
        """
        there = [(weight, weight.grad) for weight in weights if weight.grad is not None]
        steps = self._steps.values() if there else ()
        places = {x.data_ptr() for step in steps for x in step.gradients if x is not None}
        for weight, gradient in there:
            if gradient.data_ptr() in places:
                weight.grad = gradient.clone()

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("SOLVER.CUDA_GRAPHS is on, but steps run kernel by kernel: %s", reason)


def _why_not(model: nn.Module) -> str:
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "all modules have a hook, which a graph would pass over"
    for name, module in model.named_modules():
        if name and is_hooked(module):  # the model itself is called as ever
            return f"{name} has a hook, which a graph would pass over"
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            return f"{name} is batch norm that learns its statistics"
    return ""


def tensors_of(result: Mapped) -> list[Tensor]:
    """Its tensors, in the order of `map`."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    result.map(add)
    return found


class _Replayed(torch.autograd.Function):
    """The forward pass of a step now, its backward pass in that of the losses."""

    @staticmethod
    def forward(ctx: Any, step: Step, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        for held, given in zip(step.inputs, tensors, strict=False):
            held.detach().copy_(given)
        step.forward()
        results = tensors_of(step.result)
        ctx.differentiable = [x.requires_grad for x in results]
        outputs = tuple(x.detach() for x in results)
        ctx.mark_non_differentiable(
            *(x for x, has in zip(outputs, ctx.differentiable, strict=True) if not has)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step: Step = ctx.step
        given = (grad for grad, has in zip(grads, ctx.differentiable, strict=True) if has)
        for held, grad in zip(step.output_gradients, given, strict=True):
            held.copy_(grad)
        step.backward()
        found = (None if gradient is None else gradient.detach() for gradient in step.gradients)
        return None, *found


@contextmanager
def stand_ins(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within, the model holds other parameters with the memory of these weights.

    Autograd knows a weight on the stream of the step that read it first, as long as anybody holds
    that step: `DistributedDataParallel` does for good. A capture must not depend on that stream.

    Yields:
        The stand-ins of the weights, in their order.
    """
    made = {weight: nn.Parameter(weight.detach()) for weight in weights}
    places = [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight in made
    ]
    for parameters, name, weight in places:
        parameters[name] = made[weight]
    try:
        yield list(made.values())
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight


def capture_step(
    network: Callable[..., Mapped],
    inputs: Sequence[Tensor],
    weights: Sequence[nn.Parameter],
    memory: GraphMemory,
) -> Step:
    """Captures the two passes of a network as CUDA graphs.

    Args:
        network: see `TrainingGraphs.__call__`.
        inputs: of the shapes to capture.
        weights: those that have gradients, of which no other step knows: see `stand_ins`.
        memory: of the graphs and others: one step is under way at a time.

    Raises:
        RuntimeError: something in the network waits for the GPU, or cannot be captured.
    """
    device = inputs[0].device
    # Weights that autocast converted in one pass are not those of the next.
    autocast = partial(
        torch.autocast,
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
    torch.clear_autocast_cache()
    held = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    sources = [x for x in (*held, *weights) if x.requires_grad]
    with (
        torch.cuda.device(device),
        torch.random.fork_rng([device.index]),  # what is drawn here is of no step
        holding_constants() as constants,
        # Also what is computed again in the backward pass converts weights as they are then.
        torch.autocast(device.type, enabled=False, cache_enabled=False),
    ):
        # Graphs cannot use what the allocator keeps of the steps before.
        torch.cuda.empty_cache()
        with memory.rehearsed():
            with autocast():
                outputs = [x for x in tensors_of(network(*held)) if x.requires_grad]
            _gradients(outputs, sources, [torch.zeros_like(x) for x in outputs])
            del outputs
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with memory.captured() as forward, autocast():
            result = network(*held)
        outputs = [x for x in tensors_of(result) if x.requires_grad]
        output_gradients = [torch.zeros_like(x) for x in outputs]
        with memory.captured() as backward:
            found = iter(_gradients(outputs, sources, output_gradients))
    gradients = [next(found) if x.requires_grad else None for x in (*held, *weights)]
    # Without the program that made it, which is in the graphs.
    result = result.map(lambda x: x.detach().requires_grad_(x.requires_grad))
    return Step(
        held, forward.replay, result, output_gradients, backward.replay, gradients, constants
    )


def _gradients(
    outputs: Sequence[Tensor], sources: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of each source in a place of its own: autograd gives both parts of a sum the same tensor.

    Autograd itself copies what several weights are given; of a graph's gradients it cannot know.
    """
    places, own = set[int](), list[Tensor | None]()
    for gradient in torch.autograd.grad(outputs, sources, gradients, allow_unused=True):
        if gradient is not None and gradient.data_ptr() in places:
            gradient = gradient.clone()
        if gradient is not None:
            places.add(gradient.data_ptr())
        own.append(gradient)
    return own
