"""The device that a configuration or a command names: whether it exists, and who computes on it."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from maskdino.system.allocator import keep_large_blocks
from maskdino.system.errors import reason_of
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

KEY = "MODEL.DEVICE"


def find_device(name: str | torch.device, what: str = KEY) -> torch.device:
    """The device of a name that PyTorch knows, such as "cuda:1".

    Raises:
        ValueError: there is no such device here; names `what` asked for it.
    """
    device = _parsed(name, what)
    if device.type == "meta":
        raise ValueError(f"{what} is {name}, which computes no values: use 'cuda' or 'cpu'")
    if device.type == "cuda":
        missing = _missing_gpu(device)
        if missing:
            raise ValueError(f"{what} is {name}, but {missing}")
    elif device.type != "cpu":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(
                f"{what} is {device}, which cannot be used here: {reason_of(error)}"
            ) from error
    return device


def configured_device(name: str, processes: int = 1) -> torch.device:
    """The device that MODEL.DEVICE names; where there is no GPU, the CPU in its place.

    Raises:
        ValueError: there is no such device here, though there are GPUs; or so many processes of
            this machine would share a GPU.
    """
    if _parsed(name, KEY).type == "cuda" and not torch.cuda.is_available():
        logger.info("%s is %s, but %s: computing on the CPU.", KEY, name, _no_gpu_at_all())
        return torch.device("cpu")
    device = find_device(name)
    if processes > 1 and _is_numbered_gpu(device):
        raise ValueError(
            f"{KEY} is {device}, but each of {processes} processes needs a GPU of its own: use "
            "'cuda'"
        )
    return device


def pick_device(wanted: str | torch.device | None, configured: str) -> torch.device:
    """The device that was asked for, else the configured one, else, without a GPU, the CPU."""
    if wanted is None:
        return configured_device(configured)
    return find_device(wanted, "the device asked for")


def settle_device(cfg: CfgNode) -> CfgNode:
    """Settles where a process of a training or an evaluation computes.

    A GPU with a number becomes the current one, which whatever names no device uses: streams,
    events, memory statistics, pinned memory. On a CPU large blocks of memory are kept for the next
    step.

    Returns:
        The configuration with the device as it is; the argument stays as it was.

    Raises:
        ValueError: there is no such device here, or several processes would share it.
    """
    device = configured_device(cfg.MODEL.DEVICE, comm.get_local_size())
    keep_large_blocks(device)
    if _is_numbered_gpu(device):
        torch.cuda.set_device(device)
    if str(device) == cfg.MODEL.DEVICE:
        return cfg
    settled, was_frozen = cfg.clone(), cfg.is_frozen()
    settled.defrost()
    settled.MODEL.DEVICE = str(device)
    if was_frozen:
        settled.freeze()
    return settled


def _parsed(name: str | torch.device, what: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"{what} is {name!r}, which is no device: use 'cuda', 'cuda:1' or 'cpu'"
        ) from error


def _is_numbered_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is not None


def _missing_gpu(device: torch.device) -> str:
    """Why a CUDA device does not exist; empty if it does."""
    if not torch.cuda.is_available():
        return _no_gpu_at_all()
    found = torch.cuda.device_count()
    if (device.index or 0) < found:
        return ""
    names = "cuda:0" if found == 1 else f"cuda:0 to cuda:{found - 1}"
    return f"PyTorch finds {counted(found, 'GPU')} here: {names}"


def _no_gpu_at_all() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    return "PyTorch finds no GPU here"
