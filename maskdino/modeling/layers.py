"""Small building blocks: multi-layer perceptron and sine embeddings."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdino.ops.boxes import LARGEST_LOGIT, bounded_logits
from maskdino.ops.constants import constant_of_shape, is_traced
from maskdino.ops.ms_deform_attn import has_compiled
from maskdino.ops.recompute import made_of
from maskdino.structures import SpatialShapes

TEMPERATURE = 10000.0  # of the sine embeddings
WORTH_ONEDNN = 1 << 24  # multiply-adds of a linear layer
WORTH_FUSING = 1 << 24  # results of a linear layer that ReLU would read and write again


def rounded(
    operation: Callable[..., Tensor], first: Tensor, *others: Tensor, to: torch.dtype
) -> Tensor:
    """`operation(first, *others)`, which has the shape of the first, in another type.

    Where nothing is learned from the tensors it is one launch: numbers are computed in the wider
    type, and written in the other.
    """
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (first, *others))
    if first.dtype == to or learned or is_traced():
        return operation(first, *others).to(to)
    return operation(first, *others, out=torch.empty_like(first, dtype=to))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, (..., in) to (..., out): see `product`."""
    return product(x, layer.weight, layer.bias) if unseen(layer) else layer(x)


def linear_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """ReLU of a linear layer, (..., in) to (..., out).

    On a GPU it is one launch in inference, and for many rows in half precision in training.
    """
    if _is_learned_at_once(layer, x):
        dtype = torch.get_autocast_dtype("cuda")
        return _LinearReLU.apply(*(t.to(dtype) for t in (x, layer.weight, layer.bias)))
    if not unseen(layer):
        return _relu(layer(x), x)
    if not x.is_cuda or is_converted(layer.weight):
        return product(x, layer.weight, layer.bias, relu=True)
    rows = x.to(layer.weight.dtype).flatten(0, -2)
    hidden = torch._addmm_activation(layer.bias, rows, layer.weight.t())
    return hidden.unflatten(0, x.shape[:-1])


def product(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False) -> Tensor:
    """What a linear layer computes, (..., in) to (..., out), perhaps with ReLU.

    On a CPU where nothing is learned oneDNN computes large ones: PyTorch by itself writes the bias,
    reads it again to add products, and reads these for ReLU.
    """
    if (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() or is_traced() or is_converted(weight))
        and x.shape[:-1].numel() * weight.numel() >= WORTH_ONEDNN  # no number where it is traced
        and type(weight) in (Tensor, nn.Parameter)  # others, as quantized ones, know `F.linear`
        and has_onednn(weight.dtype)
    ):
        kind = "relu" if relu else "none"
        x = x.to(weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], "")
    made = F.linear(x, weight, bias)
    return _relu(made, x) if relu else made


def _is_learned_at_once(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    return (
        type(layer) is nn.Linear
        and x.is_cuda
        and x.dim() == 2
        and x.shape[0] * layer.out_features >= WORTH_FUSING
        and torch.is_autocast_enabled("cuda")
        and torch.is_grad_enabled()
        and layer.bias is not None
        and not (is_traced() or is_hooked(layer))
    )


class _LinearReLU(torch.autograd.Function):
    """Rows (N, in), weight (out, in) and bias (out,) of one half type to (N, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = torch._addmm_activation(bias, rows, weight.t())
        ctx.save_for_backward(rows, weight, made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, made = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, made, 0)
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            grad.mm(weight) if of_rows else None,
            grad.t().mm(rows) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _relu(made: Tensor, x: Tensor) -> Tensor:
    # Of more than two dimensions the result is a view, and what changes a view in place is
    # copied twice in the backward pass.
    return F.relu(made, inplace=x.dim() == 2)


def unseen(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer need not be called: gradients, tracers and hooks see it by itself."""
    return (
        type(layer) is nn.Linear
        and not (torch.is_grad_enabled() or is_traced())
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch has linear layers of oneDNN in a type, for tensors as they are, and may."""
    return bool(torch.backends.mkldnn.enabled) and _is_built_with_onednn(dtype)


@functools.cache
def _is_built_with_onednn(dtype: torch.dtype) -> bool:
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:  # not on every processor; PyTorch's own layers are
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def fused(operator: str, *tensors: Tensor, learned: bool = False) -> bool:
    """Whether the compiled library does a step on a GPU in one launch.

    Args:
        operator: which does it.
        tensors: of the step, which must be float32.
        learned: whether the operator has a gradient.
    """
    return (
        all(x.is_cuda and x.dtype == torch.float32 for x in tensors)
        and not ((torch.is_grad_enabled() and not learned) or is_traced())
        and has_compiled(operator, tensors[0].device)
    )


def _norm_operator() -> str:
    return "add_norm_train" if torch.is_grad_enabled() else "add_norm"


def is_norm_fused(norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether `add_norm` is one launch, whatever is made besides."""
    return (
        fused(_norm_operator(), x, norm.weight, learned=True)
        and type(norm) is nn.LayerNorm
        and not is_hooked(norm)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to calls of a module or to their gradients."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


class Normed(NamedTuple):
    """LayerNorm of a sum, and what the next products read of it; what nobody asked for is anything.

    Attributes:
        tokens: (..., C).
        values: the same in the type of products.
        queries: in that type, with a position added.
        total: the sum itself, which the norm keeps in training; else it may be anything.
    """

    tokens: Tensor
    values: Tensor
    queries: Tensor
    total: Tensor


def add_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    update: Tensor,
    position: Tensor | None = None,
    *,
    read: bool = False,
) -> Normed:
    """LayerNorm of a sum, and what the next products read of it.

    Args:
        norm: without hooks where it is fused, as are prepared networks.
        x: (..., C).
        update: (..., C), in the type in which products are computed.
        position: (..., C) or the last of these dimensions; None where none is read.
        read: whether a product reads the result itself.
    """
    normed = _normed(norm, x, update, position, read)
    made = normed.tokens, normed.values, normed.queries
    make = partial(_normed_again, norm, dtype=update.dtype, position=position, read=read)
    made_of(made, make, normed.total)
    return normed


def _normed(
    norm: nn.LayerNorm, x: Tensor, update: Tensor, position: Tensor | None, read: bool
) -> Normed:
    if not is_norm_fused(norm, x):
        total = x + update
        normed = norm(total)
        values = normed.to(update.dtype) if read else normed
        if position is None:
            return Normed(normed, values, normed, total)
        queries = rounded(torch.add, normed, position, to=update.dtype)
        return Normed(normed, values, queries, total)
    half = read and update.dtype != x.dtype
    if position is not None and position.dtype != x.dtype:
        position = position.to(update.dtype)
    operator = getattr(torch.ops.maskdino, _norm_operator())
    normed, in_half, placed, *kept = operator(
        x, update, norm.weight, norm.bias, norm.eps, half, position
    )
    return Normed(normed, in_half if half else normed, placed, kept[0] if kept else normed)


@torch.no_grad()
def _normed_again(
    norm: nn.LayerNorm, total: Tensor, dtype: torch.dtype, position: Tensor | None, read: bool
) -> tuple[Tensor, ...]:
    """What was read of a sum, an update of which had the type `dtype`."""
    return _normed(norm, total, torch.zeros_like(total, dtype=dtype), position, read)[:3]


def copy_of(x: Tensor, copied: Tensor) -> Tensor:
    """`copied`, which is x in another type, for one of several readers.

    Each reader's gradient comes to x by itself, as from a copy of its own: they are summed in the
    type of x.
    """
    if x.dtype == copied.dtype or not (torch.is_grad_enabled() and x.requires_grad):
        return copied
    return _Copy.apply(x, copied.detach())


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copied: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copied.view_as(copied)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def is_converted(weight: Tensor) -> bool:
    """Whether autocast would convert a weight where it is used."""
    device = weight.device.type
    return weight.dtype == torch.float32 and torch.is_autocast_enabled(device)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(
        self, *, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int
    ) -> None:
        super().__init__()
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        layers = [nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True)]
        # What differs between inputs must not drown in biases, or all queries begin with one mask.
        for layer in layers:
            nn.init.zeros_(layer.bias)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(layers[-1].weight)
        self.layers = nn.ModuleList(layers)

    @property
    def dtype(self) -> torch.dtype:
        """In which inputs are read."""
        return cast(nn.Linear, self.layers[0]).weight.dtype

    def hidden(self, x: Tensor) -> Tensor:
        """(..., input_dim) to what the last layer reads, (..., hidden_dim)."""
        for layer in self.layers[:-1]:
            x = linear_relu(layer, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) to (..., output_dim)."""
        return self.layers[-1](self.hidden(x))


def sine_embedding(coordinate: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines of a coordinate at wavelengths that grow geometrically, interleaved.

    Args:
        coordinate: (...) float32; 1 is the shortest wavelength.
        channels: an even number.
        dtype: of the result.

    Returns:
        (..., channels).
    """
    rates, phases = _rates_and_phases(channels, coordinate.device)
    return rounded(torch.sin, torch.addcmul(phases, coordinate[..., None], rates), to=dtype)


@constant_of_shape
def _rates_and_phases(channels: int, device: torch.device) -> Tensor:
    """(2, channels), in radians: of each channel by coordinate; and what makes a sine a cosine."""
    index = torch.arange(channels, dtype=torch.float32, device=device)
    rates = 2 * math.pi * TEMPERATURE ** -(index.div(2, rounding_mode="floor") * 2 / channels)
    return torch.stack([rates, index % 2 * (math.pi / 2)])


def box_sine_embedding(
    boxes_cxcywh: Tensor, channels: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Positional embedding of boxes (DAB-DETR), of y, x, w, h: (..., 4) to (..., 4 * channels)."""
    x, y, width, height = boxes_cxcywh.float().unbind(-1)
    in_order = torch.stack([y, x, width, height], dim=-1)
    return sine_embedding(in_order, channels, dtype).flatten(-2)


def predict_boxes(
    box_head: MLP, content: Tensor, anchor_logits: Tensor, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What a decoder layer leaves for the next one, where nothing is learned.

    Args:
        box_head: from content to what is added to logits.
        content: (..., C) in the type of the head's weights.
        anchor_logits: (..., 4), of the anchors that the layer read.
        channels: of the embedding of one coordinate.
        dtype: of the embedding.

    Returns:
        Boxes (..., 4); their logits, bounded; and `box_sine_embedding` of the boxes.
    """
    last = box_head.layers[-1]
    hooked = box_head._forward_hooks or box_head._forward_pre_hooks
    if unseen(last) and not hooked and fused("predict_boxes", content, anchor_logits, last.weight):
        rates, phases = _rates_and_phases(channels, content.device)
        return torch.ops.maskdino.predict_boxes(
            box_head.hidden(content),
            last.weight,
            last.bias,
            anchor_logits,
            rates,
            phases,
            LARGEST_LOGIT,
            dtype,
        )
    logits = box_head(content).float() + anchor_logits
    boxes = logits.sigmoid()
    return boxes, bounded_logits(logits), box_sine_embedding(boxes, channels, dtype)


@constant_of_shape
def map_sine_embedding(
    spatial_shapes: SpatialShapes, channels: int, device: torch.device
) -> Tensor:
    """Positional embedding of the cells of maps, row by row, half for y and half for x.

    Returns:
        (S, channels) of the cells of all maps, one after the other.
    """
    maps = []
    for height, width in spatial_shapes:
        y, x = (
            sine_embedding(
                torch.arange(1, size + 1, dtype=torch.float32, device=device) / (size + 1e-6),
                channels // 2,
            )
            for size in (height, width)
        )
        both = [y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)]
        maps.append(torch.cat(both, dim=-1).flatten(0, 1))
    return torch.cat(maps)
