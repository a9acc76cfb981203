"""A model's network prepared for inference: what depends on weights alone is computed once.

Batch norm in convolutions (the same sums up to rounding), weights in the type in which the network
computes, the two linear layers of deformable attention as one, and convolutions in half precision
channels-last. The prepared network follows the model: where a weight was changed in place, all is
computed anew, and where a tensor or a module was replaced, the network is made anew. Only changes
behind the back of autograd (`weight.data.copy_`) in a model that does not train are not seen.

Whether anything changed is asked before each image, while a GPU has nothing to do. So what a walk
through the modules found is kept in flat lists, which a few calls compare.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
from typing import Any, TypeVar, cast

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from maskdino.modeling.attention import MultiScaleDeformableAttention
from maskdino.modeling.half_weights import convertible_weights
from maskdino.ops.constants import is_traced

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
CONTENT = itemgetter("_parameters", "_buffers", "_modules")
HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)
PLAIN = (int, float, bool, str, tuple, type(None))  # attributes that users set


@dataclass(frozen=True)
class _Derived:
    """Tensors of the prepared network that are computed of the model's."""

    made: tuple[nn.Parameter, ...]
    compute: Callable[[], tuple[Tensor, ...]]

    @torch.no_grad()
    def refresh(self) -> None:
        """In place: CUDA graphs read these tensors where they are."""
        for parameter, value in zip(self.made, self.compute(), strict=True):
            parameter.copy_(value)


def _same(found: list, expected: list) -> bool:
    """Whether these are the same objects; equality of tensors would be another question."""
    return len(found) == len(expected) and all(map(is_, found, expected))


class _Parts:
    """The modules of a model, their tensors, and where these are in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module.__dict__ for module in model.modules()]
        self._content = self._content_now()
        self._tensors = [x for x in self._content if isinstance(x, Tensor)]
        self._addresses = self._addresses_now()
        self._versioned = [x for x in self._tensors if not x.is_inference()]

    def _content_now(self) -> list[nn.Module | Tensor | None]:
        tables = filter(None, chain.from_iterable(map(CONTENT, self._modules)))
        return list(chain.from_iterable(map(dict.values, tables)))

    def _addresses_now(self) -> list[int]:
        return [x.data_ptr() for x in self._tensors]

    def are_of(self, model: nn.Module) -> bool:
        """Whether the model has these parts still, and no other."""
        return (
            self._modules[0] is model.__dict__
            and _same(self._content_now(), self._content)
            and self._addresses_now() == self._addresses
        )

    def hooked(self) -> bool:
        """Whether hooks look at a module, or at all of a program."""
        here = any(chain.from_iterable(map(HOOKS, self._modules)))
        return bool(here or _global_forward_hooks or _global_forward_pre_hooks)

    def versions(self) -> list[int]:
        """Counters of changes in place."""
        return [x._version for x in self._versioned]


class _Attributes:
    """What users set of modules of this package, which copies of these follow."""

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        dicts = [
            (own.__dict__, made.__dict__)
            for own, made in pairs
            if type(own).__module__.startswith("maskdino.")
        ]
        self._modules = [own for own, _ in dicts]
        self._names = self._names_now()
        self._followed = [
            (own, made, name)
            for own, made in dicts
            for name, value in own.items()
            if isinstance(value, PLAIN) or made.get(name) is value
        ]
        self._values = self._values_now()
        self._set()

    def _names_now(self) -> list[str]:
        return list(chain.from_iterable(self._modules))

    def _values_now(self) -> list:
        return [own[name] for own, _, name in self._followed]

    def _set(self) -> None:
        for own, made, name in self._followed:
            if name in own:
                made[name] = own[name]

    def follow(self) -> bool:
        """Returns whether anything has changed, and sets what was known before."""
        if self._names_now() == self._names and _same(self._values_now(), self._values):
            return False
        self._set()
        return True


@dataclass
class _Copy:
    network: nn.Module
    derived: tuple[_Derived, ...]
    pairs: list[tuple[nn.Module, nn.Module]]
    parts: _Parts
    versions: list[int]

    def __post_init__(self) -> None:
        self._attributes = _Attributes(self.pairs)

    def follow(self) -> None:
        """Takes over weights that were changed in place, and attributes."""
        versions = self.parts.versions()
        if versions != self.versions:
            for derived in self.derived:
                derived.refresh()
            self.versions = versions
        if self._attributes.follow():
            # Another object, as graphs of this one hold what was set before.
            self.network = copy.copy(self.network)
            self.pairs[0] = self.pairs[0][0], self.network
            self._attributes = _Attributes(self.pairs)


class Prepared:
    """Prepared networks of one model, one for each type of weights.

    Copies of this object, and so of a model that holds it, begin without any.
    """

    def __init__(self) -> None:
        self._copies: dict[torch.dtype, _Copy] = {}
        self._parts: _Parts | None = None
        self._lock = threading.Lock()
        self._works = True

    def __deepcopy__(self, memo: dict) -> Prepared:
        return Prepared()

    def __reduce__(self) -> tuple:
        return Prepared, ()

    def of(self, model: Model, leave: Iterable[nn.Module], device: torch.device) -> Model:
        """The network to infer with.

        Args:
            model: whose weights count. While it trains, or one of its modules has a hook, which a
                prepared network would pass over, it is returned as it is; so it is while gradients
                are asked for, a program is traced, or there are hooks of all modules.
            leave: modules that compute in the type of their weights.
            device: of the model.
        """
        if (
            not self._works
            or model.training
            or torch.is_grad_enabled()
            or is_traced()
            or device.type not in ("cpu", "cuda")
        ):
            return model
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
        with self._lock:
            try:
                return cast(Model, self._current(model, leave, dtype))
            except (KeyError, TypeError, RuntimeError, NotImplementedError) as error:
                self._works = False
                logger.warning("The network is not prepared for inference, so slower: %s", error)
                return model

    def _current(
        self, model: nn.Module, leave: Iterable[nn.Module], dtype: torch.dtype
    ) -> nn.Module:
        if self._parts is None or not self._parts.are_of(model):
            self._parts = _Parts(model)
        if self._parts.hooked():
            return model
        kept = self._copies.get(dtype)
        if kept is None or kept.parts is not self._parts:
            kept = self._copies[dtype] = _copied(model, list(leave), dtype, self._parts)
        kept.follow()
        return kept.network


@torch.no_grad()
def _copied(model: nn.Module, leave: list[nn.Module], dtype: torch.dtype, parts: _Parts) -> _Copy:
    """A copy that shares all tensors but those that are derived."""
    versions = parts.versions()
    with torch.inference_mode(False):
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
        network = copy.deepcopy(model, dict[int, Any](shared))
        pairs = list(zip(model.modules(), network.modules(), strict=True))
        half = set(convertible_weights(model, leave)) if dtype != torch.float32 else set()
        derived = []
        for own, made in pairs:
            names = [name for module, name in half if module is own]
            kind = dtype if names else torch.float32
            if isinstance(own, Conv2d) and isinstance(own.norm, NORMS):
                derived.append(_folded(own, made, kind))
            elif isinstance(own, MultiScaleDeformableAttention):
                derived.append(_joined(own, made, dtype))
            elif names:
                derived.append(_in_half(own, made, names, kind))
        return _Copy(network, tuple(derived), pairs, parts, versions)


def _folded(own: Conv2d, made: Conv2d, dtype: torch.dtype) -> _Derived:
    """A convolution that does what its norm does after it."""

    def compute() -> tuple[Tensor, Tensor]:
        norm = own.norm
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean if own.bias is None else own.bias - norm.running_mean
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias
        weight = own.weight * scale[:, None, None, None]
        # In float32 sums in another order would show: a pixel of a mask on its border.
        layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        return weight.contiguous(memory_format=layout), shift

    made.norm = None
    return _derived(made, ("weight", "bias"), compute, dtype)


def _joined(own: MultiScaleDeformableAttention, made: nn.Module, dtype: torch.dtype) -> _Derived:
    return _derived(made, ("joined_weight", "joined_bias"), own.offsets_and_logits, dtype)


def _in_half(own: nn.Module, made: nn.Module, names: list[str], dtype: torch.dtype) -> _Derived:
    def compute() -> tuple[Tensor, ...]:
        weights = [own.get_parameter(name) for name in names]
        # On a GPU maps in half precision are channels-last, where convolutions read weights so.
        return tuple(
            w.contiguous(memory_format=torch.channels_last) if w.is_cuda and w.dim() == 4 else w
            for w in weights
        )

    return _derived(made, names, compute, dtype)


def _derived(
    made: nn.Module,
    names: Iterable[str],
    compute: Callable[[], tuple[Tensor, ...]],
    dtype: torch.dtype,
) -> _Derived:
    parameters = []
    for name, value in zip(names, compute(), strict=True):
        own = value.detach().to(dtype, copy=True)
        parameters.append(nn.Parameter(own, requires_grad=False))
        made._parameters[name] = parameters[-1]
    return _Derived(tuple(parameters), compute)
