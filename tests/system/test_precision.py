"""One rule for the arithmetic of training, evaluation and prediction."""

from __future__ import annotations

import contextlib
import logging
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdino.export.trace import ExportableNetwork, ExportOptions
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.modeling.heads import PredictionHeads
from maskdino.system import precision as precision_module
from maskdino.system.precision import (
    inference_precision,
    mixed_precision_dtype,
    network_precision,
    training_precision,
)
from tests.helpers import CHANNELS, drawn_batch, tiny_cfg, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = (64, 96)


@pytest.fixture(params=["Turing", "Ampere"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A card is asked what it can; both emulate bfloat16 where they lack it."""
    new = request.param == "Ampere"

    def has_bfloat16(including_emulation: bool = True) -> bool:
        return new or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8 if new else 7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: request.param)
    return request.param


def computed_in(model: MaskDINO) -> contextlib.AbstractContextManager[set[torch.dtype]]:
    """Types in which a layer of the encoder gives its result."""

    @contextlib.contextmanager
    def listening():
        found: set[torch.dtype] = set()
        layer = model.encoder.layers[0].ffn
        linear = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
        handle = linear.register_forward_hook(lambda *args: found.add(args[2].dtype))
        yield found
        handle.remove()

    return listening()


def test_emulated_bfloat16_is_never_chosen(gpu: str) -> None:
    expected = torch.bfloat16 if gpu == "Ampere" else torch.float16
    assert mixed_precision_dtype(True, CUDA) is expected
    assert f"torch.{inference_precision('auto', CUDA)}" == str(expected)
    assert mixed_precision_dtype(False, CUDA) is None
    assert mixed_precision_dtype(True, CPU) is None
    assert inference_precision("auto", CPU) == "float32"


def test_what_a_card_lacks_is_refused(gpu: str) -> None:
    for name in ("float32", "float16"):
        assert inference_precision(name, CUDA) == name
    for name in ("tf32", "bfloat16"):
        if gpu == "Ampere":
            assert inference_precision(name, CUDA) == name
            continue
        message = f"TEST.PRECISION is {name}, which Turing does not compute in; use auto or one of"
        with pytest.raises(ValueError, match=message):
            inference_precision(name, CUDA)


@pytest.mark.parametrize("name", ["tf32", "float16"])
def test_what_the_cpu_lacks_is_refused_when_the_model_is_built(name: str) -> None:
    message = f"TEST.PRECISION is {name}, which the device cpu does not .* float32, bfloat16"
    with pytest.raises(ValueError, match=message):
        tiny_model(TEST__PRECISION=name)
    with pytest.raises(ValueError, match="'half'; it must be one of float32, tf32, bfloat16"):
        tiny_model(TEST__PRECISION="half")


def test_evaluation_and_predictor_compute_in_the_precision_of_the_key() -> None:
    image = np.zeros((*SIZE, 3), np.uint8)
    expected = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in expected.items():
        cfg = tiny_cfg(TEST__PRECISION=name)
        model = MaskDINO(cfg).eval()
        predictor = MaskDINOPredictor.from_model(model, cfg)
        for outside in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
                with computed_in(model) as found:
                    model(drawn_batch([SIZE], [0]))
                assert found == {dtype}
                with computed_in(model) as found:
                    predictor(image)
                assert found == {dtype}


def tensor_float_32() -> list[object]:
    """What PyTorch's switches say; where the older and the newer ones differ, it raises."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()]
    newer = [getattr(x, "fp32_precision", None) for x in (matmul, getattr(cudnn, "conv", None))]
    return older + newer


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_tensor_float_32_is_on_inside_and_as_before_outside(
    gpu: str, before: str, convolutions: bool
) -> None:
    default = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions
        outside = tensor_float_32()
        with network_precision("float32", CUDA):
            assert tensor_float_32()[:3] == [False, False, "highest"]
        assert tensor_float_32() == outside
        if gpu == "Ampere":
            with pytest.raises(KeyError), network_precision("tf32", CUDA):
                assert tensor_float_32()[:3] == [True, True, "high"]
                raise KeyError
        with network_precision("auto", CUDA):
            assert tensor_float_32() == outside
        assert tensor_float_32() == outside
    finally:
        torch.set_float32_matmul_precision(default[0])
        torch.backends.cudnn.allow_tf32 = default[1]


def test_autocast_outside_changes_no_result() -> None:
    torch.manual_seed(0)
    tasks = {"TEST__PANOPTIC_ON": True, "TEST__SEMANTIC_ON": True}
    model = tiny_model(TEST__PANOPTIC_SCORE_THRESHOLD=0.0, **tasks).eval()
    batch = drawn_batch([SIZE], [0])
    (expected,) = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model(batch)
    a, b = expected["instances"], found["instances"]
    assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_masks, b.pred_masks)
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(expected["panoptic_seg"][0], found["panoptic_seg"][0])
    assert torch.equal(expected["sem_seg"], found["sem_seg"])


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older switches alone"
)
def test_tensor_float_32_where_the_process_uses_the_newer_switches(gpu: str) -> None:
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    try:
        matmul.fp32_precision, convolution.fp32_precision = "tf32", "ieee"
        with network_precision("float32", CUDA):
            assert [matmul.fp32_precision, convolution.fp32_precision] == ["ieee", "ieee"]
        if gpu == "Ampere":
            with network_precision("tf32", CUDA):
                assert [matmul.fp32_precision, convolution.fp32_precision] == ["tf32", "tf32"]
        assert [matmul.fp32_precision, convolution.fp32_precision] == ["tf32", "ieee"]
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before


def test_threads_switch_one_after_the_other() -> None:
    """The last of two that overlap would set what the first one had set."""
    first_ends, cudnn, seen = threading.Event(), torch.backends.cudnn, []
    before = cudnn.allow_tf32

    def other() -> None:
        with precision_module._tensor_float_32(True):
            seen.append((first_ends.is_set(), cudnn.allow_tf32))

    thread = threading.Thread(target=other)
    with precision_module._tensor_float_32(False):
        thread.start()
        thread.join(0.05)
        assert not cudnn.allow_tf32
        first_ends.set()
    thread.join()
    assert seen == [(True, True)] and cudnn.allow_tf32 == before


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_the_choice_is_logged_once(
    has_bfloat16: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: asked.append(0) or has_bfloat16, raising=False)
    precision_module._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="maskdino.system.precision")
    for name in ("auto", "auto", "float32"):
        with network_precision(name, CPU):
            pass
    reason = "which stays exact on a CPU"
    if has_bfloat16:
        reason += "; in bfloat16, which this one has, it would take about half the time"
    assert [record.getMessage() for record in caplog.records] == [
        f"Inference computes in float32 on cpu (MODEL.MASK_DINO.TEST.PRECISION is {why})."
        for why in (f"auto, {reason}", "float32")
    ]
    assert len(asked) == (1 if has_bfloat16 else 2)  # not with each image


def test_training_says_in_which_types_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_precision(None, CPU) == "float32 on cpu"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    text = "TF32 is {} in matrix products and {} in convolutions; cuDNN's benchmark is off"
    for precision, switch in (("tf32", "on"), ("float32", "off")):
        with precision_module._tensor_float_32(precision == "tf32"):
            found = training_precision(torch.float16, CUDA)
        assert found.startswith(f"float16 by autocast on {CUDA}; ")
        assert found.endswith(text.format(switch, switch))


def heads_and_content(number: int) -> tuple[PredictionHeads, Tensor]:
    heads = PredictionHeads(tiny_cfg())
    torch.nn.init.normal_(heads.box_head.layers[-1].weight, std=0.3)
    return heads, torch.randn(2, number, CHANNELS)


def test_boxes_and_scores_are_not_rounded() -> None:
    """Under autocast class and box head give what they give without, bit by bit."""
    heads, content = heads_and_content(20)
    normed, anchors = heads.norm(content), torch.randn(2, 20, 4)
    exact = heads.class_logits(normed), heads.box_logits(content, anchors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads.class_logits(normed), heads.box_logits(content, anchors)
        logits, masks = heads.classes_and_masks(content)
    assert all(torch.equal(a, b) for a, b in zip(exact, found, strict=True))
    assert logits.dtype == torch.float32 and masks.dtype == torch.bfloat16


def test_the_best_tokens_do_not_tie_in_bfloat16() -> None:
    heads, content = heads_and_content(4000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = heads.class_logits(content.bfloat16()).amax(-1)
    best = scores.topk(300).values
    assert all(len(row.unique()) == 300 for row in best)


def test_predictions_of_a_model_in_bfloat16() -> None:
    model = tiny_model(TEST__PRECISION="bfloat16").eval()
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        predictions, pixels = model.predict_precisely(images)
        assert predictions.class_logits.dtype == predictions.boxes.dtype == torch.float32
        assert predictions.mask_embeddings.dtype == pixels.dtype == torch.bfloat16
        exact, _ = model.predict(images)
    assert exact.mask_embeddings.dtype == torch.float32
    found = model(drawn_batch([SIZE], [0]))[0]["instances"]
    assert found.scores.isfinite().all() and len(found) > 0


def test_exported_programs_stay_float32() -> None:
    model = tiny_model(TEST__PRECISION="bfloat16").eval()
    images = torch.rand(1, 3, *SIZE) * 255
    with torch.no_grad():
        found = ExportableNetwork(model, ExportOptions())(images)
        exact, pixels = model.predict((images - model.pixel_mean) / model.pixel_std)
    assert all(output.dtype == torch.float32 for output in found.values())
    torch.testing.assert_close(found["pixel_embedding"], pixels, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["class_logits"], exact.class_logits, atol=1e-3, rtol=1e-3)


def test_heads_of_other_types_are_left_alone() -> None:
    heads, content = heads_and_content(5)
    assert heads.double().class_logits(content.double()).dtype == torch.float64
    assert heads.bfloat16().class_logits(content.bfloat16()).dtype == torch.bfloat16
