"""What a training on own data starts from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from detectron2.config import CfgNode

from maskdino.config import load_config
from maskdino.custom import Machine, Request, plan, plan_run, run
from maskdino.custom.annotations import summarize
from maskdino.custom.measure import Memory, Pace
from maskdino.custom.prepare import prepared_data
from maskdino.custom.run import OFFLINE_CONFIG, fit_pace, read_default, read_start
from maskdino.data import DataError
from maskdino.engine.run_folder import LOCK, RunError
from tests.custom.drawn import write_drawn
from tests.engine.test_run_folder import hold
from tests.helpers import tiny_cfg

GPU, CPU = Machine("cuda", 40000.0, 1), Machine("cpu", 8000.0, 2)


def asked(**values: object) -> Request:
    return Request(train_json=Path(), train_images=Path(), output=Path(), **values)


def test_without_network_a_gpu_starts_from_the_weights_of_a_package(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = []

    def no_network(config: str, request: Request) -> object:
        read.append(config)
        if config != OFFLINE_CONFIG:
            raise ConnectionError("cannot download R-50.pkl")
        return read_start(config, request)

    monkeypatch.setattr(run, "read_start", no_network)
    with caplog.at_level(logging.WARNING):
        cfg = read_default(GPU, asked())
    assert read == ["custom/maskdino_R50", OFFLINE_CONFIG]
    assert cfg.MODEL.TIMM.WEIGHTS.startswith("pip:")
    (line,) = caplog.messages
    assert line == f"cannot download R-50.pkl: starting from {OFFLINE_CONFIG} instead."
    with pytest.raises(ConnectionError):  # what was asked for is not replaced
        read_default(GPU, asked(weights="https://somewhere/model.pth"))


def test_none_is_no_weights_of_the_backbone_either() -> None:
    assert read_default(CPU, asked()).MODEL.TIMM.WEIGHTS.startswith("pip:")
    cfg = read_default(CPU, asked(weights="none"))
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS) == ("", "")


def test_batches_shrink_until_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(cfg: object, _register: object, images: int) -> Pace | None:
        assert images == 9
        tried.append(cfg.SOLVER.IMS_PER_BATCH)
        return None if tried[-1] > fitting else Pace(1.0, 1.0)

    monkeypatch.setattr(run, "measure_pace", measured)
    cfg, fitting = tiny_cfg(), 4
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 16, 0.4
    assert fit_pace(cfg, CPU, asked(), 9) == Pace(1.0, 1.0)
    assert tried == [8, 4]  # of one of two processes
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (8, 0.283)
    fitting = 0
    with pytest.raises(DataError, match="a batch of 2 images does not fit.*--batch-size"):
        fit_pace(cfg, CPU, asked(), 9)
    cfg.SOLVER.IMS_PER_BATCH = 8
    with pytest.raises(DataError, match="a batch of 8 images"):
        fit_pace(cfg, CPU, asked(batch_size=8), 9)


def test_objects_are_enlarged_as_the_size_that_fits_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that memory makes smaller show smaller objects."""
    drawn = write_drawn(tmp_path / "drawn")  # of 64 pixels

    def measured(cfg: CfgNode, objects: int) -> Memory | None:  # noqa: ARG001
        return Memory(0.0, 1.0) if cfg.INPUT.LSJ.SIZE[0] < 64 else None

    monkeypatch.setattr(plan, "MIN_SIZE", 32)
    monkeypatch.setattr(plan, "MOST_ZOOM", 9)
    monkeypatch.setattr(plan, "measure_memory", measured)
    monkeypatch.setattr(plan, "find_machine", lambda _: CPU)
    monkeypatch.setattr(run, "measure_pace", lambda *_: Pace(1.0, 0.0, others=0.8))
    request = Request(train_json=drawn.json_file, train_images=drawn.images, output=tmp_path / "o")
    planned, text = plan_run(request)
    cfg = load_config(str(planned.config))
    assert cfg.INPUT.LSJ.SIZE == [32, 32]
    side = 32 * summarize(prepared_data(request.output, "custom_train")).object_side
    whole = read_default(CPU, request)
    assert pytest.approx(25 / side) == cfg.INPUT.LSJ.MIN_SCALE / whole.INPUT.LSJ.MIN_SCALE
    assert f"else half have less than {side:.0f} pixels" in text
    assert "evaluations; less without other programs, which take 0.8 cores now" in text


def test_a_folder_in_use_or_planned_meanwhile_is_not_planned_again(tmp_path: Path) -> None:
    drawn, out = write_drawn(tmp_path / "drawn"), tmp_path / "out"
    request = Request(train_json=drawn.json_file, train_images=drawn.images, output=out)
    other = hold(out)
    try:
        with pytest.raises(RunError, match=f"in use by another run .process {other.pid}"):
            plan_run(request)
    finally:
        other.kill()
        other.communicate()
    (out / "config.yaml").write_text("of the other run")
    with pytest.raises(DataError, match="out holds a run: go on with --resume"):
        plan_run(request)
    assert (out / "config.yaml").read_text() == "of the other run"
    assert not (out / "data").exists()


def test_data_that_cannot_be_used_leave_no_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    request = Request(data=tmp_path / "empty", output=tmp_path / "made" / "out")
    with pytest.raises(DataError, match="empty"):
        plan_run(request)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    request.output.mkdir(parents=True)  # what was there before stays
    with pytest.raises(DataError, match="empty"):
        plan_run(request)
    assert [path.name for path in request.output.iterdir()] == [LOCK]
    # So does the list of what is wrong, which the message names.
    drawn = write_drawn(tmp_path / "drawn")
    next(drawn.images.glob("*.png")).unlink()
    request = Request(
        train_json=drawn.json_file, train_images=drawn.images, output=tmp_path / "listed"
    )
    with pytest.raises(DataError, match=r"The whole list is in .*listed/data/check\.txt") as error:
        plan_run(request)
    assert "image file is missing" in str(error.value)
    assert (request.output / "data" / "check.txt").is_file()
