"""Whether deformable attention can run in Triton: found out without importing it in vain.

`maskdino.ops.ms_deform_attn_triton` imports Triton and registers the operators when it is
imported; that happens here, once, where somebody might use them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)
_MOST_LEVELS = 16
_MOST_NUMBERS = 8192  # of P x D, each padded to a power of two: one query and head in registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def why_not(device_type: str) -> str:
    """Say why the Triton form cannot run on this type of device; empty where it can.

    Triton may be installed and yet not work: it needs a C compiler and the headers of Python. So an
    empty kernel is started on a GPU, once.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        module = importlib.import_module("maskdino.ops.ms_deform_attn_triton")
        return module.why_not(device_type)
    except Exception as error:  # noqa: BLE001 - whatever is missing, the PyTorch form will do
        lines = str(error).strip().splitlines() or [""]
        return f"Triton does not work here ({type(error).__name__}: {lines[0]})"


def takes(
    dtype: torch.dtype, device: torch.device, channels: int, num_levels: int, num_points: int
) -> bool:
    """Tell whether the kernels, where they run at all, can do this call.

    Args:
        dtype: of the value and of offsets and logits.
        device: where they are.
        channels: D, the size of a head.
        num_levels: L.
        num_points: P.
    """
    numbers = (1 << max(num_points - 1, 0).bit_length()) * (1 << max(channels - 1, 0).bit_length())
    if dtype not in _DTYPES or num_levels > _MOST_LEVELS or numbers > _MOST_NUMBERS:
        return _refuse(dtype, channels, num_levels, num_points)
    if dtype == torch.bfloat16 and device.type == "cuda" and not _rounds_to_bfloat16(device.index):
        return _refuse(dtype, channels, num_levels, num_points)
    return True


# torch.compile takes what these return, and looks into none of them; into cached ones it would.
@torch.compiler.assume_constant_result
def _rounds_to_bfloat16(index: int | None) -> bool:
    """Tell whether a GPU has the instructions: NVIDIA's from compute capability 8.0 on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


@torch.compiler.assume_constant_result
def _refuse(dtype: torch.dtype, channels: int, num_levels: int, num_points: int) -> bool:
    """Say that PyTorch computes these; always False."""
    _log_refusal(dtype, channels, num_levels, num_points)
    return False


@functools.cache
def _log_refusal(dtype: torch.dtype, channels: int, num_levels: int, num_points: int) -> None:
    logger.info(
        "deformable attention: no Triton kernel for %s, heads of %d channels, %d levels and %d "
        "points on this device: reference operator",
        *(dtype, channels, num_levels, num_points),
    )
