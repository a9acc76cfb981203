"""Exported networks in onnxruntime and in OpenVINO, and graphs that are of other models."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maskdino.cli import predict
from maskdino.export.engines import ENGINES
from maskdino.export.onnx import METADATA_KEY, ExportedMetadata, OnnxNetwork, onnx_predictor
from tests.helpers import tiny_cfg

onnx = pytest.importorskip("onnx", reason="onnx is optional, see requirements.txt")
CLASSES, CHANNELS = 5, 64
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
OUTPUTS = {
    "class_logits": ("batch", 1, CLASSES),
    "boxes": ("batch", 1, 4),
    "mask_embeddings": ("batch", 1, CHANNELS),
    "pixel_embedding": ("batch", CHANNELS, "h", "w"),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(PACKAGES[request.param], reason=f"{request.param} is optional")
    return request.param


def write_network(
    path: Path,
    *,
    renamed: dict[str, str] | None = None,
    left_out: str = "",
    metadata: str | None = None,
    classes: int = CLASSES,
    image: str = "images",
) -> dict[str, np.ndarray]:
    """A network of one query, whose outputs are products of an image's mean color.

    Returns:
        Its weights by output.
    """
    node, random = onnx.helper.make_node, np.random.default_rng(0)
    weights, nodes = {}, [node("GlobalAveragePool", [image], ["mean"])]
    nodes += [node("Reshape", ["mean", "shape"], ["row"])]
    nodes += [node("AveragePool", [image], ["small"], kernel_shape=[4, 4], strides=[4, 4])]
    values = []
    for name, axes in OUTPUTS.items():
        if name == left_out:
            continue
        given = (renamed or {}).get(name, name)
        count = axes[1] if name == "pixel_embedding" else axes[2]
        if name == "class_logits":
            axes, count = ("batch", 1, classes), classes
        array = random.normal(size=(3, count)).astype(np.float32) / 100
        weights[name] = array
        if name == "pixel_embedding":
            # As float16 maps are given, whose name an engine may take for the output's.
            nodes.append(node("Conv", ["small", name + ".w"], ["maps"]))
            nodes.append(node("Cast", ["maps"], ["half"], to=10))
            nodes.append(node("Cast", ["half"], [given], to=1))
            array = array.T[:, :, None, None]
        elif name == "boxes":
            nodes.append(node("MatMul", ["row", name + ".w"], ["logits"]))
            nodes.append(node("Sigmoid", ["logits"], [given]))
        else:
            nodes.append(node("MatMul", ["row", name + ".w"], [given]))
        values.append((given, axes, onnx.numpy_helper.from_array(array.copy(), name + ".w")))
    make = onnx.helper.make_tensor_value_info
    shape = onnx.numpy_helper.from_array(np.array([-1, 1, 3]), "shape")
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [make(image, 1, ("batch", 3, "height", "width"))],
        [make(given, 1, axes) for given, axes, _ in values],
        [shape, *(weight for *_, weight in values)],
    )
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    cfg = tiny_cfg()
    assert cfg.MODEL.MASK_DINO.NUM_CLASSES == CLASSES
    if metadata is None:
        metadata = ExportedMetadata(cfg.dump(), "predictions", "full", 32, 64).to_json()
    if metadata:
        model.metadata_props.add(key=METADATA_KEY, value=metadata)
    onnx.save(model, path)
    return weights


def test_engines_compute_the_same(engine: str, tmp_path: Path) -> None:
    weights = write_network(tmp_path / "m.onnx")
    network = OnnxNetwork(tmp_path / "m.onnx", engine=engine, threads=1)
    assert network.canvas is None
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 96), (64, 90))]
    predictions, pixels, canvas = network(images)
    assert canvas == (64, 96)
    row = network.batch(images).mean((2, 3)).numpy()
    # In bfloat16, which OpenVINO takes by itself where the processor has it, about 1e-2 off.
    logits = (row @ weights["class_logits"])[:, None]
    np.testing.assert_allclose(predictions.class_logits, logits, rtol=1e-5, atol=1e-5)
    boxes = 1 / (1 + np.exp(-row @ weights["boxes"]))[:, None]
    np.testing.assert_allclose(predictions.boxes, boxes, rtol=1e-5, atol=1e-5)
    assert pixels is not None and pixels.shape == (2, CHANNELS, 16, 24)


def test_engines_predict_and_draw(engine: str, tmp_path: Path) -> None:
    write_network(tmp_path / "m.onnx")
    predictor = onnx_predictor(tmp_path / "m.onnx", engine=engine, confidence_threshold=0)
    image = np.random.default_rng(0).integers(0, 256, (64, 90, 3), np.uint8)
    assert predictor(image).masks.shape == (CLASSES, 64, 90)
    Image.fromarray(image).save(tmp_path / "a.png")
    words = ["--backend", engine, "--model", str(tmp_path / "m.onnx"), "--task", "instance"]
    words += ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "drawn")]
    assert predict.main([*words, "--confidence-threshold", "0"]) == 0
    assert Image.open(tmp_path / "drawn" / "a.png").size == (90, 64)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"image": "x"}, r"its inputs are \{'x'"),
        ({"classes": 7}, r"its outputs are .*'class_logits': \(None, 1, 7\)"),
        ({"left_out": "mask_embeddings"}, "its outputs are"),
        ({"renamed": {"boxes": "rois"}}, "its outputs are .*'rois'"),
    ],
)
def test_graph_of_another_model(engine: str, other: dict, said: str, tmp_path: Path) -> None:
    write_network(tmp_path / "m.onnx", **other)
    with pytest.raises(ValueError, match=rf"m\.onnx is the graph of another model: {said}"):
        OnnxNetwork(tmp_path / "m.onnx", engine=engine)


def test_files_of_other_programs(engine: str, tmp_path: Path) -> None:
    write_network(tmp_path / "m.onnx", metadata="")
    with pytest.raises(ValueError, match="was not written by"):
        OnnxNetwork(tmp_path / "m.onnx", engine=engine)
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ValueError, match=r"cannot run .*text\.onnx: .+") as raised:
        OnnxNetwork(tmp_path / "text.onnx", engine=engine)
    assert engine == "onnx" or "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"no ONNX file .*missing\.onnx"):
        OnnxNetwork(tmp_path / "missing.onnx", engine=engine)


def test_devices_that_an_engine_does_not_know(engine: str, tmp_path: Path) -> None:
    write_network(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"no support for device mps|does not compute on mps here"):
        OnnxNetwork(tmp_path / "m.onnx", "mps", engine=engine)


@pytest.mark.parametrize(
    ("there", "device", "chosen"),
    [
        (["CPU", "GPU"], "xpu", "GPU"),
        (["CPU", "GPU"], "xpu:0", "GPU"),
        (["CPU", "GPU.0", "GPU.1"], "xpu", "GPU"),
        (["CPU", "GPU.0", "GPU.1"], "xpu:1", "GPU.1"),
        (["CPU", "GPU"], "xpu:1", ""),
        (["CPU"], "xpu", ""),
        (["CPU"], "cpu", "CPU"),
    ],
)
def test_devices_of_openvino(
    there: list[str], device: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_network(tmp_path / "m.onnx")
    asked = []

    class Core:
        available_devices = there

        def read_model(self, _: Path) -> None: ...

        def compile_model(self, _: None, name: str, __: dict) -> None:
            asked.append(name)
            raise RuntimeError("no device")

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    with pytest.raises(ValueError, match=r"no device" if chosen else f"compute on {device} here"):
        OnnxNetwork(tmp_path / "m.onnx", device, engine="openvino")
    assert asked == ([chosen] if chosen else [])


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_network(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    words = [
        "--backend",
        name,
        "--model",
        str(tmp_path / "m.onnx"),
        "--output",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit, match=r"^error: .*pip install [^\n]*$"):
        predict.main([*words, "--input", str(tmp_path / "a.png")])


@pytest.mark.parametrize("more", [[], ["--model", "m.onnx", "--config-file", "c.yaml"]])
def test_other_backends_need_a_file_alone(more: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        predict.parse_arguments(["--backend", "openvino", "--webcam", "--output", "o", *more])
    assert "--backend openvino needs --model" in capsys.readouterr().err
