"""Multi-scale deformable attention: one interface; a compiled, a Triton and a pure PyTorch form.

Shape key: B images, S tokens of all levels together, Q queries, M heads, D channels of a head,
L levels, P points per level and head.

Every query looks, per head, at P points of each of L feature maps. Each point is read by bilinear
interpolation (zeros outside the map, pixel centers at half integers, i.e. `align_corners=False`)
and the L x P values are summed with attention weights:

    output[b, q, m] = sum over l, p of weight[b, q, m, l, p] * bilinear(value_l[b, :, m], location)

Two entry points compute it: `ms_deform_attn` takes locations and weights,
`ms_deform_attn_fused` takes the raw output of one linear layer. Both run in the compiled
library when it is built and serves the device, else in Triton on a GPU where it works, else in
PyTorch; the environment variable `MASKDINO_OP` (`compiled`, `triton` or `reference`)
overrides that choice for `backend="auto"`. What Triton has no kernels for, such as float64,
PyTorch computes.

Samples whose location lies outside the map, is NaN or is infinite read zero and have no gradient.
Arithmetic is float32 for float16, bfloat16 and float32 tensors, float64 for float64 tensors.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskdino.ops import _library, _triton
from maskdino.structures import SpatialShapes

logger = logging.getLogger(__name__)
_logged_choices: set[tuple[str, str]] = set()

BACKENDS = ("auto", "compiled", "triton", "reference")


def compiled_op_available(device_type: str | None = None) -> bool:
    """Tell whether the compiled library is loaded and, if given, serves this type of device.

    Args:
        device_type: a device type such as `"cpu"` or `"cuda"`; None asks for the library alone.
    """
    return _library.is_loaded() if device_type is None else _library.serves(device_type)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Sample and sum feature maps at given locations with given weights.

    Args:
        value: (B, S, M, D) feature maps, flattened row by row and concatenated over levels; any
            floating-point dtype.
        spatial_shapes: (H, W) of each level, host integers; their areas sum to S.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), normalized by the level's (W, H) so that
            [0, 1] spans the map; float32 (float64 for a float64 value). Half precision is refused:
            it cannot tell neighboring pixels apart.
        attention_weights: (B, Q, M, L, P), any floating-point dtype.
        backend: `"auto"`, `"compiled"`, `"triton"` or `"reference"`.

    Returns:
        (B, Q, M * D) in the dtype of `value`.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or backend name.
        RuntimeError: `"compiled"` or `"triton"` is asked for but does not serve the device.
    """
    _check_common(value, spatial_shapes, sampling_locations, attention_weights)
    _check_locations(value, spatial_shapes, sampling_locations, attention_weights)
    num_points = sampling_locations.shape[4]
    operators = _operators(value, value.dtype, len(spatial_shapes), num_points, backend)
    if operators is None:
        return ms_deform_attn_reference(
            value, spatial_shapes, sampling_locations, attention_weights
        )
    return operators.ms_deform_attn(
        value,
        _flat(spatial_shapes),
        sampling_locations,
        attention_weights.to(sampling_locations.dtype),
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
    backend: str = "auto",
) -> Tensor:
    """Sample feature maps around references, straight from the output of one linear layer.

    The softmax over the L x P logits of a head and the location arithmetic happen inside, in
    float32, so that neither weights nor locations are ever stored or rounded to half precision.

    Args:
        value: (B, S, M, D) feature maps, as in `ms_deform_attn`.
        spatial_shapes: (H, W) of each level, host integers; their areas sum to S.
        offsets_and_logits: (B, Q, M * L * P * 3), any floating-point dtype: first M * L * P * 2
            offsets ordered (head, level, point, xy), then M * L * P logits ordered
            (head, level, point).
        reference: where the offsets start, normalized to [0, 1], float32 (or float64):
            None for the encoder, where Q equals S and the reference of a token is its own cell
            center ((i + 0.5) / size) on all levels;
            (B, Q, 2) points (x, y): `location = reference + offset / (W_l, H_l)`;
            (B, Q, 4) boxes (cx, cy, w, h): `location = center + offset / P * size / 2`.
        num_points: P.
        backend: `"auto"`, `"compiled"`, `"triton"` or `"reference"`.

    Returns:
        (B, Q, M * D) in the dtype of `value`. Gradients flow to `value`,
        `offsets_and_logits` and `reference`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `ms_deform_attn`.
    """
    _check_common(value, spatial_shapes, offsets_and_logits, reference)
    _check_fused(value, spatial_shapes, offsets_and_logits, reference, num_points)
    # Tensors of two dtypes meet in the wider one, which is exact.
    common = torch.promote_types(value.dtype, offsets_and_logits.dtype)
    operators = _operators(value, common, len(spatial_shapes), num_points, backend)
    if operators is None:
        return ms_deform_attn_fused_reference(
            value, spatial_shapes, offsets_and_logits, reference, num_points
        )
    return operators.ms_deform_attn_fused(
        value.to(common),
        _flat(spatial_shapes),
        offsets_and_logits.to(common),
        None if reference is None else reference.to(_compute_dtype(common)),
        num_points,
    ).to(value.dtype)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` with `grid_sample`, on every device."""
    num_images, _, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]
    dtype = sampling_locations.dtype
    areas = [height * width for height, width in spatial_shapes]
    # (B, S, M, D) -> (B * M, D, S): each head of each image is one small image.
    heads = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    if heads.numel() == 0 or num_queries == 0:
        # grid_sample refuses empty inputs; the sums keep the (zero) gradients connected.
        nothing = value.sum() + sampling_locations.sum() + attention_weights.sum()
        return (0 * nothing).to(value.dtype).expand(num_images, num_queries, num_heads * head_dim)
    output = heads.new_zeros(num_images * num_heads, head_dim, num_queries)
    # (B, Q, M, ...) -> (B * M, Q, ...)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)
    grid = _grid(sampling_locations, spatial_shapes).transpose(1, 2).flatten(0, 1)
    for level, ((height, width), maps) in enumerate(
        zip(spatial_shapes, heads.split(areas, dim=2), strict=True)
    ):
        sampled = functional.grid_sample(  # (B * M, D, Q, P)
            maps.unflatten(2, (height, width)), grid[:, :, level], align_corners=False
        )
        output = output + (sampled * weights[:, None, :, level]).sum(dim=3)
    output = output.view(num_images, num_heads * head_dim, num_queries)
    return output.transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
) -> Tensor:
    """Compute `ms_deform_attn_fused` with PyTorch operations, on every device."""
    locations, weights = locations_and_weights(
        value, spatial_shapes, offsets_and_logits, reference, num_points
    )
    return ms_deform_attn_reference(
        value.to(locations.dtype), spatial_shapes, locations, weights
    ).to(value.dtype)


def locations_and_weights(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
) -> tuple[Tensor, Tensor]:
    """Turn the arguments of `ms_deform_attn_fused` into those of `ms_deform_attn`.

    Returns:
        Sampling locations (B, Q, M, L, P, 2) and attention weights (B, Q, M, L, P), float32
        (float64 where an argument is float64).
    """
    num_images, num_queries, _ = offsets_and_logits.shape
    num_heads, num_levels = value.shape[2], len(spatial_shapes)
    dtype = _compute_dtype(torch.promote_types(value.dtype, offsets_and_logits.dtype))
    samples = num_heads * num_levels * num_points
    offsets, logits = offsets_and_logits.to(dtype).split([2 * samples, samples], dim=2)
    offsets = offsets.view(num_images, num_queries, num_heads, num_levels, num_points, 2)
    logits = logits.view(num_images, num_queries, num_heads, num_levels * num_points)
    weights = logits.softmax(dim=3).view(offsets.shape[:-1])
    if reference is None:
        reference = cell_centers(spatial_shapes, value.device, dtype)[None]
    anchors = reference.to(dtype)[:, :, None, None, None]  # (B or 1, Q, 1, 1, 1, 2 or 4)
    if anchors.shape[-1] == 2:
        locations = anchors + offsets / _sizes(spatial_shapes, offsets)
    else:
        locations = anchors[..., :2] + offsets / num_points * anchors[..., 2:] * 0.5
    return locations, weights


def cell_centers(
    spatial_shapes: SpatialShapes, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the center (x, y) of each token's cell, level by level, in [0, 1]: (S, 2)."""
    centers = []
    for height, width in spatial_shapes:
        # On a GPU, a number is divided by through its reciprocal, whose rounding lets the last of
        # 50 rows be nearer than 0.99; a tensor is divided by as on a CPU.
        y, x = (
            (torch.arange(size, dtype=dtype, device=device) + 0.5)
            / torch.full((1,), size, dtype=dtype, device=device)
            for size in (height, width)
        )
        grid = torch.stack([x[None].expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
        centers.append(grid.flatten(0, 1))
    return torch.cat(centers)


@torch.compiler.assume_constant_result
def choose_backend(device_type: str, backend: str, index: int | None = None) -> str:
    """Decide between the compiled, the Triton and the reference form, and log each choice once.

    Args and errors are those of `explain_backend`.
    """
    choice, reason = explain_backend(device_type, backend, index)
    if (device_type, choice) not in _logged_choices:
        _logged_choices.add((device_type, choice))
        why = f" ({reason})" if reason else ""
        logger.info("deformable attention on %s: %s operator%s", device_type, choice, why)
    return choice


def has_compiled(operator: str, device: torch.device) -> bool:
    """Tell whether the library has an operator, and is chosen for attention on a device."""
    chosen = choose_backend(device.type, "auto", device.index)
    return chosen == "compiled" and _library.has(operator)


def keeps_samples(device: torch.device) -> bool:
    """Tell whether attention on a device keeps more than it is given for its backward."""
    return choose_backend(device.type, "auto", device.index) == "reference"


def explain_backend(device_type: str, backend: str, index: int | None = None) -> tuple[str, str]:
    """Tell which form runs, and why it is not a faster one (empty where it is the fastest).

    Args:
        device_type: such as `"cpu"` or `"cuda"`.
        backend: one of `BACKENDS`.
        index: which of the GPUs; None is torch's current one.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: `"compiled"` or `"triton"` is asked for but does not serve the device.
    """
    origin = "argument backend"
    if backend == "auto" and os.environ.get("MASKDINO_OP"):
        backend, origin = os.environ["MASKDINO_OP"], "environment variable MASKDINO_OP"
    if backend not in BACKENDS:
        raise ValueError(f"{origin} must be one of {BACKENDS}, got {backend!r}")
    choice, reason = backend, ""
    if backend in ("auto", "compiled") and not _library.serves(device_type, index):
        reason = _library.why_not(device_type, index)
        choice = "triton" if device_type == "cuda" else "reference"
        if backend == "compiled":
            raise RuntimeError(f"{origin} asks for the compiled operator, but {reason}")
    elif backend == "auto":
        choice = "compiled"
    if choice == "triton" and (problem := _triton.why_not(device_type)):
        if backend == "triton":
            raise RuntimeError(f"{origin} asks for the Triton operator, but {problem}")
        choice, reason = "reference", f"{reason}; {problem}"
    return choice, reason


def _operators(
    value: Tensor, dtype: torch.dtype, num_levels: int, num_points: int, backend: str
) -> Any:
    """Return the operators to call, in the same form for all backends; None: call PyTorch's."""
    choice = choose_backend(value.device.type, backend, value.device.index)
    if torch.jit.is_tracing():
        # The tracer cannot hold lists of symbolic integers; a program in PyTorch's own operations
        # also runs without this package, and their arithmetic can be counted.
        return None
    if choice == "compiled":
        return torch.ops.maskdino
    channels = value.shape[3]
    if choice == "triton" and _triton.takes(dtype, value.device, channels, num_levels, num_points):
        return torch.ops.maskdino_triton
    return None


def _flat(spatial_shapes: SpatialShapes) -> list[int]:
    """Return [H0, W0, H1, W1, ...], which operator schemas can carry."""
    return [size for shape in spatial_shapes for size in shape]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic and locations that goes with a dtype of features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sizes(spatial_shapes: SpatialShapes, like: Tensor) -> Tensor:
    """Return the (W, H) of each level, (L, 1, 2), filled on the device so that nothing waits."""
    sizes = [
        like.new_full((1,), side) for height, width in spatial_shapes for side in (width, height)
    ]
    return torch.cat(sizes).view(-1, 1, 2)


def _grid(locations: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
    """Map locations from [0, 1] to grid_sample's [-1, 1]; what is outside or NaN to a fixed point.

    A sample is outside where no pixel center lies closer than one pixel. Replacing such locations
    makes NaN and infinity read zero, as in the compiled kernels, and keeps the conversion to
    integers inside grid_sample within its range.
    """
    sizes = _sizes(spatial_shapes, locations)
    pixels = locations * sizes - 0.5
    inside = ((pixels > -1) & (pixels < sizes)).all(dim=-1, keepdim=True)
    return torch.where(inside, 2 * locations - 1, -4.0)


def _check_common(value: Tensor, spatial_shapes: SpatialShapes, *others: Tensor | None) -> None:
    """Check what both entry points share: the value, the level sizes, the devices."""
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, M, D), got shape {tuple(value.shape)}")
    if len(spatial_shapes) == 0 or any(len(s) != 2 or min(s) < 1 for s in spatial_shapes):
        raise ValueError(
            f"spatial_shapes must be (H, W) pairs of positive integers, got {spatial_shapes}"
        )
    area = sum(height * width for height, width in spatial_shapes)
    if area != value.shape[1]:
        raise ValueError(
            f"spatial_shapes {list(spatial_shapes)} hold {area} tokens, value has {value.shape[1]}"
        )
    for tensor in (value, *others):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"value is on {value.device}, another input on {tensor.device}")


def _check_locations(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> None:
    """Check the inputs that only `ms_deform_attn` has."""
    num_images, _, num_heads, _ = value.shape
    fixed = (num_images, num_heads, len(spatial_shapes), 2)
    if locations.dim() != 6 or (locations.shape[0], *locations.shape[2:4], 2) != fixed:
        raise ValueError(
            f"sampling_locations must be (B, Q, M, L, P, 2) with B={num_images}, M={num_heads}, "
            f"L={len(spatial_shapes)}, got shape {tuple(locations.shape)}"
        )
    if locations.shape[5] != 2 or weights.shape != locations.shape[:-1]:
        raise ValueError(
            "attention_weights must be (B, Q, M, L, P) and sampling_locations (B, Q, M, L, P, 2), "
            f"got shapes {tuple(weights.shape)} and {tuple(locations.shape)}"
        )
    if locations.dtype != _compute_dtype(value.dtype):
        raise TypeError(
            f"sampling_locations must be {_compute_dtype(value.dtype)} for a value of "
            f"{value.dtype}, got {locations.dtype}"
        )


def _check_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
) -> None:
    """Check the inputs that only `ms_deform_attn_fused` has."""
    num_images, num_tokens, num_heads, _ = value.shape
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1, got {num_points}")
    width = num_heads * len(spatial_shapes) * num_points * 3
    shape = tuple(offsets_and_logits.shape)
    if len(shape) != 3 or shape[0] != num_images or shape[2] != width:
        raise ValueError(
            f"offsets_and_logits must be (B, Q, M * L * P * 3) with B={num_images} and a last "
            f"size of {width}, got shape {shape}"
        )
    if reference is None:
        if shape[1] != num_tokens:
            raise ValueError(
                f"without a reference there is one query per token: {num_tokens}, got {shape[1]}"
            )
        return
    if reference.dim() != 3 or reference.shape[:2] != shape[:2] or reference.shape[2] not in (2, 4):
        raise ValueError(
            f"reference must be ({num_images}, {shape[1]}, 2 or 4), "
            f"got shape {tuple(reference.shape)}"
        )
    if reference.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"reference must be float32 or float64, got {reference.dtype}")
