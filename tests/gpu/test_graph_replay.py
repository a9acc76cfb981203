"""The network that evaluation and prediction run: CUDA graphs of its shapes, equal to none."""

from __future__ import annotations

import pytest
import torch

from maskdino.model import MaskDINO
from maskdino.modeling.cuda_graphs import CALLS_BEFORE
from tests.gpu.cases import TASKS, assert_same_results, error_of, make_batch, make_cfg, make_model

pytestmark = pytest.mark.gpu
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


def model_on(device: torch.device, task: str, precision: str, graphs: bool) -> MaskDINO:
    cfg = make_cfg(task, TEST__PRECISION=precision, TEST__CUDA_GRAPHS=graphs)
    return make_model(cfg).eval().to(device)


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("task", TASKS)
def test_replays_equal_single_kernels(task: str, precision: str, cuda: torch.device) -> None:
    graphed, plain = (model_on(cuda, task, precision, graphs) for graphs in (True, False))
    seen = []
    with torch.no_grad():
        for seed in range(CALLS_BEFORE + 3):
            images = plain.preprocess(make_batch(task, seed=seed)).tensor
            found, expected = (m.predict_precisely(images)[0] for m in (graphed, plain))
            assert error_of(found.class_logits, expected.class_logits) < BOUND[precision]
            assert error_of(found.boxes, expected.boxes) < BOUND[precision]
            seen.append(found.boxes)
    assert len(graphed._graphs) == 1 and len(plain._graphs) == 0
    assert error_of(seen[-1], seen[-2]) > 1e-3  # results of a replay stay as they are


def test_results_of_images_of_two_sizes_in_turns(cuda: torch.device) -> None:
    graphed, plain = (model_on(cuda, "instance", "float32", graphs) for graphs in (True, False))
    with torch.inference_mode():
        for number in range(2 * (CALLS_BEFORE + 2)):
            batch = make_batch("instance", seed=number)[number % 2 :]
            assert_same_results(graphed(batch), plain(batch))
    assert len(graphed._graphs) == 2
    with torch.no_grad():  # what was captured in inference mode is of use outside of it
        assert_same_results(graphed(batch), plain(batch))


def test_weights_that_change_in_place_change_the_replay(cuda: torch.device) -> None:
    graphed, plain = (model_on(cuda, "instance", "bfloat16", graphs) for graphs in (True, False))
    images = plain.preprocess(make_batch("instance")).tensor
    with torch.no_grad():
        for _ in range(CALLS_BEFORE + 1):
            before = graphed.predict_precisely(images)[0].class_logits
        for model in (graphed, plain):
            model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()})
        found, expected = (m.predict_precisely(images)[0].class_logits for m in (graphed, plain))
    assert len(graphed._graphs) == 1
    assert error_of(found, expected) < BOUND["bfloat16"] < error_of(found, before)
