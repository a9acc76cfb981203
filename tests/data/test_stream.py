"""Tests of maskdino.data.stream."""

import itertools
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from maskdino.data import DataError
from maskdino.data.reading import read_image
from maskdino.data.stream import (
    ShuffledStream,
    TrainingData,
    _repeat_factors,
    build_test_data,
    build_training_data,
)
from maskdino.data.stream import comm as stream_comm

FACTORS = {
    "uniform": torch.ones(7),
    "repeated": torch.tensor([1.0, 2.5, 1.2, 1.0]),
    "subset": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("position", [0, 3, 7, 50])
def test_stream_can_be_entered_anywhere(name: str, position: int) -> None:
    stream = ShuffledStream(FACTORS[name], seed=1)
    whole = list(itertools.islice(stream.start_at(0), position + 20))
    assert list(itertools.islice(stream.start_at(position), 20)) == whole[position:]
    assert [at for at, _ in whole] == list(range(position + 20))


def test_epochs_are_shuffled_and_complete() -> None:
    stream = ShuffledStream(FACTORS["uniform"], seed=1)
    epochs = [stream.epoch(number).tolist() for number in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert epochs[0] != ShuffledStream(FACTORS["uniform"], seed=2).epoch(0).tolist()


def test_repeat_factors_are_expected_counts() -> None:
    stream = ShuffledStream(FACTORS["repeated"], seed=3)
    counts = sum(torch.bincount(stream.epoch(n), minlength=4) for n in range(400)) / 400
    torch.testing.assert_close(counts, FACTORS["repeated"], atol=0.1, rtol=0)


def test_empty_epoch_is_an_error() -> None:
    with pytest.raises(ValueError, match="No image to train on"):
        ShuffledStream(torch.zeros(3), seed=0)


def noisy_mapper(record: dict) -> dict:
    """Draws from every source of random numbers that augmentations use."""
    return {**record, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def data(num_workers: int = 0, batch_size: int = 4, accumulation_steps: int = 1) -> TrainingData:
    return TrainingData(
        [{"index": index} for index in range(7)],
        noisy_mapper,
        repeat_factors=torch.ones(7),
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        num_workers=num_workers,
        pin_memory=False,
    )


def take(source: TrainingData, iteration: int, number: int) -> list[list[dict]]:
    return list(itertools.islice(source.start(9, iteration), number))


def test_data_do_not_depend_on_workers_or_start() -> None:
    whole = take(data(), 0, 5)
    assert take(data(num_workers=2), 0, 5) == whole
    assert take(data(num_workers=2), 3, 2) == whole[3:]
    drawn = [image["drawn"] for batch in whole for image in batch]
    assert len(set(drawn)) == len(drawn)


def test_data_are_an_iterable() -> None:
    """As detectron2 expects of what `build_train_loader` returns."""
    found, expected = (list(itertools.islice(x, 3)) for x in (data(), data().start(0, 0)))
    assert str(found) == str(expected)


def test_data_of_processes_and_micro_batches_are_parts_of_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = take(data(), 0, 3)
    halves = take(data(accumulation_steps=2), 0, 6)
    assert [halves[i] + halves[i + 1] for i in (0, 2, 4)] == whole
    parts = []
    monkeypatch.setattr(stream_comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(stream_comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(data(), 0, 3))
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_micro_batches_can_be_entered_anywhere() -> None:
    whole = take(data(), 0, 6)
    quarters = take(data(accumulation_steps=4), 5, 4)
    assert sum(quarters, []) == whole[5]


def test_subsets_depend_on_the_seed(make_cfg: Callable) -> None:
    options = ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler")
    options += ("DATALOADER.RANDOM_SUBSET_RATIO", 0.3)
    records = [{"index": index} for index in range(100)]
    chosen = [
        tuple(_repeat_factors(make_cfg(*options, "SEED", seed), records).nonzero()[:, 0].tolist())
        for seed in (1, 2, 1, -1)  # -1: drawn anew for each run, but the subset stays
    ]
    assert [len(subset) for subset in chosen] == [30] * 4
    assert chosen[0] == chosen[2] and len(set(chosen)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_random_numbers_alone(num_workers: int) -> None:
    def draw() -> tuple:
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(4)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(4)
    take(data(num_workers), 0, 2)
    assert draw() == expected


def changing_mapper(record: dict) -> dict:
    """Counts in the record itself how often it was given."""
    record["given"] = record.get("given", 0) + 1
    return record


def test_mappers_may_change_their_records(make_cfg: Callable) -> None:
    """Each is read anew from one block of memory, which processes share."""
    DatasetCatalog.register("changed", lambda: [{"image_id": index} for index in range(2)])
    cfg = make_cfg("DATASETS.TRAIN", "('changed',)", "SOLVER.IMS_PER_BATCH", 2)
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    batches = take(build_training_data(cfg, changing_mapper), 0, 3)
    assert [image["given"] for batch in batches for image in batch] == [1] * 6


def process_mapper(_: dict) -> dict:
    """What is so in the process that loads."""
    return {"threads": torch.get_num_threads(), "interrupted": signal.getsignal(signal.SIGINT)}


def test_processes_that_load_have_one_thread_and_outlive_an_interrupt() -> None:
    source = data(num_workers=1, batch_size=1)
    source._mapper = process_mapper
    assert take(source, 0, 1) == [[{"threads": 1, "interrupted": signal.SIG_IGN}]]


def test_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 4; .* 1 process x 3"):
        data(accumulation_steps=3)


def broken_mapper(record: dict) -> dict:
    """Reads an image that is no image."""
    if record["index"] == 3:
        read_image(record["file_name"], "RGB")
    return record


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_loading_processes_lose_their_traceback(num_workers: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    records = [{"index": index, "file_name": str(path)} for index in range(7)]
    source = TrainingData(
        records,
        broken_mapper,
        repeat_factors=torch.ones(7),
        batch_size=1,
        accumulation_steps=1,
        num_workers=num_workers,
        pin_memory=False,
    )
    with pytest.raises(DataError) as caught:
        list(itertools.islice(source.start(9, 0), 7))
    assert re.fullmatch(
        rf"cannot read image {path}: .*\. Replace the file or remove its annotations",
        str(caught.value),
    )


def test_errors_of_an_evaluation_lose_their_traceback(make_cfg: Callable, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    records = [
        {"file_name": str(image), "image_id": i, "height": 30, "width": 40} for i in range(2)
    ]
    records[1]["file_name"] = str(tmp_path / "lost.png")
    DatasetCatalog.register("lost_test", lambda: records)
    batches = build_test_data(make_cfg("DATALOADER.NUM_WORKERS", 1), "lost_test")
    assert len(batches) == 2
    loaded = iter(batches)
    assert [entry["image_id"] for entry in next(loaded)] == [0]
    with pytest.raises(DataError, match=rf"^image {tmp_path}/lost\.png does not exist$"):
        next(loaded)
