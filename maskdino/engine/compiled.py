"""Training with fewer launches: compiled layers (`SOLVER.COMPILE`), or CUDA graphs.

Backbone, encoder layers and decoder layers are compiled apart, all layers of a kind once; a graph
has the whole network. Matching and losses, whose sizes differ from batch to batch, run as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from maskdino.model import MaskDINO

logger = logging.getLogger(__name__)


def replay_network(model: nn.Module) -> bool:
    """Lets training steps replay the network as CUDA graphs (`SOLVER.CUDA_GRAPHS`).

    Args:
        model: on its device.

    Returns:
        Whether they will; without a GPU a line in the log says that they will not.

    Raises:
        ValueError: the model is another architecture, whose network is not known.
    """
    model = _known(model, "SOLVER.CUDA_GRAPHS")
    if model.device.type != "cuda":
        logger.warning("SOLVER.CUDA_GRAPHS is on, but the model trains on: %s", model.device)
        return False
    model.replay_in_training()
    return True


def compile_layers(model: nn.Module, backend: str = "inductor") -> bool:
    """Lets a model's layers compile themselves when they first train.

    Names of weights stay as they are, so that checkpoints fit either way. In evaluation the layers
    run as they are: images have other sizes there.

    Args:
        model: on its device.
        backend: of `torch.compile`.

    Returns:
        Whether layers are compiled; where nothing can be compiled, a line in the log says why not.

    Raises:
        ValueError: the model is another architecture, whose layers are not known.
    """
    model = _known(model, "SOLVER.COMPILE")
    reason = _why_not(model.device, backend)
    if reason:
        logger.warning("SOLVER.COMPILE is on, but layers train as they are: %s", reason)
        return False
    # Sizes of images are few; each gets code of its own, which is the faster.
    for module in (model.backbone, *model.encoder.layers):
        _compile_in_training(module, backend, dynamic=False)
    # The number of noised queries is another in nearly each batch.
    for module in model.decoder.layers:
        _compile_in_training(module, backend, dynamic=None)
    logger.info(
        "Backbone, encoder layers and decoder layers are compiled by %s; the first steps take "
        "minutes.",
        backend,
    )
    return True


def _known(model: nn.Module, key: str) -> MaskDINO:
    if isinstance(model, MaskDINO):
        return model
    raise ValueError(
        f"{key} is for models of the class MaskDINO, not {type(model).__name__}: set it to False"
    )


def _compile_in_training(module: nn.Module, backend: str, *, dynamic: bool | None) -> None:
    module.compile(backend=backend, dynamic=dynamic)
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if module.training else module._call_impl)(*args, **kwargs)

    module._compiled_call_impl = call


def _why_not(device: torch.device, backend: str) -> str:
    """Why nothing can be compiled on a device: a small program is tried. Empty where it can."""

    def program(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    try:
        torch.compile(program, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - compilers fail in ways of their own
        cause = getattr(error, "inner_exception", error)  # what the compiler itself raised
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return f"{type(cause).__name__}: {(lines or ['without a message'])[0]}"
    return ""
