"""Devices that exist, and those that do not: what configurations and commands say of them."""

from __future__ import annotations

import logging

import pytest
import torch

from maskdino.config import load_config
from maskdino.engine.evaluating import evaluate_weights
from maskdino.engine.hooks import peak_memory_mb
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.system.devices import comm as devices_comm
from maskdino.system.devices import configured_device, find_device, pick_device, settle_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs that nobody computes on; the devices that were made current ones."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1"])
def test_words_that_are_no_device(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^MODEL\.DEVICE is '{name}', which is no device: use"):
        configured_device(name)


@pytest.mark.usefixtures("gpus")
def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [str(configured_device(n)) for n in ("cuda", "cuda:0", "cuda:1")] == [
        "cuda",
        "cuda:0",
        "cuda:1",
    ]
    with pytest.raises(ValueError, match=r"DEVICE is cuda:7, but .* 2 GPUs here: cuda:0 to cuda:1"):
        configured_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"PyTorch finds 1 GPU here: cuda:0$"):
        configured_device("cuda:1")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device here")
def test_devices_that_this_pytorch_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"^MODEL\.DEVICE is mps, which cannot be used here: .+$"):
        configured_device("mps")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
@pytest.mark.parametrize(
    ("version", "reason"), [(None, "is built without CUDA"), ("13.0", "finds no GPU here")]
)
def test_without_a_gpu_configurations_mean_the_cpu(
    name: str,
    version: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    with caplog.at_level(logging.INFO, "maskdino"):
        cfg = settle_device(load_config(None, ["MODEL.DEVICE", name]))
        assert cfg.MODEL.DEVICE == "cpu"
        assert pick_device(None, name) == torch.device("cpu")
    assert len(caplog.messages) == 2
    for message in caplog.messages:
        assert message.startswith(f"MODEL.DEVICE is {name}, but ") and reason in message
    # Who names a GPU on the command line wants no other device.
    with pytest.raises(ValueError, match=f"the device asked for is {name}, but .*{reason}"):
        pick_device(name, "cpu")
    assert find_device("cpu") == torch.device("cpu")


def test_a_gpu_with_a_number_becomes_the_current_one(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_config(None, ["MODEL.DEVICE", "cuda:1"])
    assert settle_device(cfg) is cfg
    assert gpus == [torch.device("cuda:1")]
    settle_device(load_config(None, ["MODEL.DEVICE", "cuda"]))  # each process has its own already
    assert len(gpus) == 1
    monkeypatch.setattr(devices_comm, "get_local_size", lambda: 4)
    with pytest.raises(ValueError, match="cuda:1, but each of 4 processes needs a GPU of its own"):
        settle_device(cfg)


class Stop(Exception):
    """Ends what comes after."""


def test_trainings_and_evaluations_settle_their_device(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stop

    for module in ("trainer", "evaluating"):
        monkeypatch.setattr(f"maskdino.engine.{module}.check_datasets", stop)
    cfg = load_config(None, ["MODEL.DEVICE", "cuda:1", "DATASETS.TRAIN", "('nuclei_train',)"])
    with pytest.raises(Stop):
        MaskDINOTrainer(cfg)
    with pytest.raises(Stop):
        evaluate_weights(cfg, resume=False)
    assert gpus == [torch.device("cuda:1")] * 2


def test_peak_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {torch.device("cuda:0"): 0, torch.device("cuda:1"): 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak_memory_mb(torch.device("cuda:1")) == 3
    assert peak_memory_mb(torch.device("cpu")) > 10  # of this process, whatever GPUs there are
