"""Writers by name: which there are, and that runs of services go on. Real packages where installed.

Nothing here needs a network: W&B writes to files, and so does MLflow.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from maskdino.config import load_config
from maskdino.engine.hooks import ConsoleWriter
from maskdino.engine.metrics_file import MetricsFile
from maskdino.engine.writers import (
    RunWriter,
    WriteScalars,
    build_writers,
    check_writers,
)
from maskdino.integration.extensions import WRITER_REGISTRY

STEPS = 6


class Counting(TrainerBase):
    """Records a number, and a result of a class with an odd name, at each step."""

    def __init__(self, *hooks: HookBase, fails_at: tuple[int, BaseException] | None = None) -> None:
        super().__init__()
        self.register_hooks(list(hooks))
        self.fails_at = fails_at

    def run_step(self) -> None:
        if self.fails_at and self.iter == self.fails_at[0]:
            raise self.fails_at[1]
        scalars = {"loss": float(self.iter), "segm/AP-cup (tea) & more": 10.0 + self.iter}
        self.storage.put_scalars(**scalars, smoothing_hint=False)
        self.storage.put_scalar("segm/AP-absent", float("nan"), smoothing_hint=False)


def config(folder: Path, *names: str, **log: object) -> CfgNode:
    cfg = load_config(None, ["OUTPUT_DIR", str(folder), "LOG.WRITERS", str(list(names))])
    for key, value in log.items():
        cfg.LOG[key] = value
    return cfg


def run(cfg: CfgNode, start: int = 0, end: int = STEPS, fault: BaseException | None = None) -> None:
    """Trains from a step to another, whatever ends it."""
    fails_at = (end - 1, fault) if fault else None
    hook = WriteScalars(build_writers(cfg, STEPS), period=2)
    try:
        Counting(hook, fails_at=fails_at).train(start, end)
    except BaseException as error:
        if error is not fault:
            raise


class Notes(RunWriter):
    """Stands in for a service."""

    name, package = "notes", ("json", "json")

    def open_run(self, identity: str | None) -> str:
        self.events: list[Any] = ["open", identity, self.project, self.run_name]
        opened.append(self)
        return identity or f"run {len(opened)}"

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        self.events.append((iteration, scalars["loss"]))

    def close_run(self, *, failed: bool) -> None:
        self.events.append("failed" if failed else "closed")


opened: list[Notes] = []


@pytest.fixture(autouse=True)
def _notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WRITER_REGISTRY, "_obj_map", dict(WRITER_REGISTRY._obj_map))
    WRITER_REGISTRY.register(Notes, name="notes")
    opened.clear()


def test_console_and_json_are_always_there(tmp_path: Path) -> None:
    default = build_writers(load_config(None, ["OUTPUT_DIR", str(tmp_path / "default")]), STEPS)
    assert [type(writer).__name__ for writer in default[2:]] == ["TensorboardXWriter"]
    with EventStorage() as storage:
        storage.put_scalar("lr", 1.0)
        default[2].write()  # detectron2's main branch makes the file no sooner
    for writer in default:
        writer.close()
    assert list((tmp_path / "default").glob("events.out.tfevents*"))
    bare = build_writers(config(tmp_path / "bare"), STEPS)
    assert [type(writer) for writer in bare] == [ConsoleWriter, MetricsFile]


def test_own_writer(tmp_path: Path) -> None:
    seen = []

    @WRITER_REGISTRY.register()
    class Mine(EventWriter):
        def __init__(self, cfg: CfgNode) -> None:
            self.folder = cfg.OUTPUT_DIR

        def write(self) -> None:
            seen.append((self.folder, get_event_storage().iter))

    run(config(tmp_path, "Mine"))
    assert (str(tmp_path), 1) in seen


def test_values_are_sent_once_and_resumed_runs_go_on(tmp_path: Path) -> None:
    cfg = config(tmp_path / "fruit", "notes", PROJECT="kitchen")
    run(cfg, end=4)
    run(cfg, start=4)
    run(config(tmp_path / "fruit", "notes", RUN="again"))  # another run in the same folder
    first, second, third = (writer.events for writer in opened)
    assert first == ["open", None, "kitchen", "fruit", (1, 1.0), (3, 3.0), "closed"]
    assert second == ["open", "run 1", "kitchen", "fruit", (5, 5.0), "closed"]
    assert third[:4] == ["open", None, "maskdino", "again"]
    assert json.loads((tmp_path / "fruit" / "runs.json").read_text()) == {"notes": "run 3"}


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (RuntimeError("broken"), "failed"),
        (KeyboardInterrupt(), "failed"),
        (None, "closed"),
    ],
)
def test_runs_end_as_the_training_does(
    tmp_path: Path, fault: BaseException | None, end: str
) -> None:
    run(config(tmp_path, "notes"), fault=fault)
    assert opened[0].events[-1] == end


def test_training_that_ends_before_its_first_step_sends_nothing(tmp_path: Path) -> None:
    class Refuses(HookBase):
        def before_train(self) -> None:
            raise RuntimeError("no")

    writers = WriteScalars(build_writers(config(tmp_path, "notes"), STEPS), period=2)
    with pytest.raises(RuntimeError, match="^no$"):
        Counting(Refuses(), writers).train(0, STEPS)
    assert opened == []


def test_unknown_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="LOG.WRITERS names 'tensorbord'.* mlflow, notes, tensor"):
        check_writers(config(tmp_path, "tensorbord"))
    monkeypatch.setattr(Notes, "package", ("no_such_package", "no-such-package"))
    with pytest.raises(ValueError, match="'notes', which needs .*: pip install no-such-package$"):
        build_writers(config(tmp_path, "notes"), STEPS)


def test_wandb_is_asked_as_it_wants_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls, where the package itself is not installed."""
    calls: list[tuple] = []
    session = types.SimpleNamespace(
        id="abc",
        log=lambda values, step: calls.append((step, values["loss"])),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = lambda **words: calls.append(("init", words)) or session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = config(tmp_path / "fruit", "wandb")
    run(cfg, end=4)
    run(cfg, start=4)
    starts = [words for name, words in calls if name == "init"]
    assert [(w["project"], w["name"], w["id"], w["resume"]) for w in starts] == [
        ("maskdino", "fruit", None, None),
        ("maskdino", "fruit", "abc", "allow"),
    ]
    assert starts[0]["config"]["SOLVER"]["BASE_LR"] == cfg.SOLVER.BASE_LR
    assert [call for call in calls if call[0] != "init"] == [
        *((1, 1.0), (3, 3.0), ("finish", 0)),
        *((5, 5.0), ("finish", 0)),
    ]


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config(tmp_path / "fruit", "wandb")
    run(cfg, end=4)
    run(cfg, start=4)
    identity = json.loads((tmp_path / "fruit" / "runs.json").read_text())["wandb"]
    files = sorted((tmp_path / "fruit" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    for file in files:
        assert b"segm/AP-cup (tea)" in file.read_bytes()


@pytest.mark.slow
def test_mlflow_itself_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # to be restored
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    cfg = config(tmp_path / "fruit", "mlflow")
    run(cfg, end=4)
    run(cfg, start=4, fault=RuntimeError("broken"))
    identity = json.loads((tmp_path / "fruit" / "runs.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "fruit" / "mlruns").as_uri())
    kept = client.get_run(identity)
    assert (kept.info.run_name, kept.info.status) == ("fruit", "FAILED")
    assert kept.data.params["SOLVER.BASE_LR"] == str(cfg.SOLVER.BASE_LR)
    history = client.get_metric_history(identity, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (3, 3.0), (4, 4.0)]
    assert "segm/AP-cup _tea_ _ more" in kept.data.metrics
    assert len(client.search_runs([kept.info.experiment_id])) == 1
