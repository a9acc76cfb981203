"""The optimizer with few parameter groups, and the clipping of gradients."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, AdamW, Optimizer

from maskdino.backbones import PlainViTBackbone
from maskdino.checkpoint.reading import CheckpointError

logger = logging.getLogger(__name__)

NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
# Positions and extra tokens of transformers are plain parameters, not nn.Embedding.
POSITION_TABLES = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "pos_embed",
    "rel_pos_h",
    "rel_pos_w",
    "cls_token",
    "reg_token",
)

GradientClipper = Callable[[Iterable[nn.Parameter]], Tensor]


def build_optimizer(cfg: CfgNode, model: nn.Module, *, fused: bool = True) -> Optimizer:
    """Builds the optimizer that `SOLVER.OPTIMIZER` names.

    Parameters of equal learning rate and weight decay share a group: at most four with the default
    keys, so that a step is a few fused kernels.

    Args:
        cfg: configuration; the node `SOLVER` is read.
        model: the model; parameters below `backbone.` learn `SOLVER.BACKBONE_MULTIPLIER` times
            as fast.
        fused: whether a step is one kernel for many parameters, where the device has it.

    Raises:
        ValueError: if the optimizer is unknown, or the model has nothing to train.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        learning_rate=solver.BASE_LR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        bias_multiplier=solver.BIAS_LR_FACTOR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        rate_factors=_layer_factors(model, solver.LAYER_DECAY),
    )
    if not groups:
        raise ValueError("The model has no trainable parameters; is everything frozen?")
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = fused and devices <= {"cpu", "cuda"}
    if solver.OPTIMIZER == "ADAMW":
        return AdamW(groups, lr=solver.BASE_LR, fused=fused)
    if solver.OPTIMIZER == "SGD":
        return SGD(
            groups,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            fused=fused,
        )
    raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use 'ADAMW' or 'SGD'.")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    backbone_multiplier: float,
    bias_multiplier: float,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_embed: float,
    weight_decay_bias: float | None,
    rate_factors: Mapping[str, float] | None = None,
) -> list[dict]:
    """Sorts the trainable parameters by (learning rate, weight decay).

    Args:
        model: the model; a parameter that several modules share is taken once.
        learning_rate: of everything outside the backbone.
        backbone_multiplier: factor for parameters below `backbone.`.
        bias_multiplier: factor for biases.
        weight_decay: of all that the following do not name.
        weight_decay_norm: of normalization layers, their biases included.
        weight_decay_embed: of `nn.Embedding` and position tables.
        rate_factors: further factors of the learning rate, by the names of parameters.
        weight_decay_bias: of other biases; None means `weight_decay`.

    Returns:
        Groups with the keys `params`, `lr` and `weight_decay`, in the order of their first
        parameter.
    """
    bias_decay = weight_decay if weight_decay_bias is None else weight_decay_bias
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factors = rate_factors or {}
    for module, name, parameter in _trainable_parameters(model):
        leaf = name.rpartition(".")[2]
        rate = learning_rate * factors.get(name, 1.0)
        if name.startswith("backbone."):
            rate *= backbone_multiplier
        if leaf == "bias":
            rate *= bias_multiplier
        if isinstance(module, NORM_LAYERS):
            decay = weight_decay_norm
        elif isinstance(module, nn.Embedding) or leaf in POSITION_TABLES:
            decay = weight_decay_embed
        else:
            decay = bias_decay if leaf == "bias" else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores the optimizer of a run that goes on, whose learning rates and decays stay.

    Raises:
        CheckpointError: the state is that of another optimizer, or of other groups of parameters.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    kinds = [[(len(x["params"]), "momentum" in x) for x in groups] for groups in (own, saved)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            "the run began with another optimizer, or other groups of parameters: leave "
            "SOLVER.OPTIMIZER, its multiplier, layer and weight decays, and what is frozen as they "
            "were, or begin anew from its weights, in another OUTPUT_DIR"
        )
    for key, name in (("initial_lr", "learning rates"), ("weight_decay", "weight decays")):
        asked, kept = ([group.get(key) for group in groups] for groups in (own, saved))
        if asked != kept:
            logger.warning(
                "The %s are %s, but the run began with %s, which stay.", name, asked, kept
            )
    optimizer.load_state_dict(state)


def _layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Factors of layer-wise decay (Bao et al., BEiT, arXiv:2106.08254): `decay ** depth`."""
    if not 0 < decay <= 1:
        raise ValueError(f"SOLVER.LAYER_DECAY must be above 0 and at most 1, got {decay}")
    if decay == 1:
        return {}
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, PlainViTBackbone):
        raise ValueError(
            f"SOLVER.LAYER_DECAY is {decay}, but the backbone is no plain vision transformer; set "
            "it to 1.0 and use SOLVER.BACKBONE_MULTIPLIER"
        )
    return {f"backbone.{name}": decay**depth for name, depth in backbone.depths().items()}


def _trainable_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module, f"{module_name}.{leaf}" if module_name else leaf, parameter


def build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Builds the function that clips gradients just before an optimizer step.

    It clips in place, after gradients were accumulated, averaged over processes and unscaled, and
    returns the norm of the whole model's gradient before clipping (0-d tensor on the model's
    device: reading it waits for the device, so leave that to the logger).

    `SOLVER.CLIP_GRADIENTS.CLIP_TYPE`: "full_model" bounds the norm of all gradients together,
    "norm" that of each parameter, "value" each element.

    Raises:
        ValueError: if the type is unknown, or the bound not positive.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    norm_type, bound = float(clip.NORM_TYPE), float(clip.CLIP_VALUE)
    kind = clip.CLIP_TYPE if clip.ENABLED else "none"
    if kind not in ("none", "full_model", "norm", "value"):
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {kind!r}; use 'full_model', 'norm' or 'value'."
        )
    if kind != "none" and not bound > 0:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be positive, but is {bound}.")

    def clipper(parameters: Iterable[nn.Parameter]) -> Tensor:
        trained = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        total_norm = _total_norm(gradients, norm_type)
        if kind == "full_model" and gradients:
            torch._foreach_mul_(gradients, (bound / (total_norm + 1e-6)).clamp(max=1.0))
        elif kind == "value":
            torch.nn.utils.clip_grad_value_(trained, bound)
        elif kind == "norm":
            for parameter in trained:
                torch.nn.utils.clip_grad_norm_(parameter, bound, norm_type)
        return total_norm

    return clipper


def _total_norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    """As `torch.nn.utils.get_total_norm`, which first groups gradients by device and dtype."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, norm_type)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)
