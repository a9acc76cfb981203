"""The compiled library behind :mod:`maskdino.ops.ms_deform_attn`: loading it."""

from __future__ import annotations


def is_loaded() -> bool:
    """Tell whether the compiled library was found and loaded."""
    return False


def serves(device_type: str) -> bool:  # noqa: ARG001
    """Tell whether the library has kernels for this type of device."""
    return False


def why_not(device_type: str) -> str:  # noqa: ARG001
    """Say why a type of device is not served, and what to do."""
    return "the compiled library is not built"
