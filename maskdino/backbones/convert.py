"""Names of backbone weights in other files -> names in `TimmBackbone`.

Three kinds of file are known: Swin of released detectors (`layers.0.downsample`, `norm0`..`norm3`),
Swin as its authors publish it for ImageNet (the same, with one `norm` and `head`), and state dicts
of timm (any model). Both Swins merge patches in the same order (down, then right), so no weight has
to be permuted.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from .timm_backbone import TimmBackbone

# Tables that follow from the window size, and the classifier behind the last stage: no weights of a
# backbone.
_UNUSED_IN_SWIN = re.compile(
    r"(norm|head)\..*|.*\.(relative_position_index|attn_mask|relative_coords_table)"
)


def swin_rules(names: Iterable[str]) -> dict[str, str]:
    """Maps the names of a Swin's weights onto those of `TimmBackbone`; values stay as they are.

    Args:
        names: all names of one file's backbone, without a leading "backbone.". (All of them: a
            patch merge `layers.1.downsample` ends stage 1 in released files and starts it in
            timm's; which one it is shows from the presence of `layers.0.downsample`.)

    Returns:
        for each name: our name. Names for which `is_unused_in_swin` holds are left out.

    Raises:
        ValueError: for a name that is no part of a Swin.
    """
    names = list(names)
    merge_ends_stage = any(name.startswith("layers.0.downsample.") for name in names)
    used = (name for name in names if not is_unused_in_swin(name))
    return {name: _swin_name(name, merge_ends_stage) for name in used}


def is_unused_in_swin(name: str) -> bool:
    """Whether a Swin file's tensor is a derived table or a classifier's (see `swin_rules`)."""
    return _UNUSED_IN_SWIN.fullmatch(name) is not None


def convert_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a Swin's weights (names as in `swin_rules`) for `TimmBackbone.load_state_dict`."""
    return {ours: state_dict[name] for name, ours in swin_rules(state_dict).items()}


def convert_backbone(checkpoint: Mapping[str, Any], backbone: TimmBackbone) -> dict[str, Tensor]:
    """Converts the content of a weight file (Swin or timm) for `backbone`.

    Args:
        checkpoint: names and tensors, or a dictionary that holds them as "model", "state_dict" or
            both; a leading "module." or "backbone." of the names is dropped. Tensors of a whole
            detector beside `backbone.*` are left out.
        backbone: where the weights belong; only names and shapes are read, so the "meta" device
            serves.

    Returns:
        a state dict of `backbone`, complete but for `norms.*`, which ImageNet files do not have.
        Bias tables of another window size are interpolated.

    Raises:
        ValueError: if weights of the backbone's trunk are missing, left over, or of another shape.
    """
    source = _unwrapped(checkpoint)
    wanted = backbone.state_dict()
    if any(re.match(r"layers\.\d+\.blocks\.", name) for name in source):
        converted = convert_swin(source)
    else:
        converted = {_timm_name(name, wanted): tensor for name, tensor in source.items()}
    # Parts that the extractor does not have at all (classifier, later stages) are no left-overs,
    # nor are the counters of batches, which frozen batch norm does not have.
    parts = {_part(name) for name in wanted}
    unused = {n for n in converted if _part(n) not in parts or _is_absent_counter(n, wanted)}
    converted = {n: _resized(n, t, backbone) for n, t in converted.items() if n not in unused}
    _check_complete(converted, wanted)
    return converted


def _swin_name(name: str, merge_ends_stage: bool) -> str:
    if name.startswith("patch_embed."):
        return f"body.{name}"
    if match := re.fullmatch(r"norm([0-3])\.(\w+)", name):
        return f"norms.res{int(match[1]) + 2}.{match[2]}"
    if match := re.fullmatch(r"layers\.(\d+)\.((?:blocks|downsample)\..+)", name):
        stage = int(match[1])
        if merge_ends_stage and match[2].startswith("downsample."):
            stage += 1
        return f"body.layers_{stage}.{match[2]}"
    raise ValueError(f"{name!r} is not the name of a Swin Transformer's weight")


def _timm_name(name: str, wanted: Iterable[str]) -> str:
    """The name inside timm's extractor, which flattens the first dot where there is a sequence."""
    flattened = f"body.{name.replace('.', '_', 1)}"
    return flattened if _part(flattened) in {_part(other) for other in wanted} else f"body.{name}"


def _part(name: str) -> str:
    """The first two components of one of our names, such as `body.layers_0`."""
    return ".".join(name.split(".")[:2])


def _is_absent_counter(name: str, wanted: Mapping[str, Tensor]) -> bool:
    return name.endswith(".num_batches_tracked") and name not in wanted


def _unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)
    tensors = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    prefix = "backbone."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return tensors


def _resized(name: str, tensor: Tensor, backbone: TimmBackbone) -> Tensor:
    """Interpolates a table of relative position biases to the window of `backbone`; others stay."""
    if not name.endswith("attn.relative_position_bias_table"):
        return tensor
    attention = backbone.get_submodule(name.rpartition(".")[0])
    shape = attention.relative_position_bias_table.shape
    if tensor.shape == shape:
        return tensor
    return resize_rel_pos_bias_table(tensor, attention.window_size, shape)


def _check_complete(converted: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in converted and not name.startswith("norms.")]
    left = [name for name in converted if name not in wanted]
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in converted.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = {"missing": missing, "left over": left, "of another shape": shapes}
    found = [f"{len(n)} weights {what} ({', '.join(n[:3])})" for what, n in problems.items() if n]
    if found:
        raise ValueError(f"the file does not fit the backbone: {'; '.join(found)}")
