"""Tracing and compiling of whole models, detectron2's TracingAdapter, fvcore's counters."""

from __future__ import annotations

import warnings

import pytest
import torch
from detectron2.structures import Boxes
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from torch import Tensor, nn

from maskdino.model import MaskDINO
from maskdino.ops.ms_deform_attn import compiled_op_available
from tests.helpers import tiny_model

SIZE = (64, 96)
MODELS = {
    "instances": {},
    "few": {"TEST__SCORE_THRESHOLD": 0.1},
    "boxes": {"MASK_ON": False, "QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "none"},
    "all tasks": {"TEST__SEMANTIC_ON": True, "TEST__PANOPTIC_ON": True},
    "semantic": {"TEST__SEMANTIC_ON": True, "TEST__INSTANCE_ON": False},
}


class OfImage(nn.Module):
    """An image in, the tensors of its results out."""

    def __init__(self, model: MaskDINO) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        (results,) = self.model([{"image": image}])
        found = {"sem_seg": results["sem_seg"]} if "sem_seg" in results else {}
        if "instances" in results:
            fields = results["instances"].get_fields()
            found |= {k: v.tensor if isinstance(v, Boxes) else v for k, v in fields.items()}
        return found


def model_and_images(name: str) -> tuple[MaskDINO, Tensor, Tensor]:
    model = tiny_model(**MODELS[name]).eval()
    torch.nn.init.normal_(model.heads.class_head.weight, std=0.5)  # scores on both sides of 0.1
    return model, *(torch.randint(0, 256, (2, 3, *SIZE)).float())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.skipif(not compiled_op_available("cpu"), reason="the operator is not built")
@torch.no_grad()
def test_traced_program_gives_the_results_of_the_model_also_for_another_image(name: str) -> None:
    model, first, second = model_and_images(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which the program is made for
        program = torch.jit.trace(OfImage(model), first, strict=False, check_trace=False)
    for image in (first, second):
        expected, found = OfImage(model)(image), program(image)
        assert set(found) == set(expected)
        assert set(found) & {"scores", "sem_seg"}
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    if name == "few":
        numbers = {len(OfImage(model)(image)["scores"]) for image in (first, second)}
        assert len(numbers) == 2
        assert min(numbers) > 0


@torch.no_grad()
def test_operations_and_activations_are_counted_in_attention_too() -> None:
    model, image, _ = model_and_images("instances")
    operations = FlopCountAnalysis(OfImage(model), image).unsupported_ops_warnings(False)
    operations.uncalled_modules_warnings(False)
    assert operations.by_operator()["grid_sampler"] > 0
    counts = operations.by_module()
    assert counts["model.encoder"] > counts["model.heads"] > 0
    activations = ActivationCountAnalysis(OfImage(model), image).unsupported_ops_warnings(False)
    assert activations.total() > 0


@torch.no_grad()
def test_detectron2s_adapter_traces() -> None:
    export = pytest.importorskip("detectron2.export", exc_type=ImportError)
    model, first, second = model_and_images("few")
    adapter = export.TracingAdapter(model, [{"image": first}]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(adapter, (first,), check_trace=False)
    (found,) = adapter.outputs_schema(program(second))
    expected = OfImage(model)(second)
    instances = found["instances"]
    torch.testing.assert_close(instances.scores, expected["scores"], rtol=1e-4, atol=1e-4)
    assert torch.equal(instances.pred_masks, expected["pred_masks"])
    assert tuple(instances.image_size) == SIZE


@pytest.mark.parametrize("name", ["instances", "boxes"])
@torch.no_grad()
def test_the_network_compiles_as_one_program(name: str) -> None:
    model, first, _ = model_and_images(name)
    compiled = torch.compile(model.predict, backend="eager", dynamic=False, fullgraph=True)
    found, expected = compiled(first[None]), model.predict(first[None])
    for part in ("class_logits", "boxes"):
        ours, theirs = (getattr(predictions, part) for predictions, _ in (found, expected))
        torch.testing.assert_close(ours, theirs)
