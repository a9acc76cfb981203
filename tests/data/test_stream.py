"""Tests of maskdino.data.stream."""

import itertools
import random

import numpy as np
import pytest
import torch

from maskdino.data.stream import ShuffledStream, TrainingData
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


def test_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 4; .* 1 processes x 3"):
        data(accumulation_steps=3)
