"""For trainers of others, detectron2's first of all: our optimizer, and the keys that differ.

Shape key: this module handles parameters of any shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from maskdino.config.loading import get_value
from maskdino.engine import solver
from maskdino.integration.compat import name_keys_of_our_trainer
from maskdino.system.devices import configured_device

logger = logging.getLogger(__name__)

name_keys_of_our_trainer()


def adapt_to_detectron2(cfg: CfgNode) -> None:
    """Sets the keys that detectron2's own trainer, mapper and evaluator read (in place).

    One line of the log tells which. The learning rate schedule and the size of the batch are the
    same keys there. ``INPUT.LSJ`` is read by the mappers of `maskdino.data` alone.

    Args:
        cfg: with Mask DINO's keys, after the last file and override; not frozen.

    Raises:
        ValueError: there is no such device here as MODEL.DEVICE names, though there are GPUs.
    """
    device = configured_device(cfg.MODEL.DEVICE)
    wanted = {
        "MODEL.DEVICE": str(device),
        # Masks are read, as polygons or as run lengths, where the model learns them.
        "MODEL.MASK_ON": cfg.MODEL.MASK_DINO.MASK_ON,
        "INPUT.MASK_FORMAT": "bitmask",
        # Our own stream of training data draws the other images.
        "INPUT.COPY_PASTE.PROBABILITY": 0.0,
        "INPUT.MOSAIC.PROBABILITY": 0.0,
    }
    if device.type != "cuda":
        wanted["SOLVER.AMP.ENABLED"] = False
    if cfg.INPUT.RANDOM_FLIP in ("both", "dihedral"):
        wanted["INPUT.RANDOM_FLIP"] = "horizontal"
    before = {name: get_value(cfg, name) for name in wanted}
    cfg.merge_from_list([word for item in wanted.items() for word in item])
    changed = [f"{name} {value}" for name, value in wanted.items() if before[name] != value]
    if changed:
        logger.warning("Changed for detectron2's own trainer: %s.", ", ".join(changed))


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Builds the optimizer of SOLVER, which clips gradients as SOLVER.CLIP_GRADIENTS says.

    Args:
        cfg: with Mask DINO's keys.
        model: the model.

    Raises:
        ValueError: mixed precision is asked for on a CPU, where detectron2's trainer has none; or
            as `maskdino.engine.solver` says.
    """
    if cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ValueError(
            "SOLVER.AMP.ENABLED is True and MODEL.DEVICE cpu, where detectron2's trainer has no "
            "mixed precision: set it to False, or call maskdino.adapt_to_detectron2(cfg)"
        )
    # Not fused: a fused step is given the gradients before mixed precision scales them back.
    optimizer = solver.build_optimizer(cfg, model, fused=False)
    return _clipped(optimizer, solver.build_gradient_clipper(cfg))


def clipped_adamw(
    params: Iterable[dict[str, Any]], lr: float, clip_norm: float, **options: Any
) -> AdamW:
    """Builds AdamW for detectron2's LazyConfig; before a step, the whole gradient is clipped.

    Args:
        params: groups, such as `maskdino.engine.solver.parameter_groups` makes.
        lr: learning rate of groups that name none.
        clip_norm: largest norm of the gradient of all parameters together.
        options: more of `torch.optim.AdamW`.
    """

    def clip(parameters: Iterable[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, clip_norm)

    return _clipped(AdamW(params, lr=lr, **options), clip)


def feature_shapes(**channels: int) -> dict[str, ShapeSpec]:
    """Shapes of a backbone's features by their names, for LazyConfig: res2 has stride 4.

    Args:
        channels: of each feature, such as ``res2=256``.
    """
    return {
        name: ShapeSpec(channels=number, stride=2 ** int(name.removeprefix("res")))
        for name, number in channels.items()
    }


def _clipped(optimizer: Any, clip: solver.GradientClipper) -> Any:
    def before_step(optimizer: Optimizer, *_: object) -> None:
        clip(p for group in optimizer.param_groups for p in group["params"])

    optimizer.register_step_pre_hook(before_step)
    return optimizer
