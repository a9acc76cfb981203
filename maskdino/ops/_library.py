"""The compiled library behind `maskdino.ops.ms_deform_attn`: loading, shapes, gradients.

The library file `maskdino/_C*.so` registers `torch.ops.maskdino` when it is loaded, gradients
included. What it lacks is registered here, once: output shapes without data, for `torch.compile`
and `torch.export`; and gradients of attention, where it was built before it had them.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from importlib import machinery
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
OPERATORS = (
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_backward",
    "sample_packed_masks",
    "affine",
    "affine_",
    "affine_backward",
    "add_norm",
    "add_norm_train",
    "add_norm_backward",
    "group_norm",
    "group_norm_backward",
    "resize_backward",
    "predict_boxes",
    "resized_masks",
    "resized_packed_masks",
    "cpu_instruction_set",
    "cuda_architectures",
)
LEARNED = ("affine", "add_norm_train", "group_norm")  # of no use without their gradients
_HOW_TO_BUILD = "build it with `python setup.py build_ext --inplace` or reinstall the package"


def find_library() -> Path | None:
    """Return the library file built for this Python, or None where none was built."""
    folder = Path(__file__).resolve().parent.parent
    candidates = (folder / f"_C{suffix}" for suffix in machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def _load() -> str:
    """Load the library once; return an empty string, or why it is not loaded."""
    path = find_library()
    if path is None:
        return f"the compiled library is not built; {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # A library of another torch version is no reason to fail where the reference will do.
        logger.warning("cannot load %s: %s; %s", path, error, _HOW_TO_BUILD)
        return f"{path} cannot be loaded ({error}); {_HOW_TO_BUILD}"
    _register()
    _tell_of_missing(path)
    return ""


def _tell_of_missing(path: Path) -> None:
    """Log which operators a library lacks that was built before them: they are slower without."""
    missing = [name for name in OPERATORS if not _is_whole(name)]
    if missing:
        logger.warning(
            "%s was built before this version: %s run in PyTorch's operations, slower; %s",
            path,
            ", ".join(missing),
            _HOW_TO_BUILD,
        )


def is_loaded() -> bool:
    """Tell whether the compiled library was found and loaded."""
    return not _load()


def has(operator: str) -> bool:
    """Tell whether the loaded library has an operator; one that was built earlier may lack some."""
    return is_loaded() and _is_whole(operator)


def _is_whole(operator: str) -> bool:
    """Whether the library has an operator, and the gradient of one that is learned through."""
    found = hasattr(torch.ops.maskdino, operator)
    return found and not (operator in LEARNED and _lacks_gradient(operator))


def _lacks_gradient(operator: str) -> bool:
    """Whether the library was built when the gradient of an operator was still in Python."""
    return not _has_kernel(operator, "Autograd")


@functools.cache
def _has_kernel(operator: str, key: str) -> bool:
    """Whether the loaded library registered an operator for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"maskdino::{operator}", key)


def serves(device_type: str, index: int | None = None) -> bool:
    """Tell whether the library has kernels for a device.

    Args:
        device_type: such as `"cuda"`.
        index: which of the GPUs; None is torch's current one.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return (
        key is not None
        and is_loaded()
        and _has_kernel("ms_deform_attn_fused", key)
        and not (device_type == "cuda" and _lacks_code(index))
    )


def why_not(device_type: str, index: int | None = None) -> str:
    """Say why a device is not served, and what to do; only where `serves` is false."""
    reason = _load() or (_lacks_code(index) if device_type == "cuda" else "")
    return reason or f"the compiled library was built without {device_type} kernels"


def cuda_architectures() -> list[str]:
    """Return what the library holds code for, such as `sm_90`; empty where it does not say."""
    operator = getattr(torch.ops.maskdino, "cuda_architectures", None)
    return operator().split(",") if operator is not None and operator() else []


def _lacks_code(index: int | None) -> str:
    """Say that the library holds no code for a GPU; empty where it does or nobody can tell.

    Asked before the first launch: a launch without code fails, and a failure may surface anywhere.
    """
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _lacks_code_for(index)


@functools.cache
def _lacks_code_for(index: int) -> str:
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    built = cuda_architectures()
    if not built or any(_runs_on(name, major, minor) for name in built):
        return ""
    return (
        f"the compiled library was built for {', '.join(built)}, not for GPU {index} of compute "
        f"capability {major}.{minor}; set TORCH_CUDA_ARCH_LIST={major}.{minor} and {_HOW_TO_BUILD}"
    )


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Tell whether code runs on a GPU: machine code within a generation, PTX on all later ones.

    Args:
        architecture: such as `"sm_90"` or, for PTX, `"compute_90"`; with `a` it is for one
            GPU alone, with `f` for its generation.
        major: of the GPU's compute capability, the part before the dot.
        minor: the part behind it.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    kind, code_major, code_minor, suffix = match.groups()
    code = (int(code_major), int(code_minor))
    if suffix == "a":
        return code == (major, minor)
    return code <= (major, minor) and (code[0] == major or (kind == "compute" and not suffix))


def _fake_output(value: Tensor, num_queries: Any) -> Tensor:
    return value.new_empty(value.shape[0], num_queries, value.shape[2] * value.shape[3])


def _fake(value: Tensor, _shapes: Any, locations: Tensor, _weights: Tensor) -> Tensor:
    return _fake_output(value, locations.shape[1])


def _fake_fused(
    value: Tensor, _shapes: Any, offsets_and_logits: Tensor, _reference: Any, _points: int
) -> Tensor:
    return _fake_output(value, offsets_and_logits.shape[1])


def _fake_backward(
    _grad: Tensor, value: Tensor, _shapes: Any, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense(value), _dense(locations), _dense(weights)


def _fake_fused_backward(
    _grad: Tensor,
    value: Tensor,
    _shapes: Any,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    _points: int,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_reference = value.new_empty(0, dtype=dtype)
    if reference is not None and reference_gradient:
        grad_reference = _dense(reference)
    return _dense(value), _dense(offsets_and_logits), grad_reference


def _fake_samples(_bits: Tensor, _width: int, index: Tensor, points: Tensor) -> Tensor:
    return points.new_empty(index.shape[0], points.shape[1])


def _layout(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _fake_affine(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _fake_affine_backward(
    grad: Tensor, output: Tensor | None, _scale: Any, x_gradient: bool, residual_gradient: bool
) -> tuple[Tensor, Tensor]:
    layout = _layout(grad if output is None else output)
    made = [
        torch.empty_like(grad, memory_format=layout),
        torch.empty_like(grad, memory_format=layout),
    ]
    wanted = x_gradient, residual_gradient
    first, second = (m if w else grad.new_empty(0) for m, w in zip(made, wanted, strict=True))
    return first, second


def _fake_group_norm(
    x: Tensor,
    _shift: Any,
    weight: Tensor,
    _bias: Any,
    groups: int,
    _eps: float,
    _relu: bool,
    _coarse: Any,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(x, dtype=dtype, memory_format=_layout(x))
    return normed, weight.new_empty(x.shape[0], groups, 2)


def _fake_group_norm_backward(
    _grad: Any, x: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_x = torch.empty_like(x, memory_format=_layout(x))
    return of_x, torch.empty_like(weight), torch.empty_like(bias)


def _fake_resize_backward(grad: Tensor, height: Any, width: Any) -> Tensor:
    coarse = grad.new_empty(*grad.shape[:2], height, width, dtype=torch.float32)
    return coarse.contiguous(memory_format=_layout(grad))


def _fake_norm(
    x: Tensor,
    update: Tensor,
    _weight: Tensor,
    _bias: Tensor,
    _eps: float,
    rounded: bool,
    position: Tensor | None,
) -> tuple[Tensor, ...]:
    none = update.new_empty(0)
    in_half = _dense(update) if rounded else none
    return _dense(x), in_half, none.clone() if position is None else _dense(update)


def _fake_norm_train(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    of_row = x.new_empty((*x.shape[:-1], 1))
    return *_fake_norm(x, *others), _dense(x), of_row, _dense(of_row)


def _fake_norm_backward(
    _normed: Any,
    _rounded: Any,
    _placed: Any,
    total: Tensor,
    _mean: Tensor,
    _rstd: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    weights: bool,
) -> tuple[Tensor, ...]:
    size = weight.shape[0] if weights else 0
    of_update = total.new_empty(0 if dtype == torch.float32 else total.shape, dtype=dtype)
    return _dense(total), of_update, total.new_empty(size), total.new_empty(size)


def _dense(tensor: Tensor) -> Tensor:
    """Gradients are dense whatever the strides of what they belong to."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.maskdino.ms_deform_attn_backward(
        grad_output, value, ctx.shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


def _save_fused(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    value, ctx.shapes, offsets_and_logits, reference, ctx.num_points = inputs
    ctx.save_for_backward(value, offsets_and_logits, reference)


def _backward_fused(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, offsets_and_logits, reference = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    grad_value, grad_offsets, grad_reference = torch.ops.maskdino.ms_deform_attn_fused_backward(
        grad_output, value, ctx.shapes, offsets_and_logits, reference, ctx.num_points, wanted
    )
    return grad_value, None, grad_offsets, grad_reference if wanted else None, None


def _register() -> None:
    """Add shape functions to the operators of the loaded library, and the gradients it lacks."""
    fakes: dict[str, Callable[..., Any]] = {
        "ms_deform_attn": _fake,
        "ms_deform_attn_backward": _fake_backward,
        "ms_deform_attn_fused": _fake_fused,
        "ms_deform_attn_fused_backward": _fake_fused_backward,
    }
    # A library that was built earlier may lack these.
    later: dict[str, Callable[..., Any]] = {
        "sample_packed_masks": _fake_samples,
        "affine": _fake_affine,
        "affine_": lambda *_: None,
        "affine_backward": _fake_affine_backward,
        "add_norm": _fake_norm,
        "add_norm_train": _fake_norm_train,
        "add_norm_backward": _fake_norm_backward,
    }
    fakes |= {name: fake for name, fake in later.items() if hasattr(torch.ops.maskdino, name)}
    if hasattr(torch.ops.maskdino, "group_norm_backward"):
        fakes["group_norm"] = _fake_group_norm
        fakes["group_norm_backward"] = _fake_group_norm_backward
        fakes["resize_backward"] = _fake_resize_backward
    for name, fake in fakes.items():
        torch.library.register_fake(f"maskdino::{name}", fake)
    gradients = {
        "ms_deform_attn": (_backward, _save),
        "ms_deform_attn_fused": (_backward_fused, _save_fused),
    }
    for name, (backward, save) in gradients.items():
        if _lacks_gradient(name):
            torch.library.register_autograd(f"maskdino::{name}", backward, setup_context=save)
