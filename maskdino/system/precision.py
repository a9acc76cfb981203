"""The types in which the network computes, in training and in inference.

Parameters, boxes, scores and losses are float32 always; what is chosen here is the arithmetic of
convolutions and matrix products.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

logger = logging.getLogger(__name__)

KEY = "MODEL.MASK_DINO.TEST.PRECISION"
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "auto")
EVERYWHERE = ("auto", "float32")  # possible on every device
FIRST_WITH_TF32 = (8, 0)  # compute capability
_switching = threading.RLock()


def mixed_precision_dtype(enabled: bool, device: torch.device) -> torch.dtype | None:
    """Returns bfloat16 on a GPU that computes in it, else float16; None means float32 (CPU)."""
    if not enabled or device.type != "cuda":
        return None
    return torch.bfloat16 if _has_bfloat16(device) else torch.float16


def check_precision(name: str, device: torch.device) -> None:
    """Checks TEST.PRECISION, as far as it can be known before the network is on its device.

    Raises:
        ValueError: there is no such precision, or the device does not compute in it.
    """
    if name not in PRECISIONS:
        raise ValueError(f"{KEY} is {name!r}; it must be one of {', '.join(PRECISIONS)}")
    if name not in EVERYWHERE and (device.type != "cuda" or torch.cuda.is_available()):
        inference_precision(name, device)


def inference_precision(name: str, device: torch.device) -> str:
    """What a value of TEST.PRECISION means on a device.

    Returns:
        "float32", "tf32", "bfloat16" or "float16".

    Raises:
        ValueError: the device does not compute in it.
    """
    if name == "auto":
        dtype = mixed_precision_dtype(True, device)
        return "float32" if dtype is None else str(dtype).removeprefix("torch.")
    known = _known_precisions(device)
    if name not in known:
        is_gpu = device.type == "cuda"
        what = torch.cuda.get_device_name(device) if is_gpu else f"the device {device}"
        raise ValueError(
            f"{KEY} is {name}, which {what} does not compute in; "
            f"use auto or one of {', '.join(known)}"
        )
    return name


@contextlib.contextmanager
def network_precision(name: str, device: torch.device) -> Iterator[None]:
    """Lets a network compute as TEST.PRECISION asks for, whatever autocast is on outside.

    "float32" and "tf32" set PyTorch's switches for TensorFloat-32 in matrix products and
    convolutions of CUDA, which are the process's, and set them back at the end: one thread at a
    time.

    Raises:
        ValueError: the device does not compute in it.
    """
    precision = inference_precision(name, device)
    _log_once(name, precision, device)
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, dtype=half, enabled=half is not None))
        if half is None and device.type == "cuda":
            stack.enter_context(_tensor_float_32(precision == "tf32"))
        yield


def training_precision(dtype: torch.dtype | None, device: torch.device) -> str:
    """Says in which types training computes, for the log; None: without autocast."""
    name = "float32" if dtype is None else f"{str(dtype).removeprefix('torch.')} by autocast"
    if device.type != "cuda":
        return f"{name} on {device}"
    backends: Any = torch.backends  # whose attributes differ between releases
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        settings = (matmul.fp32_precision, cudnn.conv.fp32_precision)
        of_all = backends.fp32_precision
        switches = [(of_all if setting == "none" else setting) == "tf32" for setting in settings]
    else:
        switches = [matmul.allow_tf32, cudnn.allow_tf32]
    products, convolutions = ("on" if switch else "off" for switch in switches)
    benchmark = "on" if cudnn.benchmark else "off"
    return (
        f"{name} on {device}; where that is float32, TF32 is {products} in matrix products and "
        f"{convolutions} in convolutions; cuDNN's benchmark is {benchmark}"
    )


def _why(name: str, device: torch.device) -> str:
    """What else a CPU could compute in that is left to "auto"."""
    if name != "auto" or device.type != "cpu":
        return ""
    reason = ", which stays exact on a CPU"
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, has, bool)() for has in instructions):
        reason += "; in bfloat16, which this one has, it would take about half the time"
    return reason


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has bfloat16 itself: emulated, it is slower than float32."""
    with contextlib.ExitStack() as stack:
        if device.index is not None and device.index != torch.cuda.current_device():
            stack.enter_context(torch.cuda.device(device))
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _known_precisions(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("float32", "bfloat16")
    if device.type != "cuda":
        return ("float32",)
    has_tf32 = torch.cuda.get_device_capability(device) >= FIRST_WITH_TF32
    own = (("tf32", has_tf32), ("bfloat16", _has_bfloat16(device)))
    return ("float32", *(name for name, there in own if there), "float16")


@dataclass(frozen=True)
class _Switch:
    """One of PyTorch's switches for TensorFloat-32."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    on: object
    off: object

    @staticmethod
    def of(owner: object, name: str, on: object, off: object) -> _Switch:
        return _Switch(partial(getattr, owner, name), partial(setattr, owner, name), on, off)


def _switches() -> tuple[_Switch, ...]:
    """Those of matrix products and convolutions.

    The older ones, which keep the newer ones in step: where the two differ, PyTorch raises as soon
    as anybody, its profiler for one, reads an older one. Where they differ already, the process
    uses the newer ones.
    """
    _use_up_warnings()
    backends: Any = torch.backends
    cudnn, name = backends.cudnn, "fp32_precision"
    matmul = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    older = (_Switch(*matmul, "high", "highest"), _Switch.of(cudnn, "allow_tf32", True, False))
    try:
        for switch in older:
            switch.read()
    except RuntimeError:
        owners = (backends.cuda.matmul, cudnn.conv)
        return tuple(_Switch.of(owner, name, "tf32", "ieee") for owner in owners)
    return older


@contextlib.contextmanager
def _tensor_float_32(enabled: bool) -> Iterator[None]:
    """Switches TensorFloat-32 on or off."""
    with _switching:
        switches = _switches()
        before = [switch.read() for switch in switches]
        try:
            for switch in switches:
                switch.write(switch.on if enabled else switch.off)
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.write(value)


@functools.cache
def _use_up_warnings() -> None:
    """Some releases warn of the older switches, once in a process."""
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())


@functools.cache
def _log_once(name: str, precision: str, device: torch.device) -> None:
    """Says in what inference computes; asks the processor only for what is said."""
    why = _why(name, device)
    logger.info("Inference computes in %s on %s (%s is %s%s).", precision, device, KEY, name, why)
