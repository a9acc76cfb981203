"""The network as one CUDA graph, and compiled, against the network as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskdino.model import MaskDINO
from maskdino.structures import Predictions
from tests.gpu.cases import TASKS, error_of, make_batch, make_cfg, make_model

pytestmark = pytest.mark.gpu

Network = tuple[Predictions, Tensor | None]


def images_of(model: MaskDINO, seed: int) -> Tensor:
    """A batch of random pictures, always of the same size, (2, 3, 64, 96)."""
    return model.preprocess(make_batch("instance", seed=seed)).tensor


def assert_same(found: Network, expected: Network, bound: float) -> None:
    pairs = [
        (found[0].class_logits, expected[0].class_logits),
        (found[0].boxes, expected[0].boxes),
        (found[0].mask_embeddings, expected[0].mask_embeddings),
        (found[1], expected[1]),
    ]
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert error_of(ours, theirs) < bound


@pytest.mark.parametrize(
    ("task", "dtype"),
    [*((task, None) for task in TASKS), ("instance", torch.bfloat16)],
    ids=[*TASKS, "instance-bfloat16"],
)
def test_a_graph_computes_other_pictures(
    task: str, dtype: torch.dtype | None, cuda: torch.device
) -> None:
    """Under autocast the converted weights have to be the graph's own: without autocast's cache."""
    model = make_model(make_cfg(task)).eval().to(cuda)
    images = images_of(model, seed=1)

    def network() -> Network:
        with (
            torch.no_grad(),
            torch.autocast(cuda.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            return model.predict(images)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            network()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = network()
    seen = []
    for seed in (1, 2):
        images.copy_(images_of(model, seed))
        graph.replay()
        expected = network()
        assert_same(captured, expected, 1e-5 if dtype is None else 1e-2)
        seen.append(expected[0].class_logits)
    assert error_of(*seen) > 1e-2  # other pictures give something else


@pytest.mark.slow
def test_the_compiled_network_equals_the_network(device: torch.device) -> None:
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # C++ takes minutes to compile
    if backend == "inductor":
        pytest.importorskip("triton")
    cfg = make_cfg("instance", ENCODER__NUM_LEVELS=3, DECODER__NUM_LAYERS=1)
    cfg.MODEL.BACKBONE.NAME = "build_strided_convolutions"  # quicker to compile
    model = make_model(cfg).eval().to(device)
    compiled = torch.compile(model.predict, backend=backend, dynamic=False, fullgraph=True)
    with torch.no_grad():
        for seed in (1, 2):
            images = images_of(model, seed)
            assert_same(compiled(images), model.predict(images), 1e-4)
