"""The example in C++ is compiled against onnxruntime's headers, and sees what Python sees.

Neither onnxruntime's package nor this repository has the headers: MASKDINO_ORT_HEADERS names a
folder with onnxruntime_c_api.h, of this release of onnxruntime or an older one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CANVAS = (64, 96)
OBJECTS = 3


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is optional")
    headers = os.environ.get("MASKDINO_ORT_HEADERS", "")
    if not (Path(headers) / "onnxruntime_c_api.h").is_file() or not headers:
        pytest.skip("MASKDINO_ORT_HEADERS names no folder with onnxruntime_c_api.h")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*.*.*")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so.1").symlink_to(library)  # the name that programs look for
    words = [compiler, "-std=c++17", "-Wall", "-Werror", "-I", headers]
    words += [REPOSITORY / "demo/cpp/predict.cpp", folder / "libonnxruntime.so.1"]
    words += [f"-Wl,-rpath,{folder}", "-o", folder / "predict"]
    subprocess.run(words, check=True)
    return folder / "predict"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx", CANVAS)


def write_model(path: Path, masks: tuple[int, int]) -> Path:
    """The interface of an export with --outputs instance; its results hang on both inputs."""
    onnx = pytest.importorskip("onnx", reason="onnx is optional, see requirements.txt")
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tables = {
        "box": np.array([[[0.5, 0.25, 1, 1], [0, 0, 0.5, 1], [0.1, 0.2, 0.3, 0.4]]], np.float32),
        "score": np.array([[0.9, 0.6, 0.1]], np.float32),
        "label": np.array([[2, 0, 1]]),
        "level": np.array([100.0, 160.0, 0.0], np.float32).reshape(1, OBJECTS, 1, 1),
        "axis": np.array([1]),
        "start": np.array([0, 0]),
        "end": np.array(masks),
        "axes": np.array([2, 3]),
    }
    nodes = [
        node("Cast", ["image_sizes"], ["sizes"], to=1),
        node("Concat", ["sizes", "sizes"], ["edges"], axis=1),
        node("Mul", ["box", "edges"], ["boxes"]),
        node("Identity", ["score"], ["scores"]),
        node("Identity", ["label"], ["labels"]),
        node("ReduceMean", ["images", "axis"], ["gray"]),
        node("Greater", ["gray", "level"], ["whole"]),
        node("Slice", ["whole", "start", "end", "axes"], ["masks"]),
    ]
    batch, canvas = "batch", list(CANVAS)
    graph = onnx.helper.make_graph(
        nodes,
        "results",
        [value("images", 1, [batch, 3, *canvas]), value("image_sizes", 7, [batch, 2])],
        [
            value("boxes", 1, [batch, OBJECTS, 4]),
            value("scores", 1, [batch, OBJECTS]),
            value("labels", 7, [batch, OBJECTS]),
            value("masks", 9, [batch, OBJECTS, *masks]),
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in tables.items()],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def write_image(path: Path, height: int, width: int) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(image).save(path)
    return image


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)


def test_example_sees_what_python_sees(program: Path, model: Path, tmp_path: Path) -> None:
    import onnxruntime

    image = write_image(tmp_path / "a.ppm", 50, 90)
    found = run(program, model, tmp_path / "a.ppm", 0.5, tmp_path)
    assert found.returncode == 0, found.stderr
    batch = np.full((1, 3, *CANVAS), 100, np.float32)
    batch[0, :, :50, :90] = image.transpose(2, 0, 1)
    feed = {"images": batch, "image_sizes": np.array([image.shape[:2]])}
    session = onnxruntime.InferenceSession(model)
    boxes, scores, labels, masks = session.run(["boxes", "scores", "labels", "masks"], feed)
    lines = [[float(word) for word in line.split()] for line in found.stdout.splitlines()]
    kept = scores[0] >= 0.5
    expected = np.column_stack([labels[0], scores[0], boxes[0]])[kept]
    np.testing.assert_allclose(lines, expected, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.glob("*.pgm")) == ["0.pgm", "1.pgm"]
    for number in (0, 1):
        mask = np.asarray(Image.open(tmp_path / f"{number}.pgm")) > 0
        assert 0 < mask.mean() < 1
        np.testing.assert_array_equal(mask, masks[0, number, :50, :90])


def test_example_says_what_is_wrong(program: Path, model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "large.ppm", 65, 20)
    write_image(tmp_path / "a.png", 20, 20)
    (tmp_path / "cut.ppm").write_bytes(b"P6\n20 20\n255\nabc")
    for words, said in (
        ([model, tmp_path / "large.ppm"], "larger than the model's canvas"),
        ([model, tmp_path / "a.png"], "is no PPM image"),
        ([model, tmp_path / "cut.ppm"], "is cut off"),
        ([model, tmp_path / "none.ppm"], "is no PPM image"),
        ([tmp_path / "none.onnx", tmp_path / "cut.ppm"], "none.onnx"),
        ([model], "predict model.onnx image.ppm"),
    ):
        found = run(program, *words)
        assert found.returncode == 1
        assert found.stderr.startswith("error: ") and said in found.stderr
        assert not found.stdout


def test_example_writes_whole_masks_or_says_why_not(
    program: Path, model: Path, tmp_path: Path
) -> None:
    quarter = write_model(tmp_path / "quarter.onnx", (CANVAS[0] // 4, CANVAS[1] // 4))
    write_image(tmp_path / "a.ppm", 50, 90)
    for network, folder, said in (
        (quarter, tmp_path, "export the model with --mask-size full"),
        (model, tmp_path / "none", "none/0.pgm cannot be written"),
    ):
        found = run(program, network, tmp_path / "a.ppm", 0.5, folder)
        assert found.returncode == 1 and said in found.stderr
    assert not list(tmp_path.glob("*.pgm"))
