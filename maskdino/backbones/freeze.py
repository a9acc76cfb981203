"""Freezing of the first stages of a timm feature extractor, counted as detectron2 counts them."""

from typing import Any

from timm.utils import freeze


def freeze_stages(body: Any, freeze_at: int) -> None:
    """Freezes parameters and batch-norm statistics of the first stages (in place).

    Args:
        body: a timm model made with `features_only=True`.
        freeze_at: 0 freezes nothing, 1 all that comes before res2 (the stem), 2 also res2, ... 5
            also res5.

    Raises:
        ValueError: if `freeze_at` is outside 0..5 or its stage is none of the model's.
    """
    check_freeze_at(freeze_at)
    if freeze_at == 0:
        return
    stage = _stage_name(body, stride=2 ** max(freeze_at, 2))
    names = [name for name, _ in body.named_modules()]
    if freeze_at == 1:
        last = names.index(stage) - 1
    else:
        last = max(i for i, name in enumerate(names) if _is_inside(name, stage))
    trained = names[last + 1 :]
    frozen = [n for n in names[: last + 1] if not any(_is_inside(other, n) for other in trained)]
    if frozen:  # timm takes an empty list for "everything"
        freeze(body, frozen)


def check_freeze_at(freeze_at: int) -> None:
    """Raises a ValueError for a number that counts no stages."""
    if not 0 <= freeze_at <= 5:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0, 1, 2, 3, 4 or 5, got {freeze_at}")


def _is_inside(name: str, parent: str) -> bool:
    return name == parent or parent == "" or name.startswith(parent + ".")


def _stage_name(body: Any, stride: int) -> str:
    """Name inside `body` of the module that gives the last feature of this stride."""
    modules = dict(body.named_modules())
    features: Any = body.feature_info
    named = [info["module"] for info in features.info if info["reduction"] == stride]
    if not named:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT asks for a stage of stride {stride}; there is none"
        )
    # timm's extractors keep a module's name, flatten its first dot, or hold the whole model in
    # `body` or `model`.
    name = named[-1]
    candidates = (name, name.replace(".", "_", 1), f"body.{name}", f"model.{name}")
    for candidate in candidates:
        if candidate in modules:
            return candidate
    raise ValueError(
        f"cannot freeze stages: no module of the backbone is called {' or '.join(candidates)}; "
        "set MODEL.BACKBONE.FREEZE_AT: 0"
    )
