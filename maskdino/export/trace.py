"""The network as a program that runs without this package: torch.export and ONNX.

A program reads images on a padded canvas and gives the predictions of the network, or the results
of one task. Nothing in it is a custom operator: deformable attention is spelled out with bilinear
sampling or with look-ups, or, for TensorRT, kept as the node of TensorRT's own plugin.

Shape key: B images, Q queries, K classes, C channels.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from maskdino.backbones.swin import largest_window
from maskdino.export.gather import gather_attention
from maskdino.export.half import store_in_half
from maskdino.export.plugin import plugin_attention, plugin_translation
from maskdino.export.postprocess import results
from maskdino.model import MaskDINO
from maskdino.modeling.attention import DeformableAttention, deformable_attention_by
from maskdino.ops.ms_deform_attn import ms_deform_attn_fused, ms_deform_attn_fused_reference

if TYPE_CHECKING:
    import onnx

OUTPUTS = ("predictions", "instance", "panoptic", "semantic")
MASK_SIZES = ("full", "quarter")
SAMPLINGS = ("grid-sample", "gather", "plugin")
PRECISIONS = ("float32", "float16")
COARSEST_STRIDE = 32  # of backbones: sizes that vary are multiples of it
LARGEST_SIZE = 4096  # pixels of a side that varies
LARGEST_BATCH = 64
DEFERRED_CHECKS = "prefer_deferred_runtime_asserts_over_guards"  # of newer torch.export.export
FIRST_OPSET = 16  # the first with bilinear sampling (GridSample)


@dataclass(frozen=True)
class ExportOptions:
    """What a program reads and gives.

    Attributes:
        outputs: "predictions": those of all queries, without post-processing; or the results of a
            task: "instance", "panoptic" or "semantic".
        mask_size: "full": masks have the size of the canvas; "quarter": a quarter of it, as the
            network computes them.
        size: (height, width) of the canvas, multiples of 32; None: any size.
        sampling: how deformable attention reads the maps: "grid-sample": by the operator of that
            name; "gather": by look-ups and arithmetic alone; "plugin": by the node of TensorRT's
            plugin, which also sums.
        precision: "float16": products and maps are float16, as with TEST.PRECISION; locations,
            coordinates, class scores, and the sums over samples stay float32, and so do inputs and
            outputs.
    """

    outputs: str = "predictions"
    mask_size: str = "full"
    size: tuple[int, int] | None = None
    sampling: str = "grid-sample"
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.outputs not in OUTPUTS or self.mask_size not in MASK_SIZES:
            raise ValueError(
                f"outputs {self.outputs!r} must be one of {OUTPUTS}, and mask_size "
                f"{self.mask_size!r} one of {MASK_SIZES}"
            )
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling {self.sampling!r} must be one of {SAMPLINGS}")
        if self.precision not in PRECISIONS or (self.plugin and self.precision != "float32"):
            raise ValueError(
                f"precision {self.precision!r} must be one of {PRECISIONS}; with sampling 'plugin' "
                "it is float32, and TensorRT chooses"
            )
        if self.size is not None and any(s < 1 or s % COARSEST_STRIDE for s in self.size):
            raise ValueError(f"size {self.size} must be multiples of {COARSEST_STRIDE}")

    @property
    def plugin(self) -> bool:
        """Whether only TensorRT runs the program."""
        return self.sampling == "plugin"

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the second input tells which part of each canvas is the image."""
        return self.outputs in ("instance", "panoptic")

    @property
    def input_names(self) -> list[str]:
        """Of the program."""
        return ["images", "image_sizes"] if self.needs_image_sizes else ["images"]


class ExportableNetwork(nn.Module):
    """Images to predictions or results, in a form that can be traced.

    The model is copied: what is exported may not change while it is.
    """

    def __init__(self, model: MaskDINO, options: ExportOptions, *, traceable: bool = True) -> None:
        """Copies the model.

        Args:
            model: a trained model.
            options: what the program shall give.
            traceable: whether deformable attention is spelled out, or as the model computes it, to
                compare with.

        Raises:
            ValueError: the model has no masks, and the options ask for them.
        """
        super().__init__()
        if model.pixel_embedding is None and options.outputs in ("panoptic", "semantic"):
            raise ValueError(f"outputs {options.outputs!r} need masks, and this model gives none")
        self.options = options
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.operator: DeformableAttention = ms_deform_attn_fused
        if traceable:
            for module in self.model.modules():
                if type(module) is Conv2dSame:
                    module.__class__ = _SameConv
            self.operator = {
                "grid-sample": ms_deform_attn_fused_reference,
                "gather": gather_attention,
                "plugin": plugin_attention,
            }[options.sampling]

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Computes a batch.

        Args:
            images: (B, 3, height, width) float32 in [0, 255], in INPUT.FORMAT. What is outside of
                an image (at the right and at the bottom) has the value MODEL.PIXEL_MEAN.
            image_sizes: (B, 2) int64 height and width of the images, for "instance" and
                "panoptic".

        Returns:
            With "predictions" `class_logits` (B, Q, K), `boxes` (B, Q, 4) cx, cy, w, h in [0, 1] of
            the canvas and, with a mask branch, `mask_embeddings` (B, Q, C) and `pixel_embedding`
            (B, C, height / 4, width / 4); else what `maskdino.export.postprocess` tells.
        """
        half = self.options.precision == "float16"
        with (
            torch.autocast(images.device.type, torch.float16, enabled=half),
            deformable_attention_by(self.operator),
        ):
            found = self._computed(images, image_sizes)
        return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}

    def _computed(self, images: Tensor, image_sizes: Tensor | None) -> dict[str, Tensor]:
        model, options = self.model, self.options
        if options.size is None and torch.compiler.is_compiling():
            images = _in_units(images, size_unit(model))
        canvas = (images.shape[2], images.shape[3])
        predictions, pixel_embedding = model.predict((images - model.pixel_mean) / model.pixel_std)
        if options.outputs == "predictions":
            found = {
                "class_logits": predictions.class_logits,
                "boxes": predictions.boxes,
                "mask_embeddings": predictions.mask_embeddings,
                "pixel_embedding": pixel_embedding,
            }
            return {name: value for name, value in found.items() if value is not None}
        masks = canvas
        if options.mask_size == "quarter" and pixel_embedding is not None:
            masks = (pixel_embedding.shape[2], pixel_embedding.shape[3])
        return results(
            options.outputs,
            predictions,
            pixel_embedding,
            image_sizes,
            canvas,
            masks,
            model.inference,
            model.is_thing,
        )


class _SameConv(Conv2dSame):
    """timm's convolution of EfficientNets, with padding computed by divisions of whole numbers.

    timm rounds fractions up and takes the larger of two paddings. Of these the tracer makes longer
    and longer expressions: for programs of any size, it did not come to an end.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        edges: list[int] = []
        for side, kernel, stride, dilation in zip(
            maps.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            cells = (side + stride - 1) // stride
            missing = max((cells - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
            edges = [missing // 2, missing - missing // 2, *edges]  # the last axis first
        maps = functional.pad(maps, edges)
        return functional.conv2d(
            maps, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def _in_units(images: Tensor, unit: int) -> Tensor:
    """Images (B, 3, height, width) as they are, but with sides that are products for the tracer.

    If it knows only that a side is a multiple of the unit, it writes every map's size as nested
    remainders and quotients, and simplifies them at each layer, for minutes.
    """
    for axis in (2, 3):
        side = images.shape[axis] // unit * unit
        images = images.index_select(axis, torch.arange(side, device=images.device))
    return images


def size_unit(model: MaskDINO) -> int:
    """Sides of canvases are multiples of this many pixels."""
    return math.lcm(COARSEST_STRIDE, max(1, model.size_divisibility))


def smallest_size(model: MaskDINO) -> int:
    """The least side, in pixels, of a program for any size.

    It has a token for each query. No level is a single cell, nor a single window of a Swin: the
    tracer would take one for a constant, and the program then has no more than one.
    """
    finest = model.backbone.output_shape()[model.encoder.in_features[0]].stride
    queries = getattr(model.query_selection, "num_queries", 1)
    unit = size_unit(model)
    windows = largest_window(model) * COARSEST_STRIDE // unit + 1
    return unit * max(3, windows, math.ceil(math.sqrt(queries) * finest / unit))


def trace(network: ExportableNetwork) -> torch.export.ExportedProgram:
    """Exports to PyTorch's own form: any batch size, and the sizes of the network's options.

    Raises:
        RuntimeError: this PyTorch can trace no program for any size, nor one with the plugin.
    """
    options, model = network.options, network.model
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    axes = {0: batch}
    extra: dict[str, Any] = {}
    if options.size is None or options.plugin:
        extra = _deferred_checks()
    if options.size is None:
        unit, least = size_unit(model), smallest_size(model)
        height, width = (
            torch.export.Dim(name, min=least // unit, max=LARGEST_SIZE // unit)
            for name in ("height_units", "width_units")
        )
        axes |= {2: unit * height, 3: unit * width}
        # Sides that differ are not taken for one.
        size = (least + unit, least + 2 * unit)
    else:
        size = options.size
    images = torch.zeros(2, 3, *size, device=model.device)
    arguments: tuple[Tensor, ...] = (images,)
    shapes = {"images": axes}
    if options.needs_image_sizes:
        arguments += (torch.tensor([size, size], device=model.device),)
        shapes["image_sizes"] = {0: batch}
    with torch.no_grad():
        return torch.export.export(network, arguments, dynamic_shapes=shapes, strict=False, **extra)


def traces_any_size() -> bool:
    """Whether this PyTorch can trace programs for any size, and for TensorRT."""
    return DEFERRED_CHECKS in inspect.signature(torch.export.export).parameters


def _deferred_checks() -> dict[str, Any]:
    """Relations between sizes that only the running program can check are checked there."""
    if not traces_any_size():
        raise RuntimeError(
            f"PyTorch {torch.__version__} can export neither a program for any size nor one for "
            "TensorRT: give a size, or use a newer PyTorch"
        )
    return {DEFERRED_CHECKS: True}


def to_onnx(
    program: torch.export.ExportedProgram,
    options: ExportOptions,
    *,
    opset: int,
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """Translates a traced program to ONNX.

    Args:
        program: of `trace`.
        options: those it was traced with.
        opset: version of the ONNX operators.
        metadata: texts that the file carries.

    Raises:
        ValueError: the opset is too old.
    """
    if opset < FIRST_OPSET:
        raise ValueError(f"opset {opset} has no bilinear sampling; take {FIRST_OPSET} or newer")
    import onnx_ir

    names = [spec.arg.name for spec in program.graph_signature.output_specs]
    outputs = list(torch.utils._pytree.tree_unflatten(names, program.call_spec.out_spec))
    half, knows_batch = options.precision == "float16", traces_any_size()
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=options.input_names,
        output_names=outputs,
        external_data=False,
        verbose=False,
        optimize=not half and knows_batch,
        custom_translation_table=plugin_translation() if options.plugin else None,
    )
    model = exported.model_proto
    if half:
        store_in_half(model)  # or batch norms would find casts, not weights to be put into
    if not knows_batch:
        _forget_batch(model)
    if half or not knows_batch:
        exported.model = onnx_ir.from_proto(model)
        exported.optimize()
        model = exported.model_proto
    if half:
        store_in_half(model)
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the sources each came from
    _name_axes(model)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def _forget_batch(model: onnx.ModelProto) -> None:
    """Drops shapes in which PyTorch 2.6 puts the batch of the trace for any, after a resize."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _name_axes(model: onnx.ModelProto) -> None:
    """Names that people can read for the axes that vary, in place of the tracer's symbols."""
    graph = model.graph
    del graph.value_info[:]  # shapes in between, in terms of the symbols
    known = {}
    for value, names in zip(
        graph.input, (("batch", "", "height", "width"), ("batch",)), strict=False
    ):
        for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            if axis.dim_param:
                known[axis.dim_param] = name
    for value in (*graph.input, *graph.output):
        for number, axis in enumerate(value.type.tensor_type.shape.dim):
            if axis.dim_param:
                axis.dim_param = known.get(axis.dim_param, f"{value.name}_{number}")
