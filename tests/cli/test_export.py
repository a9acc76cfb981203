"""Exported programs: what they compute, how they are checked, and that they run elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from PIL import Image
from torch import Tensor

from maskdino.categories import Categories
from maskdino.cli import export, predict
from maskdino.export.plugin import PLUGIN, plugin_attention
from maskdino.export.trace import (
    ExportableNetwork,
    ExportOptions,
    trace,
    traces_any_size,
)
from maskdino.inference.predictor import MaskDINOPredictor, TorchNetwork
from maskdino.model import MaskDINO
from maskdino.ops.ms_deform_attn import ms_deform_attn_fused
from tests.helpers import tiny_cfg

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is optional, see requirements.txt")

from maskdino.export.onnx import OnnxNetwork, onnx_predictor  # noqa: E402

CANVAS = (64, 96)


newer_torch = pytest.mark.skipif(
    not traces_any_size(), reason=f"PyTorch {torch.__version__} traces programs of one size alone"
)


def small_cfg(**overrides: object) -> CfgNode:
    """A model with few operators."""
    levels = {"ENCODER__IN_FEATURES": ["res4", "res5"], "ENCODER__NUM_LEVELS": 2}
    cfg = tiny_cfg(**levels, DECODER__NUM_LAYERS=1, **overrides)
    cfg.MODEL.BACKBONE.NAME = "build_strided_convolutions"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 96, "RGB"
    return cfg


def small_model(**overrides: object) -> MaskDINO:
    """Random weights whose scores are spread, so that ranks do not hang on rounding."""
    torch.manual_seed(0)
    model = MaskDINO(small_cfg(**overrides)).eval()
    for head in (model.heads.class_head, model.heads.box_head.layers[-1]):
        torch.nn.init.normal_(head.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, weights and two pictures of different shape."""
    folder = tmp_path_factory.mktemp("export")
    model = small_model()
    (folder / "config.yaml").write_text(small_cfg().dump())
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    random = np.random.default_rng(0)
    for name, size in (("wide.png", (64, 90)), ("high.png", (120, 70))):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    return folder


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    pictures = [str(folder / "wide.png"), str(folder / "high.png")]
    words = ["--config-file", str(folder / "config.yaml"), "--output", str(folder / output)]
    weights = ["--weights", str(folder / "weights.pth")]
    return [*words, "--images", *pictures, *more, *weights]


@pytest.fixture(scope="module")
def fixed_onnx(folder: Path) -> Path:
    size = [str(edge) for edge in CANVAS]
    export.main(arguments(folder, "fixed.onnx", "--size", *size))
    return folder / "fixed.onnx"


def padded(images: list[Tensor], model: MaskDINO) -> tuple[Tensor, Tensor]:
    """Arguments of a program: the images on one canvas, and their sizes."""
    batch = model.pixel_mean.expand(len(images), -1, *CANVAS).clone()
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, torch.tensor([image.shape[1:] for image in images])


def test_what_is_wrong_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no such size"), export.stage("tracing"):
        raise ValueError("no such size")
    assert capsys.readouterr().out == "tracing ... \n"
    with export.stage("tracing"):
        pass
    assert capsys.readouterr().out == "tracing ... 0 s\n"


@torch.no_grad()
def program_and_model(
    images: list[Tensor], outputs: str, **overrides: object
) -> tuple[dict[str, Tensor], list[dict], MaskDINO]:
    """What the program and the model compute of the same images."""
    switches = {
        f"TEST__{task.upper()}_ON": task == outputs for task in ("instance", "panoptic", "semantic")
    }
    model = small_model(**switches, **overrides)
    batch, sizes = padded(images, model)
    arguments = (batch,) if outputs == "semantic" else (batch, sizes)
    found = ExportableNetwork(model, ExportOptions(outputs))(*arguments)
    return found, model([{"image": image} for image in images]), model


def two_images() -> list[Tensor]:
    return [torch.rand(3, 64, 96) * 255, torch.rand(3, 50, 70) * 255]


@pytest.mark.parametrize("limit", [0.0, 1.2])
def test_instances_are_those_of_the_model(limit: float) -> None:
    found, expected, _ = program_and_model(two_images(), "instance", TEST__MASK_LIMIT=limit)
    for i, result in enumerate(expected):
        objects = result["instances"]
        height, width = objects.image_size
        # Pixels: float32 rounds coordinates of this size to about 1e-5, several times over.
        torch.testing.assert_close(found["boxes"][i], objects.pred_boxes.tensor, atol=1e-4, rtol=0)
        torch.testing.assert_close(found["scores"][i], objects.scores)
        assert torch.equal(found["labels"][i], objects.pred_classes)
        assert torch.equal(found["masks"][i][:, :height, :width], objects.pred_masks)
        assert not found["masks"][i][:, height:].any()
        assert not found["masks"][i][:, :, width:].any()


def test_instances_below_the_threshold_have_score_zero() -> None:
    found, expected, _ = program_and_model(two_images(), "instance", TEST__SCORE_THRESHOLD=0.05)
    for i, result in enumerate(expected):
        kept = found["scores"][i] > 0
        assert 0 < kept.sum() < len(kept)
        torch.testing.assert_close(found["scores"][i][kept], result["instances"].scores)


def test_semantic_maps_are_those_of_the_model() -> None:
    found, expected, _ = program_and_model(two_images(), "semantic")
    for maps, result in zip(found["class_maps"], expected, strict=True):
        height, width = result["sem_seg"].shape[1:]
        torch.testing.assert_close(maps[:, :height, :width], result["sem_seg"])


@pytest.mark.parametrize("limit", [0.0, 1.2])
def test_panoptic_segments_are_those_of_the_model(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = Metadata(thing_dataset_id_to_contiguous_id={0: 0, 3: 3})
    monkeypatch.setattr(Categories, "from_config", lambda _: Categories.from_metadata(things, 5))
    found, expected, _ = program_and_model(
        two_images(),
        "panoptic",
        TEST__PANOPTIC_SCORE_THRESHOLD=0.02,
        TEST__PANOPTIC_OVERLAP_THRESHOLD=0.1,
        TEST__MASK_LIMIT=limit,
    )
    assert sum(len(result["panoptic_seg"][1]) for result in expected) > 2
    for i, result in enumerate(expected):
        ids, segments = result["panoptic_seg"]
        ours = found["segment_ids"][i][: ids.shape[0], : ids.shape[1]]
        numbers = found["segment_scores"][i].nonzero()[:, 0] + 1
        lookup = torch.zeros(found["segment_scores"].shape[1] + 1, dtype=torch.int32)
        lookup[numbers] = torch.arange(1, len(numbers) + 1, dtype=torch.int32)
        assert torch.equal(lookup[ours], ids)
        labels = found["segment_labels"][i][numbers - 1]
        assert labels.tolist() == [segment["category_id"] for segment in segments]


def test_quarter_masks_have_the_size_of_the_pixel_embedding() -> None:
    model = small_model()
    options = ExportOptions("instance", mask_size="quarter")
    with torch.no_grad():
        found = ExportableNetwork(model, options)(*padded(two_images(), model))
    assert found["masks"].shape[2:] == (16, 24)
    assert not found["masks"][1, :, 13:].any()  # cells whose centre lies below row 50
    assert not found["masks"][1, :, :, 18:].any()


@pytest.mark.parametrize("with_boxes", [False, True])
def test_plugin_computes_what_the_operator_computes(with_boxes: bool) -> None:
    shapes, heads, points = ((6, 5), (3, 2)), 2, 3
    tokens = sum(height * width for height, width in shapes)
    queries = 7 if with_boxes else tokens
    value = torch.randn(2, tokens, heads, 4)
    offsets = torch.randn(2, queries, heads * len(shapes) * points * 3)
    boxes = torch.rand(2, queries, 4) if with_boxes else None
    torch.testing.assert_close(
        plugin_attention(value, shapes, offsets, boxes, points),
        ms_deform_attn_fused(value, shapes, offsets, boxes, points),
    )


def test_fixed_onnx_computes_what_the_model_computes(fixed_onnx: Path) -> None:
    network = OnnxNetwork(fixed_onnx)
    assert network.canvas == CANVAS
    with pytest.raises(ValueError, match="does not fit on the canvas"):
        network([torch.zeros(3, 65, 20)])
    pictures = [
        torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 64, 90), (3, 64, 37))
    ]
    original = TorchNetwork(small_model())
    with torch.no_grad():
        (ours, our_pixels, canvas), (theirs, pixels, _) = network(pictures), original(pictures)
    assert canvas == CANVAS
    torch.testing.assert_close(our_pixels, pixels, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.class_logits, theirs.class_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-4)


def test_exported_predictor_agrees_with_the_model(folder: Path, fixed_onnx: Path) -> None:
    options = {"confidence_threshold": 0, "max_detections": 5}
    exported = onnx_predictor(fixed_onnx, **options)
    original = MaskDINOPredictor.from_config(
        folder / "config.yaml", folder / "weights.pth", **options
    )
    ours, theirs = exported(folder / "wide.png"), original(folder / "wide.png")
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
    assert ours.class_names == theirs.class_names
    assert (ours.masks != theirs.masks).mean() < 1e-3
    assert exported(folder / "high.png").masks.shape == (5, 120, 70)  # made smaller to fit


def test_fixed_canvas_takes_no_size(fixed_onnx: Path) -> None:
    with pytest.raises(ValueError, match=r"fixed canvas \(64, 96\)"):
        onnx_predictor(fixed_onnx, size=128)


def test_predict_draws_with_an_exported_network(folder: Path, fixed_onnx: Path) -> None:
    words = ["--backend", "onnx", "--model", str(fixed_onnx), "--confidence-threshold", "0"]
    words += ["--input", str(folder / "high.png"), "--output", str(folder / "drawn")]
    assert predict.main(words) == 0
    assert Image.open(folder / "drawn" / "high.png").size == (70, 120)


@newer_torch
def test_tensorrt_variant_keeps_one_node_per_layer(folder: Path) -> None:
    import onnx

    words = ["--format", "tensorrt", "--size", "64", "96"]
    export.main(arguments(folder, "tensorrt.onnx", *words))
    graph = onnx.load(folder / "tensorrt.onnx").graph
    assert sum(node.op_type == PLUGIN for node in graph.node) == 2
    content = (folder / "tensorrt.onnx").read_bytes()
    with pytest.raises(export.ExportError, match="2 nodes .* instead of 3"):
        export.check_graph(content, ExportOptions(sampling="plugin"), 3)
    with pytest.raises(export.ExportError, match="2 nodes .* instead of 0"):
        export.check_graph(content, ExportOptions(sampling="gather"), 2)


@pytest.mark.parametrize(("form", "sampling"), [("tensorrt", "gather"), ("torch", "plugin")])
def test_forms_that_exclude_each_other(
    form: str, sampling: str, capsys: pytest.CaptureFixture
) -> None:
    needed = ["--config-file", "c.yaml", "--output", "o", "--images", "i.png"]
    with pytest.raises(SystemExit):
        export.parse_arguments([*needed, "--format", form, "--sampling", sampling])
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_engine_is_named_before_the_model_is_read(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    needed = ["--config-file", "no.yaml", "--output", str(tmp_path / "o"), "--images", "no.png"]
    with pytest.raises(SystemExit) as ended:
        export.main([*needed, "--sampling", "gather"])
    assert re.fullmatch(
        rf"error: {package}: not installed, .*'maskdino\[export\]'", ended.value.code
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="no.yaml"):  # needs none of them
        export.main([*needed, "--format", "torch"])


def test_where_nothing_can_be_written_is_said_before_the_model_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"error: --output {folder} is a folder: give a file"):
        export.main(arguments(folder, ""))
    before = (folder / "wide.png").read_bytes()
    with pytest.raises(SystemExit, match="wide.png is an input: give another file"):
        export.main(arguments(folder, "wide.png"))
    assert (folder / "wide.png").read_bytes() == before
    monkeypatch.setattr(export.os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match=f"cannot write into {folder}: give another --output"):
        export.main(arguments(folder, "a.onnx"))


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        ([], "grid-sample"),
        (["--format", "tensorrt"], "plugin"),
        (["--sampling", "plugin"], "plugin"),
        (["--format", "torch", "--sampling", "gather"], "gather"),
    ],
)
def test_sampling_follows_the_format(words: list[str], sampling: str) -> None:
    needed = ["--config-file", "c.yaml", "--output", "o", "--images", "i.png"]
    assert export.parse_arguments([*needed, *words]).sampling == sampling


@pytest.fixture(scope="module")
def programs() -> dict[ExportOptions, torch.export.ExportedProgram]:
    """What has been traced of the model."""
    return {}


@pytest.fixture
def _traced_once(
    programs: dict[ExportOptions, torch.export.ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program for any size is traced for the first test that exports it."""

    def traced(network: ExportableNetwork) -> torch.export.ExportedProgram:
        if network.options not in programs:
            programs[network.options] = trace(network)
        return programs[network.options]

    monkeypatch.setattr(export, "trace", traced)


@newer_torch
@pytest.mark.slow
@pytest.mark.usefixtures("_traced_once")
def test_torch_program_takes_any_size(folder: Path) -> None:
    export.main(arguments(folder, "any.pt2", "--format", "torch", "--outputs", "instance"))
    program = torch.export.load(folder / "any.pt2").module()
    network = ExportableNetwork(small_model(), ExportOptions("instance"))
    for shape in ((1, 3, 160, 96), (3, 3, 128, 224)):
        images = torch.rand(shape) * 255
        sizes = torch.tensor([[shape[2] - i, shape[3] - 20 * i] for i in range(shape[0])])
        with torch.no_grad():
            found, expected = program(images, sizes), network(images, sizes)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@newer_torch
@pytest.mark.slow
@pytest.mark.usefixtures("_traced_once")
def test_onnx_with_postprocessing_takes_any_size(folder: Path) -> None:
    import onnxruntime

    export.main(arguments(folder, "any.onnx", "--outputs", "instance"))
    session = onnxruntime.InferenceSession(folder / "any.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    content = (folder / "any.onnx").read_bytes()
    assert str(folder).encode() not in content  # no paths of the machine that made it
    assert b"export.py" not in content
    images = np.random.default_rng(0).random((3, 3, 128, 160), np.float32) * 255
    sizes = np.array([[128, 160], [100, 150], [30, 160]])
    found = session.run(["masks"], {"images": images, "image_sizes": sizes})[0]
    assert found.shape[0] == 3
    assert found.shape[2:] == (128, 160)
    assert not found[2, :, 30:].any()
    with pytest.raises(ValueError, match="the predictor needs an export with --outputs pred"):
        OnnxNetwork(folder / "any.onnx")


@torch.no_grad()
def test_check_refuses_a_wrong_program(capsys: pytest.CaptureFixture) -> None:
    model = small_model()
    options = ExportOptions()
    right, wrong = ExportableNetwork(model, options), ExportableNetwork(model, options)
    wrong.model.decoder.layers[0].cross_attn.sampling_offsets.bias += 0.5
    batches = [[torch.rand(2, 3, *CANVAS) * 255]]
    own = ExportableNetwork(model, options, traceable=False)
    export.check(model, options, lambda arguments: own(*arguments), batches)
    assert "largest difference 0.0e+00" in capsys.readouterr().out
    export.check(model, options, lambda arguments: right(*arguments), batches)
    with pytest.raises(export.ExportError, match="class_logits.*nothing is written"):
        export.check(model, options, lambda arguments: wrong(*arguments), batches)


def test_refused_programs_are_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with the right outputs, all of them zero."""

    class Zeros(torch.nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            shapes = {"class_logits": (12, 5), "boxes": (12, 4), "mask_embeddings": (12, 64)}
            found = {name: images.new_zeros(images.shape[0], *s) for name, s in shapes.items()}
            pixels = images.new_zeros(images.shape[0], 64, CANVAS[0] // 4, CANVAS[1] // 4)
            return {**found, "pixel_embedding": pixels}

    def wrong_trace(network: ExportableNetwork) -> torch.export.ExportedProgram:  # noqa: ARG001
        batch = torch.export.Dim("batch", max=64)
        images = torch.zeros(2, 3, *CANVAS)
        return torch.export.export(Zeros(), (images,), dynamic_shapes={"images": {0: batch}})

    monkeypatch.setattr(export, "trace", wrong_trace)
    words = ["--format", "torch", "--size", "64", "96"]
    with pytest.raises(SystemExit, match="^error: .*nothing is written"):
        export.main(arguments(folder, "wrong.pt2", *words))
    assert not list(folder.glob("wrong.pt2*"))


def test_compare_pairs_rows_that_swapped_places() -> None:
    expected = {"class_logits": torch.randn(2, 6, 3), "boxes": torch.rand(2, 6, 4)}
    order = torch.tensor([1, 0, 2, 5, 4, 3])
    swapped = {name: value[:, order] for name, value in expected.items()}
    assert all(d.largest == 0 for d in export.compare(expected, swapped, "predictions"))
    swapped["boxes"] = expected["boxes"]  # rows no longer belong together
    assert any(d.share_beyond > 0.1 for d in export.compare(expected, swapped, "predictions"))


def test_compare_counts_missing_and_undefined_values() -> None:
    expected = {"class_maps": torch.ones(1, 2, 3, 3)}
    undefined = {"class_maps": torch.full((1, 2, 3, 3), float("nan"))}
    (difference,) = export.compare(expected, undefined, "semantic")
    assert difference.share_beyond == 1
    with pytest.raises(export.ExportError, match="instead of"):
        export.compare(expected, {"class_maps": torch.ones(1, 2, 3, 4)}, "semantic")
    with pytest.raises(export.ExportError, match="the program gives"):
        export.compare(expected, {}, "semantic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "scatter"}, "sampling 'scatter' must be one of"),
        ({"outputs": "boxes"}, "outputs 'boxes' must be one of"),
        ({"mask_size": "half"}, "mask_size 'half'"),
        ({"size": (64, 100)}, "must be multiples of 32"),
    ],
)
def test_options_name_what_is_wrong(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportOptions(**arguments)


def test_a_model_without_masks_has_no_semantic_output() -> None:
    with pytest.raises(ValueError, match="this model gives none"):
        ExportableNetwork(small_model(MASK_ON=False), ExportOptions("semantic"))


def test_files_that_are_no_export(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no ONNX file .*missing\.onnx"):
        OnnxNetwork(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ValueError, match=r"cannot run .*text\.onnx"):
        OnnxNetwork(tmp_path / "text.onnx")
