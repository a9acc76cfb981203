"""Trainer, hooks and launch of maskdino.engine, with a stand-in for the model."""

import json
import logging
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase, TrainerBase
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from maskdino.checkpoint.ema import WeightAverage
from maskdino.checkpoint.reading import CheckpointError
from maskdino.data import DataError, build_train_mapper
from maskdino.engine.evaluating import evaluate_weights
from maskdino.engine.launch import launch
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system.errors import UserError
from tests.engine.stand_in import read_checkpoint, tiny_config, train, train_in_process
from tests.helpers import NARROW, NODE

EMA = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5)


def assert_same(found: object, expected: object, path: str = "") -> None:
    """Compares nested containers of tensors and numbers, bit by bit."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert found == expected, path


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_config(folder, *EMA))
    return folder


def test_killed_and_resumed_run_ends_the_same(
    whole_run: Path, tmp_path: Path, warm_python: str
) -> None:
    script = (
        "from pathlib import Path; from tests.engine.stand_in import tiny_config, train\n"
        f"train(tiny_config(Path({str(tmp_path)!r}), *{EMA!r}), kill_after=4)"
    )
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([warm_python, "-c", script], cwd=root, check=False)
    assert killed.returncode == -9
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    # Loading processes and evaluations in between must not matter.
    cfg = tiny_config(tmp_path, *EMA, "DATALOADER.NUM_WORKERS", 2)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 4
    assert_same(read_checkpoint(tmp_path), read_checkpoint(whole_run))


def test_trainer_rests_on_the_base_class_alone(whole_run: Path) -> None:
    """`DefaultTrainer` differs between releases, and keeps its state elsewhere."""
    assert MaskDINOTrainer.__bases__ == (TrainerBase,)
    parts = {"iteration", "seed", "optimizer", "scheduler", "grad_scaler"}
    assert read_checkpoint(whole_run)["trainer"].keys() == parts


class LoadsOtherwise(MaskDINOTrainer):
    """Overrides what users of detectron2 do."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        mapper = build_train_mapper(cfg)
        return build_detection_train_loader(cfg, mapper=mapper, num_workers=0)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), cfg.SOLVER.BASE_LR)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        steps = 100 * cfg.SOLVER.MAX_ITER  # further than the test goes
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=steps)


def test_overridden_parts_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also a loader of detectron2's, which cannot be resumed and says so."""
    cfg = tiny_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    for iterations in (2, 4):
        cfg.SOLVER.MAX_ITER = iterations
        trainer = LoadsOtherwise(cfg)
        trainer.resume_or_load(resume=iterations > 2)
        with caplog.at_level(logging.WARNING, logger="maskdino"):
            trainer.train()
        assert type(trainer.optimizer) is torch.optim.SGD
        assert trainer.optimizer.param_groups[0]["lr"] == cfg.SOLVER.BASE_LR / 2
        assert ("begin anew" in caplog.text) == (iterations > 2)
    assert read_checkpoint(tmp_path)["iteration"] == 3


class Counts(DatasetEvaluator):
    """Counts images."""

    def reset(self) -> None:
        self.images = 0

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        assert len(inputs) == len(outputs)
        self.images += len(inputs)

    def evaluate(self) -> dict:
        return {"count": {"images": self.images}}


def test_evaluators_of_the_caller(tmp_path: Path) -> None:
    """One for each dataset; results of several datasets are kept apart."""
    settings = ("INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 64, "DATASETS.TEST")
    cfg = tiny_config(tmp_path, *settings, "('nuclei_val',)")
    model = MaskDINOTrainer.build_model(cfg)
    alone = MaskDINOTrainer.test(cfg, model, Counts())
    assert alone["count"]["images"] > 0
    cfg.DATASETS.TEST = ("nuclei_val", "nuclei_train")
    both = MaskDINOTrainer.test(cfg, model, [Counts(), Counts()])
    assert list(both) == ["nuclei_val", "nuclei_train"] and both["nuclei_val"] == alone
    with pytest.raises(ValueError, match="1 evaluators for 2 datasets"):
        MaskDINOTrainer.test(cfg, model, Counts())


def test_drawn_seed_is_kept(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "SEED", -1, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    first = train(cfg)
    cfg.SOLVER.MAX_ITER = 4
    second = train(cfg, resume=True)
    assert second.seed == first.seed
    other = MaskDINOTrainer(cfg)
    assert other.seed != first.seed  # drawn anew: chance of a clash is 2 ** -32


def test_rates_that_a_resumed_run_does_not_take_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    first = train(tiny_config(tmp_path, *short, "SOLVER.BASE_LR", 0.25))
    caplog.set_level(logging.WARNING)
    again = tiny_config(tmp_path, "SOLVER.BASE_LR", 0.25, "SOLVER.WEIGHT_DECAY", 0.125)
    second = train(again, resume=True)
    (said,) = (x.message for x in caplog.records if "which stay" in x.message)
    assert said.startswith("The weight decays are [") and "0.125" in said
    kept = [group["weight_decay"] for group in first.optimizer.param_groups]
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == kept
    other = tiny_config(tmp_path, "SOLVER.MAX_ITER", 9, "SOLVER.OPTIMIZER", "SGD")
    with pytest.raises(CheckpointError, match=r"another optimizer.*SOLVER\.OPTIMIZER"):
        train(other, resume=True)


def test_resuming_a_finished_run_trains_no_more(whole_run: Path) -> None:
    before = read_checkpoint(whole_run)
    trainer = train(tiny_config(whole_run, *EMA), resume=True)
    assert trainer.start_iter == 6
    assert_same(read_checkpoint(whole_run), before)


def test_log_holds_losses_rate_speed_and_memory(whole_run: Path) -> None:
    lines = (whole_run / "metrics.json").read_text().splitlines()
    last = json.loads(lines[-1])
    for name in ("total_loss", "loss_class", "loss_class_noise", "lr", "time", "data_time"):
        assert name in last
    for name in ("images_per_second", "max_memory_mb", "eta_seconds", "gradient_norm"):
        assert last[name] >= 0
    assert list(whole_run.glob("events.out.tfevents*"))


def test_averaged_weights_follow_their_formula() -> None:
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.75)
    expected = model.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
            model.num_batches_tracked.add_(1)
        average.update(100 + step)
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    model.state_dict = None  # a step looks no names up
    average.update(103)
    del model.state_dict
    expected = 0.75 * expected + 0.25 * model.weight.detach()
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
        assert model.num_batches_tracked == 4
    assert torch.equal(model.weight, own)
    torch.testing.assert_close(average.state_dict()["weight"], expected)
    with pytest.raises(ValueError, match=r"DECAY is 1\.0"):
        WeightAverage(model, 1.0)
    with pytest.raises(ValueError, match="lacks weight"):
        average.load_state_dict({})


def test_averaged_weights_are_saved_as_a_model(whole_run: Path) -> None:
    whole = read_checkpoint(whole_run)
    alone = read_checkpoint(whole_run / "ema")
    assert alone.keys() == {"model"}
    assert_same(dict(alone["model"]), whole["ema"])
    assert not torch.equal(whole["ema"]["head.weight"], whole["model"]["head.weight"])


def test_evaluation_uses_averaged_weights(whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "maskdino.engine.evaluating.evaluate_model",
        lambda _cfg, model: seen.append(model.head.weight.clone()) or {},
    )
    whole = read_checkpoint(whole_run)
    weights = ("MODEL.WEIGHTS", whole_run / "model_final.pth")
    evaluate_weights(tiny_config(whole_run, *EMA, *weights), resume=False)
    evaluate_weights(tiny_config(whole_run, *weights), resume=False)
    assert torch.equal(seen[0], whole["ema"]["head.weight"])
    assert torch.equal(seen[1], whole["model"]["head.weight"])


PLAIN = (
    *("MODEL.MASK_DINO.LOSS.SUPERVISE_INITIAL", False),  # random numbers differ by process
    *("DATASETS.TEST", "('nuclei_val',)", "INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 64),
)


@pytest.fixture(scope="module")
def single_process_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process, without random numbers in the model."""
    folder = tmp_path_factory.mktemp("single")
    train(tiny_config(folder, *PLAIN, *EMA))
    return folder


def assert_equal_runs(found: Path, expected: Path) -> None:
    ours, theirs = read_checkpoint(found), read_checkpoint(expected)
    for part in ("model", "ema"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, atol=1e-5, rtol=1e-5)
    results = [
        json.loads((f / "inference" / "results.json").read_text()) for f in (found, expected)
    ]
    assert results[0]["bbox"] == pytest.approx(results[1]["bbox"], abs=0.05, nan_ok=True)
    assert results[0]["segm"] == pytest.approx(results[1]["segm"], abs=0.05, nan_ok=True)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_two_processes_train_as_one(
    single_process_run: Path, tmp_path: Path, accumulation_steps: int
) -> None:
    cfg = tiny_config(tmp_path, *PLAIN, *EMA, "SOLVER.ACCUMULATION_STEPS", accumulation_steps)
    launch(train_in_process, cfg, processes=2)
    assert_equal_runs(tmp_path, single_process_run)


@pytest.mark.slow
def test_torchrun_trains_as_one_process(
    single_process_run: Path, tmp_path: Path, repository: Path, warm_python: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from maskdino.engine.launch import launch\n"
        "from tests.engine.stand_in import tiny_config, train_in_process\n"
        f"cfg = tiny_config(Path({str(tmp_path)!r}), *{PLAIN + EMA!r})\n"
        "launch(train_in_process, cfg, processes=1)\n"
    )
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--log-dir", str(tmp_path / "logs")]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([*command, str(script)], check=True, cwd=repository, env=environment)
    assert_equal_runs(tmp_path, single_process_run)


def test_bad_loss_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = MaskDINOTrainer(tiny_config(tmp_path))
    trainer.resume_or_load(False)

    def break_weights(*_: object) -> None:
        with torch.no_grad():
            if trainer.iter == 3:
                trainer.model.head.bias.fill_(float("nan"))

    trainer.model.register_forward_pre_hook(break_weights)
    with pytest.raises(FloatingPointError, match=r"loss_class.*nan.*nuclei") as error:
        trainer.train()
    assert isinstance(error.value, UserError)  # which commands say in one line
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert all(
        p.isfinite().all() for p in read_checkpoint(tmp_path, "model_0000001.pth")["model"].values()
    )


def test_deterministic_algorithms_train_the_same_twice(tmp_path: Path) -> None:
    """No operation of the model, of its losses or of the optimizer lacks a deterministic form."""
    settings = (word for item in (NARROW | {f"{NODE}NUM_CLASSES": 1}).items() for word in item)
    steps = ("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()")
    words = (*settings, *steps, "SOLVER.CHECKPOINT_PERIOD", 100)
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("first", "second"):
            train(tiny_config(tmp_path / name, *words))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(read_checkpoint(tmp_path / "first"), read_checkpoint(tmp_path / "second"))


def test_too_many_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 GPUs asked for, but 1 found"):
        launch(print, processes=2)


def test_training_ends_where_a_hook_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(HookBase):
        def after_step(self) -> None:
            self.trainer.stopped = self.trainer.iter == 1

    trainer = MaskDINOTrainer(tiny_config(tmp_path, "SOLVER.MAX_ITER", 6))
    trainer.register_hooks([Stop()])
    trainer.train()
    assert trainer.iter == 1
    assert not (tmp_path / "model_final.pth").exists()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(("kind", "logged"), [(DataError, False), (ZeroDivisionError, True)])
def test_errors_of_the_data_are_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Exception], logged: bool
) -> None:
    class Fail(HookBase):
        def before_step(self) -> None:
            raise kind("of no use")

    trainer = MaskDINOTrainer(tiny_config(tmp_path, "SOLVER.MAX_ITER", 2))
    trainer.register_hooks([Fail()])
    with pytest.raises(kind):
        trainer.train()
    assert ("Traceback" in caplog.text) is logged
