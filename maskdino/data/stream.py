"""Training data as a stream that can be entered anywhere.

What the model sees at position p of the stream, random augmentation included, is a function of the
seed and p alone: not of the number of processes or workers, nor of where a run was interrupted.
Iteration k takes positions [k * batch, (k + 1) * batch).
"""

import itertools
import logging
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskdino.data.mappers import build_test_mapper
from maskdino.data.mixing import build_mixing
from maskdino.data.reading import DataError
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

Mapper = Callable[[dict], Any]  # from a dataset dict to what the model reads
Location = tuple[int, int]  # position in the stream, index in the dataset


class Purpose(IntEnum):
    """What a derived seed is for: equal numbers for different purposes give different seeds."""

    EPOCH = 1
    SAMPLE = 2
    MODEL = 3
    STEP = 4


def derive_seed(seed: int, purpose: Purpose, *parts: int) -> int:
    """Returns a 63-bit seed that depends on all the non-negative integers, in order."""
    high, low = np.random.SeedSequence((purpose, seed, *parts)).generate_state(2).tolist()
    return high << 31 | low >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random numbers on the CPU depend on ``seed`` alone; outside, nothing has changed."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class ShuffledStream:
    """An endless stream of dataset indices, shuffled epoch by epoch.

    Args:
        repeat_factors: (N,) how often each index appears in an epoch; a fraction is the
            probability of one more appearance.
        seed: non-negative integer; the stream is a function of it.

    Raises:
        ValueError: if an epoch would be empty.
    """

    def __init__(self, repeat_factors: Tensor, seed: int) -> None:
        if not float(repeat_factors.sum()) > 0:
            raise ValueError(
                f"No image to train on: {counted(len(repeat_factors), 'image')}, none repeated."
            )
        self._whole = repeat_factors.floor()
        self._fraction = repeat_factors - self._whole
        self._seed = seed

    def epoch(self, number: int) -> Tensor:
        """Returns the shuffled int64 indices of epoch ``number``."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, Purpose.EPOCH, number))
        more = torch.rand(len(self._whole), generator=generator) < self._fraction
        indices = torch.arange(len(self._whole)).repeat_interleave((self._whole + more).long())
        return indices[torch.randperm(len(indices), generator=generator)]

    def start_at(self, position: int) -> Iterator[Location]:
        """Yields (position, dataset index) from ``position`` on, without end."""
        number, begin = self._find(position)
        for epoch in itertools.count(number):
            for index in self.epoch(epoch)[max(position - begin, 0) :].tolist():
                yield position, index
                position += 1
            begin = position

    def _find(self, position: int) -> tuple[int, int]:
        """Returns the epoch that holds a position, and the position at which it begins."""
        if not bool(self._fraction.any()):
            size = int(self._whole.sum())
            return position // size, position // size * size
        number = begin = 0
        while position >= begin + (size := len(self.epoch(number))):  # epochs differ in length
            number, begin = number + 1, begin + size
        return number, begin


class _BatchSampler(Sampler[list[Location]]):
    """The part of each micro-batch that falls to one process."""

    def __init__(self, stream: ShuffledStream, start: int, batch_size: int) -> None:
        self._stream, self._start, self._batch_size = stream, start, batch_size
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[list[Location]]:
        locations = self._stream.start_at(self._start)
        begin = self._rank * self._batch_size
        while True:
            shared = list(itertools.islice(locations, self._batch_size * self._world_size))
            yield shared[begin : begin + self._batch_size]


class _MappedDataset(Dataset[dict]):
    """Maps dataset dicts, each with random numbers of its position in the stream."""

    def __init__(self, records: Sequence[dict], mapper: Mapper, seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, location: Location) -> dict:
        position, index = location
        with seeded(derive_seed(self._seed, Purpose.SAMPLE, position)):
            return self._mapper(self._records[index])


def _mapped(mapper: Mapper, record: dict) -> dict | DataError:
    """What the mapper makes of a record; a `DataError` is returned, for `LoadedBatches`."""
    try:
        return mapper(record)
    except DataError as error:
        return error


class LoadedBatches:
    """Batches from processes that load them; an error that `_mapped` returned there is raised here.

    PyTorch itself would raise one whose text is the traceback of that process.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self._loader:
            for item in batch:
                if isinstance(item, DataError):
                    raise item
            yield batch


class TrainingData:
    """The training images of a configuration, as a stream that starts where it is told to.

    As a plain iterable it starts at the beginning, with seed 0. The batch is of all processes and
    micro-batches, which must divide it; see `ShuffledStream` for the factors.
    """

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Mapper,
        *,
        repeat_factors: Tensor,
        batch_size: int,
        accumulation_steps: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        shares = comm.get_world_size() * accumulation_steps
        if batch_size < 1 or batch_size % shares:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}; it must be a positive multiple of "
                f"{counted(comm.get_world_size(), 'process')} x {accumulation_steps} "
                "SOLVER.ACCUMULATION_STEPS."
            )
        self._records = records
        self._mapper = partial(_mapped, mapper)
        self._repeat_factors = repeat_factors
        self._batch_size = batch_size
        self._share = batch_size // shares
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[list[dict]]:
        return self.start(seed=0, iteration=0)

    def start(self, seed: int, iteration: int) -> Iterator[list[dict]]:
        """Yields this process's micro-batches from ``iteration`` on, without end."""
        stream = ShuffledStream(self._repeat_factors, seed)
        loader = DataLoader(
            _MappedDataset(self._records, self._mapper, seed),
            batch_sampler=_BatchSampler(stream, iteration * self._batch_size, self._share),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_left_alone_by_signals,
            pin_memory=self._pin_memory,
            # Of its own, so that workers draw nothing from the generator of the training.
            generator=torch.Generator().manual_seed(seed),
        )
        return iter(LoadedBatches(loader))


def build_training_data(cfg: CfgNode, mapper: Mapper) -> TrainingData:
    """Builds the training data of ``cfg.DATASETS.TRAIN``.

    Raises:
        ValueError: see `TrainingData` and `build_mixing`, or if ``DATALOADER.SAMPLER_TRAIN`` is
            unknown.
    """
    listed = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        logger.info("Images keep the order of the stream: no grouping by aspect ratio.")
    repeat_factors = _repeat_factors(cfg, listed)
    records = DatasetFromList(listed, copy=False)  # one block of memory for all processes
    return TrainingData(
        records,
        build_mixing(cfg, mapper, records, repeat_factors),
        repeat_factors=repeat_factors,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


def build_test_data(cfg: CfgNode, dataset_name: str) -> LoadedBatches:
    """Builds the images of a dataset, one by one, as the evaluation sees them.

    Those that are evaluated in slices (TEST.SLICES) are left in their files.
    """
    mapper = _left_in_file if cfg.TEST.SLICES.SIZE else build_test_mapper(cfg)
    loader = build_detection_test_loader(cfg, dataset_name, mapper=partial(_mapped, mapper))
    return LoadedBatches(loader)


def _left_in_file(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "annotations"}


def _repeat_factors(cfg: CfgNode, records: list[dict]) -> Tensor:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return torch.ones(len(records))
    if name == "RepeatFactorTrainingSampler":
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
    if name == "RandomSubsetTrainingSampler":
        size = max(int(len(records) * cfg.DATALOADER.RANDOM_SUBSET_RATIO), 1)
        generator = torch.Generator().manual_seed(max(cfg.SEED, 0))
        chosen = torch.randperm(len(records), generator=generator)[:size]
        return torch.zeros(len(records)).index_fill_(0, chosen, 1.0)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}; use 'TrainingSampler', "
        "'RepeatFactorTrainingSampler' or 'RandomSubsetTrainingSampler'."
    )


def _left_alone_by_signals(_worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal, and SIGTERM often all of a job. The training still
    # needs its workers, and ends them itself: only a second SIGTERM ends a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
