"""Deformable attention as one node, the interface of TensorRT's own plugin.

Shape key: B images, Q queries, S tokens, M heads, D channels of a head, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskdino.ops.ms_deform_attn import locations_and_weights, ms_deform_attn_reference

if TYPE_CHECKING:
    from maskdino.structures import SpatialShapes

PLUGIN, PLUGIN_DOMAIN = "MultiscaleDeformableAttnPlugin_TRT", "TRT"


def plugin_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    offsets_and_logits: Tensor,
    reference: Tensor | None,
    num_points: int,
) -> Tensor:
    """`ms_deform_attn_fused` with sampling and sum as one operator, the interface of the plugin."""
    locations, weights = locations_and_weights(
        value, spatial_shapes, offsets_and_logits, reference, num_points
    )
    shapes = _int32([edge for shape in spatial_shapes for edge in shape], value).view(-1, 2)
    starts = [0]
    for height, width in spatial_shapes[:-1]:
        starts.append(starts[-1] + height * width)
    out = sample_and_sum(value, shapes, _int32(starts, value), locations, weights)
    return out.flatten(2)


def _int32(numbers: Sequence[int], like: Tensor) -> Tensor:
    """(n,) int32; filled number by number, so that a size that varies stays a variable."""
    return torch.cat([like.new_full((1,), number, dtype=torch.int32) for number in numbers])


@torch.library.custom_op("maskdino_export::sample_and_sum", mutates_args=())
def sample_and_sum(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,  # noqa: ARG001
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """TensorRT's plugin in PyTorch, to check what is exported.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (L, 2) int32 height and width of each level.
        level_start_index: (L,) int32 first token of each level.
        sampling_locations: (B, Q, M, L, P, 2) x, y in [0, 1].
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M, D).
    """
    shapes = [tuple(shape) for shape in spatial_shapes.tolist()]
    out = ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)
    return out.unflatten(2, value.shape[2:]).contiguous()


@sample_and_sum.register_fake
def _(
    value: Tensor,
    spatial_shapes: Tensor,  # noqa: ARG001
    level_start_index: Tensor,  # noqa: ARG001
    sampling_locations: Tensor,
    attention_weights: Tensor,  # noqa: ARG001
) -> Tensor:
    return value.new_empty(value.shape[0], sampling_locations.shape[1], *value.shape[2:])


def plugin_translation() -> dict:
    """The ONNX node that stands for `sample_and_sum`."""
    from onnxscript.values import Opset

    _register_plugin_schema()
    node = getattr(Opset(PLUGIN_DOMAIN, 1), PLUGIN)

    # Without annotations, in which the exporter would look for ONNX types.
    def translate(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        return node(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)

    return {torch.ops.maskdino_export.sample_and_sum.default: translate}


def _register_plugin_schema() -> None:
    """Tells the onnx package what TensorRT's plugin reads: only known operators become nodes."""
    import onnx

    if onnx.defs.has(PLUGIN, 1, PLUGIN_DOMAIN):
        return
    parameter = onnx.defs.OpSchema.FormalParameter
    floats = ("value", "sampling_locations", "attention_weights")
    inputs = [
        parameter(name, "T" if name in floats else "tensor(int32)")
        for name in (
            "value",
            "spatial_shapes",
            "level_start_index",
            "sampling_locations",
            "attention_weights",
        )
    ]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            PLUGIN,
            PLUGIN_DOMAIN,
            1,
            inputs=inputs,
            outputs=[parameter("output", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        )
    )
