"""Names of backbone weights in other files -> names in our backbones.

Known are Swin of released detectors (`layers.0.downsample`, `norm0`..`norm3`), Swin as its authors
publish it for ImageNet (the same, with one `norm` and `head`), state dicts of timm (any model),
plain transformers as their authors publish them (what timm can read), and detectron2's ViTDet. Both
Swins merge patches in the same order (down, then right), so no weight has to be permuted.
"""

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor

from maskdino.backbones.packaged import PREFIX, read_packaged
from maskdino.backbones.timm_backbone import TimmBackbone
from maskdino.backbones.vit import PlainViTBackbone
from maskdino.system.errors import BROKEN, reason_of

logger = logging.getLogger(__name__)

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


def read_tensors(path: str) -> Mapping[str, Any]:
    """Reads a file of tensors (.pth, .bin, .safetensors); nothing in it is executed.

    Raises:
        ValueError: if there is no such file, or it holds something else; in one line.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UnpicklingError, SafetensorError, *BROKEN) as error:
        raise ValueError(f"{path} holds no weights, or was cut off: {reason_of(error)}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds no weights, but {type(checkpoint).__name__}")
    return checkpoint


def load_backbone(path: str, backbone: TimmBackbone | PlainViTBackbone) -> None:
    """Loads a file of weights (see `convert_backbone`) into the trunk of a backbone.

    Args:
        path: of the file, or "pip:" and an installed package (see `read_packaged`).
        backbone: where the weights belong.

    Raises:
        ValueError: if the file cannot be read, or is not of this model.
        FileNotFoundError: if the package is not installed.
    """
    try:
        is_packaged = path.startswith(PREFIX)
        content = read_packaged(path) if is_packaged else read_tensors(path)
        weights = convert_backbone(content, backbone)
    except ValueError as error:
        raise ValueError(f"MODEL.TIMM.WEIGHTS: {error}") from error
    backbone.load_state_dict(backbone.state_dict() | weights)
    logger.info("backbone: %d weights from %s", len(weights), path)


def convert_backbone(
    checkpoint: Mapping[str, Any], backbone: TimmBackbone | PlainViTBackbone
) -> dict[str, Tensor]:
    """Converts the content of a weight file (Swin, a plain transformer, timm) for `backbone`.

    Args:
        checkpoint: names and tensors, or a dictionary that holds them as "model", "state_dict" or
            both, or their average, which is preferred; a leading "module." or "backbone." of the
            names is dropped. Tensors of a whole detector beside `backbone.*` are left out.
        backbone: where the weights belong; only names and shapes are read, so the "meta" device
            serves.

    Returns:
        a state dict of `backbone`, complete but for `norms.*` and `pyramid.*`, which ImageNet files
        do not have. Bias tables of another window size, positions of other images and patches of
        another size are interpolated.

    Raises:
        ValueError: if weights of the backbone's trunk are missing, left over, or of another shape.
    """
    source = _unwrapped(checkpoint)
    wanted = backbone.state_dict()
    if isinstance(backbone, PlainViTBackbone):
        converted = _vit_weights(source, backbone)
    elif any(re.match(r"layers\.\d+\.blocks\.", name) for name in source):
        converted = convert_swin(source)
    else:
        converted = {_timm_name(name, wanted): tensor for name, tensor in source.items()}
    # Parts that the extractor does not have at all (classifier, later stages) are no left-overs,
    # nor are the counters of batches, which frozen batch norm does not have.
    parts = {_part(name) for name in wanted}
    converted = {
        name: _resized(name, tensor, backbone)
        for name, tensor in converted.items()
        if name in wanted or (_part(name) in parts and not name.endswith(".num_batches_tracked"))
    }
    _check_complete(converted, wanted)
    return converted


def _vit_weights(source: dict[str, Tensor], backbone: PlainViTBackbone) -> dict[str, Tensor]:
    """Weights of a plain transformer by timm's own reading of the authors' files."""
    model = backbone.body.model
    if any(name.startswith("net.blocks.") for name in source):
        source = _vitdet_trunk(source, model.pos_embed)
    read = sys.modules[type(model).__module__].checkpoint_filter_fn
    try:
        weights = read(source, model)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"no weights of a {type(model).__name__}: {error}") from error
    parts = {name.partition(".")[0] for name in model.state_dict()}
    return {f"body.model.{n}": t for n, t in weights.items() if n.partition(".")[0] in parts}


def _vitdet_trunk(source: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """The trunk of a ViTDet of detectron2 as timm's `samvit_*` (windows, relative positions).

    Args:
        source: weights of ViTDet's backbone; positions (1, 1 + n x n, C) of a pre-training with a
            class token, which a detector leaves out.
        positions: (1, h, w, C) of the model that takes them.
    """
    trunk = {n.removeprefix("net."): t for n, t in source.items() if n.startswith("net.")}
    learned = trunk["pos_embed"]
    if positions.ndim != 4 or "blocks.0.attn.rel_pos_h" not in trunk:
        raise ValueError(
            "these are weights of detectron2's ViTDet, which fit timm's samvit_base_patch16, "
            "samvit_large_patch16 and samvit_huge_patch16"
        )
    resampled = resample_abs_pos_embed(
        learned, list(positions.shape[1:3]), num_prefix_tokens=1, antialias=False
    )
    return {**trunk, "pos_embed": resampled[:, 1:].reshape(positions.shape)}


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


def _unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "state_dict"):
        inner = checkpoint.get(key)
        checkpoint = inner if isinstance(inner, Mapping) else checkpoint
    wrong = [
        str(name)
        for name, value in checkpoint.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if wrong or not checkpoint:
        raise ValueError(f"it holds no weights, but {', '.join(wrong[:3]) or 'nothing'}")
    tensors = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    prefix = "backbone."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return tensors


def _resized(name: str, tensor: Tensor, backbone: TimmBackbone | PlainViTBackbone) -> Tensor:
    """Interpolates a table of relative position biases to the window of `backbone`; others stay."""
    if not name.endswith("attn.relative_position_bias_table"):
        return tensor
    attention = backbone.get_submodule(name.rpartition(".")[0])
    shape = attention.relative_position_bias_table.shape
    if tensor.shape == shape:
        return tensor
    return resize_rel_pos_bias_table(tensor, attention.window_size, shape)


def _check_complete(converted: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    ours = ("norms.", "pyramid.")
    missing = [name for name in wanted if name not in converted and not name.startswith(ours)]
    left = [name for name in converted if name not in wanted]
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in converted.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = {"missing": missing, "left over": left, "of another shape": shapes}
    found = [f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in problems.items() if n]
    if found:
        raise ValueError(f"the file does not fit the backbone: {'; '.join(found)}")
