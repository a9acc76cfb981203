"""Graphs that were traced under autocast: weights that are used in float16 are stored so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# All operands have one type. The translator puts batch norms into convolutions, whose weights are
# then float32 as those of the batch norm were.
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LayerNormalization")


def store_in_half(model: onnx.ModelProto) -> None:
    """Stores weights in float16 that the graph casts to it, or multiplies with values in float16.

    Args:
        model: with the types of its values (`value_info`); changed in place.
    """
    import onnx

    graph, half = model.graph, onnx.TensorProto.FLOAT16
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    weights = {weight.name: weight for weight in graph.initializer}
    types |= {name: weight.data_type for name, weight in weights.items()}
    casts: dict[str, str] = {}  # what a cast gave: the weight that holds it

    def in_half(name: str) -> str:
        if weights[name].data_type != onnx.TensorProto.FLOAT:
            return name
        new = f"{name}_float16"
        if new not in weights:
            values = onnx.numpy_helper.to_array(weights[name])
            weights[new] = onnx.numpy_helper.from_array(values.astype("float16"), new)
        return new

    nodes = []
    for node in graph.node:
        to = next((entry.i for entry in node.attribute if entry.name == "to"), None)
        if node.op_type == "Cast" and to == half and node.input[0] in weights:
            casts[node.output[0]] = in_half(node.input[0])
            continue
        inputs = [casts.get(name, name) for name in node.input]
        if node.op_type in PRODUCTS and half in [types.get(name) for name in inputs]:
            inputs = [in_half(name) if name in weights else name for name in inputs]
        node.input[:] = inputs
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {v.name for v in graph.output}
    kept = [weight for name, weight in weights.items() if name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
