"""A model's network prepared for inference: what depends on weights alone is computed once.

Batch norm in convolutions (the same sums up to rounding), weights in the type in which the network
computes, the two linear layers of deformable attention as one, and convolutions in half precision
channels-last. The prepared network follows the model: where a weight was changed in place, all is
computed anew, and where a tensor or a module was replaced, the network is made anew. Only changes
behind the back of autograd (`weight.data.copy_`) in a model that does not train are not seen.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from maskdino.modeling.attention import MultiScaleDeformableAttention
from maskdino.modeling.half_weights import convertible_weights
from maskdino.ops.constants import is_traced

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
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


class _Attributes:
    """What users set of a module of this package, which its copy follows."""

    def __init__(self, own: nn.Module, made: nn.Module) -> None:
        self._own, self._made = own.__dict__, made.__dict__
        self._look()

    def _look(self) -> None:
        self._all = tuple(self._own)
        self._plain = [name for name, value in self._own.items() if isinstance(value, PLAIN)]

    def follow(self) -> None:
        if self._all != tuple(self._own):  # one was set that had the class's value before
            self._look()
        for name in self._plain:
            self._made[name] = self._own[name]


@dataclass(frozen=True)
class _Copy:
    network: nn.Module
    derived: tuple[_Derived, ...]
    attributes: tuple[_Attributes, ...]
    tensors: tuple[tuple[int, int], ...]
    versions: list[int]


class Prepared:
    """Prepared networks of one model, one for each type of weights.

    Copies of this object, and so of a model that holds it, begin without any.
    """

    def __init__(self) -> None:
        self._copies: dict[torch.dtype, _Copy] = {}
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
                are asked for or a program is traced.
            leave: modules that compute in the type of their weights.
            device: of the model.
        """
        modules = tuple(model.modules())
        if (
            not self._works
            or model.training
            or torch.is_grad_enabled()
            or is_traced()
            or device.type not in ("cpu", "cuda")
            or any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        ):
            return model
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else torch.float32
        with self._lock:
            return cast(Model, self._current(model, modules, list(leave), dtype))

    def _current(
        self, model: nn.Module, modules: tuple[nn.Module, ...], leave: list, dtype: torch.dtype
    ) -> nn.Module:
        tensors = [x for m in modules for x in (*m._parameters.values(), *m._buffers.values())]
        there = [x for x in tensors if x is not None]
        identities = tuple((id(x), x.data_ptr()) for x in there)
        versions = [0 if x.is_inference() else x._version for x in there]
        kept = self._copies.get(dtype)
        if kept is None or kept.tensors != identities:
            try:
                kept = _copied(model, leave, dtype, identities, versions)
            except (TypeError, RuntimeError, NotImplementedError) as error:
                self._works = False
                logger.warning("The network is not prepared for inference, so slower: %s", error)
                return model
            self._copies[dtype] = kept
        elif kept.versions != versions:
            for derived in kept.derived:
                derived.refresh()
            kept.versions[:] = versions
        for attributes in kept.attributes:
            attributes.follow()
        return kept.network


@torch.no_grad()
def _copied(
    model: nn.Module,
    leave: list[nn.Module],
    dtype: torch.dtype,
    identities: tuple[tuple[int, int], ...],
    versions: list[int],
) -> _Copy:
    """A copy that shares all tensors but those that are derived."""
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
        attributes = tuple(
            _Attributes(*pair) for pair in pairs if type(pair[0]).__module__.startswith("maskdino.")
        )
        return _Copy(network, tuple(derived), attributes, identities, versions)


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
