"""Training with compiled layers: equal to training without, under the same names of weights.

CUDA graphs are tested in tests/modeling/test_training_graphs.py.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from maskdino.engine import trainer
from maskdino.engine.compiled import compile_layers, replay_network
from maskdino.model import MaskDINO
from tests.engine.stand_in import read_checkpoint, tiny_config, train
from tests.helpers import NARROW, drawn_batch, tiny_cfg

SIZES = ((64, 64), (64, 64))
EAGERLY = "aot_eager"  # compiles forward and backward pass, but makes no machine code of them
SMALL = {"ENCODER__NUM_LAYERS": 2}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Each test compiles anew."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(*, residual: bool = False, **overrides: object) -> MaskDINO:
    """As after some training: samples lie between cells, where a rounding changes nothing."""
    torch.manual_seed(0)
    cfg = tiny_cfg(**(SMALL | overrides))
    if not residual:
        cfg.MODEL.BACKBONE.NAME = "build_strided_convolutions"  # which takes a second to compile
    made = MaskDINO(cfg)
    for layer in (*made.encoder.layers, *made.decoder.layers):
        attention = getattr(layer, "cross_attn", layer.self_attn)
        torch.nn.init.normal_(attention.sampling_offsets.bias)
    return made.train()


def step(
    trained: torch.nn.Module, objects: tuple[int, int] = (3, 2)
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients."""
    torch.manual_seed(3)
    total = torch.stack(list(trained(drawn_batch(SIZES, objects)).values())).sum()
    total.backward()
    inner = trained.module if isinstance(trained, DistributedDataParallel) else trained
    grads = {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}
    trained.zero_grad(set_to_none=True)
    return total.item(), grads


def assert_equal(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], within: float
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= within * grad.norm().clamp(min=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "level"), [(False, "all"), (False, "cheap"), (True, "none")])
def test_losses_and_gradients(residual: bool, level: str) -> None:
    overrides = {"residual": residual, "RECOMPUTE": level}
    compiled = model(**overrides)
    assert compile_layers(compiled, EAGERLY)
    for objects in ((3, 2), (5, 1), (0, 0)):
        assert_equal(step(compiled, objects), step(model(**overrides), objects), 1e-3)


@pytest.mark.slow
def test_machine_code() -> None:
    """The compiler that users get."""
    compiled = model(ENCODER__NUM_LAYERS=1, DECODER__NUM_LAYERS=1)
    if not compile_layers(compiled):
        pytest.skip("there is no compiler here; the log says what is missing")
    plain = model(ENCODER__NUM_LAYERS=1, DECODER__NUM_LAYERS=1)
    assert_equal(step(compiled), step(plain), 1e-3)


@pytest.mark.slow
def test_of_several_processes(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        compiled = model()
        assert compile_layers(compiled, EAGERLY)
        wrapped = DistributedDataParallel(
            compiled, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        for objects in ((3, 2), (0, 0)):
            assert_equal(step(wrapped, objects), step(model(), objects), 1e-3)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_a_compiled_run_goes_on_to_the_same_bits(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what is on disk after two of four steps, with layers compiled again or not."""
    monkeypatch.setattr(trainer, "compile_layers", partial(compile_layers, backend=EAGERLY))
    values = NARROW | {"MODEL.BACKBONE.NAME": "build_strided_convolutions", "SOLVER.MAX_ITER": 4}
    values |= {"MODEL.MASK_DINO.NUM_CLASSES": 1, "MODEL.MASK_DINO.DECODER.NUM_LAYERS": 1}
    values |= {"SOLVER.STEPS": "()", "SOLVER.IMS_PER_BATCH": 2, "SOLVER.EMA.ENABLED": True}
    words = [word for item in values.items() for word in item]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(tiny_config(whole, *words, "SOLVER.COMPILE", True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    part.mkdir()
    shutil.copy(whole / "model_0000001.pth", part)
    (part / "last_checkpoint").write_text("model_0000001.pth")
    assert train(tiny_config(part, *words, "SOLVER.COMPILE", compiled), resume=True).start_iter == 2
    found, expected = read_checkpoint(part), read_checkpoint(whole)
    for kind in ("model", "ema"):
        assert all(torch.equal(found[kind][name], x) for name, x in expected[kind].items())


def test_names_of_weights_and_evaluation_stay() -> None:
    plain, compiled = model(), model()
    assert compile_layers(compiled, "eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    image = drawn_batch(SIZES[:1], (0,))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found, expected = (m.eval()(image)[0]["instances"].scores for m in (compiled, plain))
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_without_a_compiler(caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand more")

    trained = model()
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(trained, fails)
    (record,) = [r for r in caplog.records if "SOLVER.COMPILE" in r.message]
    assert "no C++ compiler was found" in record.message and "\n" not in record.message
    assert_equal(step(trained), step(model()), 1e-6)


def test_graphs_need_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    trained = model()
    with caplog.at_level(logging.WARNING):
        assert not replay_network(trained)
    assert "SOLVER.CUDA_GRAPHS is on, but the model trains on: cpu" in caplog.text
    assert_equal(step(trained), step(model()), 1e-6)


@pytest.mark.parametrize("function", [compile_layers, replay_network])
def test_other_models(function: Callable) -> None:
    with pytest.raises(ValueError, match=r"for models of the class MaskDINO, not Linear: set it"):
        function(torch.nn.Linear(2, 2))
