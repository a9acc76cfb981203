"""Deformable attention by look-ups: the numbers of the loop, and no GridSample in any graph."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskdino.cli import export
from maskdino.config import load_config
from maskdino.export.gather import gather_attention, sample_by_gather
from maskdino.export.trace import OUTPUTS, ExportableNetwork, ExportOptions, traces_any_size
from maskdino.model import MaskDINO
from maskdino.ops.ms_deform_attn import ms_deform_attn_fused_reference
from tests.helpers import tiny_model
from tests.ops.deform_attn_cases import Case, slow_locations, slow_ms_deform_attn

CASES = [
    Case(),
    Case(shapes=((2, 7),), images=1, heads=1, channels=3, points=1),
    Case(shapes=((1, 5), (6, 1), (3, 3), (1, 1)), images=3, points=2),
]
newer_torch = pytest.mark.skipif(
    not traces_any_size(), reason=f"PyTorch {torch.__version__} traces programs of one size alone"
)
NUCLEI = Path(__file__).parents[2] / "datasets/nuclei/val"


def assert_is_the_loop(case: Case, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    found = sample_by_gather(value, case.shapes, locations, weights)
    expected = slow_ms_deform_attn(value, case.shapes, locations, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_samples_are_those_of_the_loop(case: Case) -> None:
    assert_is_the_loop(case, case.value(), case.locations(), case.weights())


def test_borders_of_every_level() -> None:
    """On pixel centers, edges and corners, and outside on every side."""
    case = Case(shapes=((3, 4), (1, 3), (1, 1)), images=2, heads=2, points=1)
    steps = torch.tensor([-1.0, -0.5, -0.125, 0.0, 0.125, 0.5, 0.875, 1.0, 1.125, 1.5, 2.0])
    grid = torch.cartesian_prod(steps, steps).double()
    locations = grid.view(1, -1, 1, 1, 1, 2).expand(2, -1, 2, 3, -1, -1)
    found = assert_is_the_loop(
        case, case.value(), locations, torch.ones(locations.shape[:-1], dtype=torch.float64)
    )
    outside = (grid <= -0.5).any(dim=1) | (grid >= 1.5).any(dim=1)
    assert not found[:, outside].any()
    assert found[:, ~outside].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -3e9])
def test_locations_without_meaning_read_nothing(bad: float) -> None:
    case = Case()
    locations = case.locations()
    locations[:, ::2, :, :, 1, 0] = bad
    locations[:, 1, :, 1] = bad
    assert_is_the_loop(case, case.value(), locations, case.weights())


def test_what_lies_outside_is_not_multiplied() -> None:
    """A neighbor that the sample does not reach may hold anything."""
    case = Case(shapes=((2, 2), (1, 1)), images=1, heads=1, points=1, queries=1)
    value = case.value()
    value[:, [0, 4]] = float("inf")
    locations = torch.full((1, 1, 1, 2, 1, 2), -5.0, dtype=torch.float64)
    weights = torch.ones(1, 1, 1, 2, 1, dtype=torch.float64)
    assert not sample_by_gather(value, case.shapes, locations, weights).any()


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.float16, 1e-2)]
)
def test_fused_form_is_the_loop(dtype: torch.dtype, bound: float, size: int | None) -> None:
    case = Case()
    value, raw = case.value(dtype), case.offsets_and_logits(dtype, per_token=size is None)
    reference = None if size is None else case.reference(size, torch.float32)
    found = gather_attention(value, case.shapes, raw, reference, case.points)
    assert found.dtype == dtype
    expected = slow_ms_deform_attn(value, case.shapes, *slow_locations(case, raw, reference))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    torch.testing.assert_close(
        found, ms_deform_attn_fused_reference(value, case.shapes, raw, reference, case.points)
    )


class Names(TorchDispatchMode):
    """Counts all operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_level_is_one_lookup_and_one_product_in_float32() -> None:
    """As the sums are, also in a model that computes in float16."""
    case = Case()
    arguments = case.value(torch.float32), case.locations().float(), case.weights().float()
    expected = sample_by_gather(arguments[0], case.shapes, *arguments[1:])
    with Names() as operations, torch.autocast("cpu", torch.float16):
        found = sample_by_gather(arguments[0], case.shapes, *arguments[1:])
    assert torch.equal(found, expected)
    assert operations.names["aten.embedding.default"] == len(case.shapes)
    assert operations.names["aten.bmm.default"] == len(case.shapes)


@pytest.mark.parametrize("outputs", OUTPUTS)
@torch.no_grad()
def test_no_output_needs_a_grid_sampler(outputs: str) -> None:
    images, sizes = torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 96], [50, 70]])
    found = {}
    for sampling in ("grid-sample", "gather"):
        options = ExportOptions(outputs, sampling=sampling)
        torch.manual_seed(0)
        network = ExportableNetwork(tiny_model(), options)
        with Names() as operations:
            network(*(images, sizes)[: len(options.input_names)])
        found[sampling] = any("grid_sampler" in name for name in operations.names)
    assert found == {"grid-sample": True, "gather": False}


def nuclei_model(task: str) -> MaskDINO:
    """One layer and level of each kind of a task's model, random weights with spread scores."""
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    overrides += ["MODEL.BACKBONE.NAME", "build_strided_convolutions"]
    for part in ("ENCODER", "DECODER"):
        overrides += [f"MODEL.MASK_DINO.{part}.NUM_LAYERS", "1"]
    # A program has a hundred operations for each level: the backbone's, and one made of it.
    levels = {"IN_FEATURES": "['res3']", "NUM_LEVELS": "2"}
    for key, value in levels.items():
        overrides += [f"MODEL.MASK_DINO.ENCODER.{key}", value]
    cfg = load_config(f"configs/nuclei/{task}/maskdino_tiny.yaml", overrides)
    torch.manual_seed(0)
    model = MaskDINO(cfg).eval()
    torch.nn.init.normal_(model.heads.class_head.weight, std=0.3)
    return model


ALWAYS = ("semantic", (96, 128), "gather")


def grid() -> list:
    """Each output for one size and any, by both ways to sample; one of them is always run."""
    cases = itertools.product(OUTPUTS, (None, (96, 128)), ("grid-sample", "gather"))
    return [
        pytest.param(*case, marks=[newer_torch] * (case[1] is None) + [pytest.mark.campaign])
        for case in cases
        if case != ALWAYS
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "size", "sampling"), [ALWAYS, *grid()])
def test_exported_model_agrees_with_pytorch_on_real_images(
    outputs: str, size: tuple[int, int] | None, sampling: str, capsys: pytest.CaptureFixture
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is optional, see requirements.txt")
    import onnx

    model = nuclei_model("semantic" if outputs == "semantic" else "instance")
    options = ExportOptions(outputs, size=size, sampling=sampling)
    _, content = export.export(model, options, "onnx", 18, "")
    assert content is not None
    nodes = onnx.load_model_from_string(content).graph.node
    assert {node.domain for node in nodes} == {""}
    assert any(node.op_type == "GridSample" for node in nodes) == (sampling == "grid-sample")
    images = [str(path) for path in sorted(NUCLEI.glob("*.png"))[:3]]
    batches = export.image_batches(images, model, options, (128, 192), "RGB")
    network = ExportableNetwork(model, options, traceable=False)
    program = export.program_of_onnx(content, options)
    for arguments in batches:
        with torch.no_grad():
            expected = network(*arguments)
        for difference in export.compare(expected, program(arguments), outputs):
            assert difference.share_beyond < 0.001, difference
    export.check_graph(content, options, 0)
    assert ("none GridSample" in capsys.readouterr().out) == (sampling == "gather")


def test_graph_with_grid_sample_is_refused() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is optional, see requirements.txt")
    shapes = {"x": (1, 1, 4, 4), "grid": (1, 2, 2, 2), "y": (1, 1, 2, 2)}
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("GridSample", ["x", "grid"], ["y"])],
        "graph",
        [values["x"], values["grid"]],
        [values["y"]],
    )
    opset = onnx.helper.make_opsetid("", 18)
    content = onnx.helper.make_model(graph, opset_imports=[opset]).SerializeToString()
    with pytest.raises(export.ExportError, match="and 1 GridSample"):
        export.check_graph(content, ExportOptions(sampling="gather"), 2)
    export.check_graph(content, ExportOptions(), 2)
