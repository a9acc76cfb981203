"""Multi-scale deformable attention in Triton: `torch.ops.maskdino_triton`.

Shape key: B images, S tokens of all levels together, Q queries, M heads, D channels of a head,
L levels, P points per level and head.

For GPUs that the compiled library does not serve: Triton comes with torch and needs no CUDA
compiler. The operators are those of the compiled library, with the same arguments, results and
meaning (`maskdino.ops.ms_deform_attn` describes them), and so is the arithmetic: softmax and
locations inside the kernel, locations, weights and sums in float32. Backward adds the gradient of
the value with float32 atomics, in no fixed order; under `torch.use_deterministic_algorithms` with
64-bit fixed-point numbers, whose sum has no order. Nothing waits for the device.

`maskdino.ops._triton.takes` tells what the kernels cannot do; float64 is the main case.

With `TRITON_INTERPRET=1` in the environment before Triton is imported the operators run on a CPU,
slowly; that is how they are tested without a GPU.

Importing this module imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from maskdino.ops import _library
from maskdino.ops import triton_kernels as kernels
from maskdino.ops.triton_backward import backward_kernel

NAMESPACE = "maskdino_triton"
_WARPS = 4
_FEW_NUMBERS = 2**22  # of B x Q x M x P x D
_INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)


def why_not(device_type: str) -> str:
    """Say why the kernels cannot run on a type of device; empty where they can.

    Raises:
        Exception: Triton cannot compile or start an empty kernel; of whatever type, from Triton.
    """
    if _INTERPRETED:
        return "" if device_type == "cpu" else "TRITON_INTERPRET is set: its kernels run on a CPU"
    if device_type != "cuda":
        return f"Triton's kernels do not run on {device_type}, unless TRITON_INTERPRET=1 is set"
    kernels.empty_kernel[(1,)](0)
    return ""


@dataclass(frozen=True)
class _Launch:
    """What a start of a kernel needs beside tensors; the same for all calls of the same sizes."""

    grid: tuple[int, int, int]  # blocks of queries, heads, images
    sizes: list[int]  # tokens, queries, and one integer for each of MAX_LEVELS levels
    constants: dict[str, int]  # of compilation
    forward_warps: int

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(
        cls,
        form: int,
        images: int,
        tokens: int,
        queries: int,
        heads: int,
        channels: int,
        num_points: int,
        element_bytes: int,
        shapes: tuple[int, ...],
    ) -> _Launch:
        """Chooses a tile of queries; shapes are (H0, W0, H1, W1, ...)."""
        levels = list(zip(shapes[::2], shapes[1::2], strict=True))
        block_p, block_d = _padded(num_points), _padded(channels)
        # Backward keeps 16 numbers of each corner per thread, and so does forward; of 16 bits it
        # keeps 32, which took 94 us instead of 154 for 21,760 tokens on an H200. A decoder's few
        # queries are spread thinner, so that all processors get some.
        few = images * queries * heads * block_p * block_d < _FEW_NUMBERS
        numbers = 32 * _WARPS * (8 if few else 16)
        bits = min(max(numbers // (block_p * block_d), 1), 64).bit_length() - 1
        tile_h, tile_w = 2 ** (bits // 2), 2 ** (bits - bits // 2)
        if form == kernels.TOKENS:
            blocks = sum(-(-height // tile_h) * -(-width // tile_w) for height, width in levels)
        else:
            blocks = -(-queries // (tile_h * tile_w))
        packed = [(height << 32) + width for height, width in levels]
        packed += [0] * (kernels.MAX_LEVELS - len(levels))
        constants = {
            "FORM": form,
            "HEADS": heads,
            "CHANNELS": channels,
            "LEVELS": len(levels),
            "NUM_POINTS": num_points,
            "TILE_H": tile_h,
            "TILE_W": tile_w,
            "BLOCK_P": block_p,
            "BLOCK_D": block_d,
        }
        halved = element_bytes == 2 and not few and numbers >= block_p * block_d
        warps = _WARPS // 2 if halved else _WARPS
        return cls((blocks, heads, images), [tokens, queries, *packed], constants, warps)


@dataclass(frozen=True)
class _Call:
    """Contiguous arguments of one call, and how to start a kernel for them."""

    form: int  # one of those of `triton_kernels`
    value: Tensor  # (B, S, M, D)
    shapes: Sequence[int]  # [H0, W0, H1, W1, ...]
    points: Tensor  # locations, or offsets and logits
    scores: Tensor  # weights, or the same tensor as points
    reference: Tensor | None
    num_points: int

    @classmethod
    def textbook(
        cls, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
    ) -> _Call:
        """A call of `ms_deform_attn`."""
        locations, weights = locations.contiguous(), weights.contiguous()
        num_points = locations.shape[4]
        value = value.contiguous()
        return cls(kernels.TEXTBOOK, value, shapes, locations, weights, None, num_points)

    @classmethod
    def fused(
        cls,
        value: Tensor,
        shapes: Sequence[int],
        raw: Tensor,
        reference: Tensor | None,
        num_points: int,
    ) -> _Call:
        """A call of `ms_deform_attn_fused`."""
        form = kernels.TOKENS
        if reference is not None:
            form = kernels.POINTS if reference.shape[2] == 2 else kernels.BOXES
            reference = reference.contiguous()
        raw = raw.contiguous()
        return cls(form, value.contiguous(), shapes, raw, raw, reference, num_points)

    @property
    def queries(self) -> int:
        """Q."""
        return self.points.shape[1]

    def launch(self) -> _Launch:
        """How to start a kernel for this call."""
        images, tokens, heads, channels = self.value.shape
        sizes = (images, tokens, self.queries, heads, channels)
        element_bytes = self.value.element_size()
        return _Launch.of(self.form, *sizes, self.num_points, element_bytes, tuple(self.shapes))

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton starts kernels on the current device."""
        cuda = self.value.is_cuda
        return torch.cuda.device(self.value.device) if cuda else contextlib.nullcontext()


def _padded(number: int) -> int:
    """The next power of two."""
    return triton.next_power_of_2(max(number, 1))


def _forward(call: _Call) -> Tensor:
    """(B, Q, M * D)."""
    images, _, heads, channels = call.value.shape
    output = call.value.new_empty(images, call.queries, heads * channels)
    if output.numel() == 0:
        return output
    launch = call.launch()
    reference = call.points if call.reference is None else call.reference  # any will do
    tensors = (call.value, call.points, call.scores, reference, output)
    with call.device():
        kernels.forward_kernel[launch.grid](
            *tensors, *launch.sizes, **launch.constants, num_warps=launch.forward_warps
        )
    return output


def _backward(
    call: _Call, grad_output: Tensor, reference_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, points, scores and reference.

    That of scores is that of points where they are one tensor; that of the reference is empty
    where nobody wants it.
    """
    images, _, heads, _ = call.value.shape
    fixed = torch.are_deterministic_algorithms_enabled()
    grad_value = torch.zeros_like(call.value, dtype=torch.int64 if fixed else torch.float32)
    size: tuple[int, ...] = (0,)
    if reference_gradient and call.reference is not None:
        size = (images, heads, call.queries, call.reference.shape[2])
    grad_reference = call.value.new_zeros(size, dtype=torch.float32)
    textbook = call.form == kernels.TEXTBOOK
    if grad_output.numel() == 0:
        grad_points = torch.zeros_like(call.points)
        grad_scores = torch.zeros_like(call.scores) if textbook else grad_points
    else:
        grad_points = torch.empty_like(call.points)
        grad_scores = torch.empty_like(call.scores) if textbook else grad_points
        scale = _fixed_point_scale(call, grad_output) if fixed else grad_reference
        launch = call.launch()
        reference = call.points if call.reference is None else call.reference
        tensors = (grad_output.contiguous(), call.value, call.points, call.scores, reference)
        gradients = (grad_value, grad_points, grad_scores, grad_reference, scale)
        with call.device():
            backward_kernel[launch.grid](
                *tensors,
                *gradients,
                *launch.sizes,
                BLOCK_L=_padded(len(call.shapes) // 2),
                REFERENCE_GRADIENT=reference_gradient,
                DETERMINISTIC=fixed,
                **launch.constants,
                num_warps=_WARPS,
            )
        if fixed:
            grad_value = grad_value.double() / scale
    grad_reference = grad_reference.sum(1) if reference_gradient else grad_reference
    return grad_value.to(call.value.dtype), grad_points, grad_scores, grad_reference


def _fixed_point_scale(call: _Call, grad_output: Tensor) -> Tensor:
    """The power of two that turns gradients of the value into integers whose sum cannot overflow.

    One float64 number, on the device; NaN or infinite where a gradient is, which then shows.
    """
    bound = grad_output.abs().amax().double()
    if call.form == kernels.TEXTBOOK:
        bound = bound * call.scores.abs().amax().double()
    contributions = 4 * call.queries * len(call.shapes) // 2 * call.num_points
    bits = 60 - math.ceil(math.log2(contributions))
    return torch.exp2(bits - torch.log2(bound.clamp(min=1e-200)).ceil())


def _ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    return _forward(_Call.textbook(value, spatial_shapes, locations, weights))


def _ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.textbook(value, spatial_shapes, locations, weights)
    return _backward(call, grad_output, False)[:3]


def _ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[int],
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
) -> Tensor:
    return _forward(_Call.fused(value, spatial_shapes, offsets_and_logits, reference, num_points))


def _ms_deform_attn_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call.fused(value, spatial_shapes, offsets_and_logits, reference, num_points)
    grad_value, grad_raw, _, grad_reference = _backward(call, grad_output, reference_gradient)
    return grad_value, grad_raw, grad_reference


def _autograd_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    operator = torch.ops.maskdino_triton.ms_deform_attn_backward
    grads = operator(grad_output, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


def _autograd_backward_fused(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, offsets_and_logits, reference = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    operator = torch.ops.maskdino_triton.ms_deform_attn_fused_backward
    grads = operator(
        grad_output, value, ctx.shapes, offsets_and_logits, reference, ctx.num_points, wanted
    )
    return grads[0], None, grads[1], grads[2] if wanted else None, None


def _register() -> torch.library.Library:
    """Define the operators: signatures, kernels, shapes without data, gradients."""
    library = torch.library.Library(NAMESPACE, "DEF")
    textbook = "Tensor value, SymInt[] spatial_shapes, Tensor locations, Tensor weights"
    fused = (
        "Tensor value, SymInt[] spatial_shapes, Tensor offsets_and_logits, Tensor? reference, "
        "int num_points"
    )
    three = "(Tensor, Tensor, Tensor)"
    operators: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        f"ms_deform_attn({textbook}) -> Tensor": (_ms_deform_attn, _library._fake),
        f"ms_deform_attn_backward(Tensor grad_output, {textbook}) -> {three}": (
            _ms_deform_attn_backward,
            _library._fake_backward,
        ),
        f"ms_deform_attn_fused({fused}) -> Tensor": (_ms_deform_attn_fused, _library._fake_fused),
        f"ms_deform_attn_fused_backward(Tensor grad_output, {fused}, bool reference_gradient) "
        f"-> {three}": (_ms_deform_attn_fused_backward, _library._fake_fused_backward),
    }
    for schema, (implementation, fake) in operators.items():
        name = library.define(schema)
        library.impl(name, implementation, "CPU" if _INTERPRETED else "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"{NAMESPACE}::ms_deform_attn",
        _autograd_backward,
        setup_context=_library._save,
        lib=library,
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::ms_deform_attn_fused",
        _autograd_backward_fused,
        setup_context=_library._save_fused,
        lib=library,
    )
    return library


_OPERATORS = _register()  # they live as long as this
