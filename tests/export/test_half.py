"""Programs in float16: which weights are stored in half, and which objects are the same."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from maskdino.cli import export
from maskdino.export.objects import Agreement, Objects
from maskdino.export.trace import ExportableNetwork, ExportOptions
from tests.helpers import tiny_model

HALF = ExportOptions("instance", precision="float16")


def squares(*corners: int, score: float = 0.9) -> Objects:
    """Masks of 10 x 10 pixels that begin at these columns, of classes 0, 1, ..."""
    masks = torch.zeros(len(corners), 20, 40, dtype=torch.bool)
    for mask, corner in zip(masks, corners, strict=True):
        mask[5:15, corner : corner + 10] = True
    return Objects(torch.arange(len(corners)), torch.full((len(corners),), score), masks.flatten(1))


def test_objects_that_are_the_same() -> None:
    ours = squares(0, 15)
    assert Agreement().and_of(ours, ours) == Agreement(2, 2, 0)
    moved = squares(0, 16)  # IoU 9 / 11
    assert Agreement().and_of(ours, moved) == Agreement(2, 1, 1)
    assert Agreement(5, 5, 0).and_of(ours, moved) == Agreement(7, 6, 1)
    assert Agreement(7, 6, 1).share == 6 / 8
    assert Agreement().and_of(ours, replace(ours, labels=ours.labels.flip(0))) == Agreement(2, 0, 2)


def test_one_object_stands_for_one() -> None:
    twice = replace(squares(0, 0), labels=torch.zeros(2))
    assert Agreement().and_of(twice, twice.least(0)) == Agreement(2, 2, 0)
    once = Objects(twice.labels[:1], twice.scores[:1], twice.shapes[:1])
    assert Agreement().and_of(twice, once) == Agreement(2, 1, 0)


def test_scores_near_the_least_one_may_differ() -> None:
    assert Agreement().and_of(squares(0, score=0.31), squares(0, score=0.29)) == Agreement(1, 1, 0)
    assert Agreement().and_of(squares(0, score=0.31), squares(0, score=0.2)) == Agreement(1, 0, 0)
    assert Agreement().and_of(squares(0, score=0.2), squares(0, score=0.31)) == Agreement(0, 0, 1)


def test_boxes_stand_for_masks() -> None:
    boxes = Objects(torch.zeros(1), torch.ones(1), torch.tensor([[0.0, 0, 10, 10]]))
    moved = replace(boxes, shapes=boxes.shapes + 0.2)
    assert Agreement().and_of(boxes, moved) == Agreement(1, 1, 0)
    assert Agreement().and_of(boxes, replace(boxes, shapes=boxes.shapes + 2)) == Agreement(1, 0, 1)


def sure_model(**overrides: object) -> torch.nn.Module:
    """Random weights; some scores are high, so that there are objects."""
    torch.manual_seed(0)
    model = tiny_model(ENCODER__NUM_LEVELS=3, DECODER__NUM_LAYERS=1, **overrides).eval()
    torch.nn.init.normal_(model.heads.class_head.weight, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("outputs", ["predictions", "semantic"])
def test_check_counts_objects_in_half_precision(
    outputs: str, capsys: pytest.CaptureFixture
) -> None:
    model = sure_model()
    options = replace(HALF, outputs=outputs)
    arguments = [torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 96], [50, 70]])]
    batches = [arguments[: len(options.input_names)]]
    right, wrong = ExportableNetwork(model, options), ExportableNetwork(model, options)
    assert all(x.dtype != torch.float16 for x in right(*batches[0]).values())
    export.check(model, options, lambda arguments: right(*arguments), batches)
    said = capsys.readouterr().out
    assert "are the same (class, and IoU 0.9 and more)" in said
    assert re.search("largest difference [1-9].*e-0[1-4]", said)  # it was computed in half
    torch.nn.init.normal_(wrong.model.heads.class_head.weight, std=0.3)
    with pytest.raises(export.ExportError, match="fewer than 95%; export this model in float32"):
        export.check(model, options, lambda arguments: wrong(*arguments), batches)


@torch.no_grad()
def test_images_without_objects_show_nothing() -> None:
    model = sure_model()
    torch.nn.init.constant_(model.heads.class_head.bias, -20)
    network = ExportableNetwork(model, HALF)
    batches = [[torch.rand(1, 3, 64, 96) * 255, torch.tensor([[64, 96]])]]
    with pytest.raises(export.ExportError, match=r"no object of score 0\.3 .*nothing is written"):
        export.check(model, HALF, lambda arguments: network(*arguments), batches)


def test_weights_are_cast_in_the_file() -> None:
    """Both kinds: weights that the graph casts, and float32 ones beside float16 maps."""
    onnx = pytest.importorskip("onnx", reason="onnx is optional, see requirements.txt")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is optional")
    from maskdino.export.half import store_in_half

    random = np.random.default_rng(0)
    shapes = {"kernel": (4, 3, 1, 1), "bias": (4,), "scale": (4,), "matrix": (4, 4)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("Cast", ["images"], ["x"], to=10),
        node("Conv", ["x", "kernel", "bias"], ["maps"]),
        node("GlobalAveragePool", ["maps"], ["means"]),
        node("Squeeze", ["means"], ["row"]),
        node("Cast", ["matrix"], ["m"], to=10),
        node("Gemm", ["row", "m"], ["rows"]),
        node("Cast", ["rows"], ["full"], to=1),
        node("Mul", ["full", "scale"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [value("images", 1, (2, 3, 4, 4))],
        [value("y", 1, (2, 4))],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
        value_info=[value("x", 10, (2, 3, 4, 4)), value("row", 10, (2, 4)), value("m", 10, (4, 4))],
    )
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    model.graph.node[3].input.append("axes")
    model.graph.initializer.append(axes)
    store_in_half(model)
    types = {weight.name: weight.data_type for weight in model.graph.initializer}
    half = {f"{name}_float16": 10 for name in ("kernel", "bias", "matrix")}
    assert types == {**half, "scale": 1, "axes": 7}
    assert [entry.op_type for entry in model.graph.node].count("Cast") == 2
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = random.normal(size=(2, 3, 4, 4)).astype(np.float32)
    (found,) = session.run(None, {"images": images})
    rows = images.mean((2, 3)) @ arrays["kernel"][:, :, 0, 0].T + arrays["bias"]
    np.testing.assert_allclose(found, rows @ arrays["matrix"] * arrays["scale"], atol=0.03)


def test_plugin_has_no_half_precision(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="TensorRT chooses"):
        ExportOptions(sampling="plugin", precision="float16")
    needed = ["--config-file", "c.yaml", "--output", "o", "--images", "i.png"]
    with pytest.raises(SystemExit):
        export.parse_arguments([*needed, "--format", "tensorrt", "--precision", "float16"])
    assert "TensorRT chooses" in capsys.readouterr().err
