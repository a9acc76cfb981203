"""How much memory a training step takes on this machine, and how long it takes.

Memory is that of the fullest image: what does not fit ends a training. Time is that of the images
as they come, with their reading and augmentation: what counts is the sum.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances

from maskdino.engine.evaluating import as_evaluated
from maskdino.engine.hooks import peak_memory_mb
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.structures import PackedMasks
from maskdino.system.allocator import keep_large_blocks
from maskdino.system.precision import mixed_precision_dtype

T = TypeVar("T")
WARM_UP = 2  # first steps, which allocate memory and wait for the first images
STEPS = (6, 40)  # least and most that are timed
SECONDS = 20.0  # after which no further step is timed
EVALUATED = 4  # batches of the timed evaluation, after the first
STATISTICS = Path("/proc/stat")  # of Linux
FULL = 0.9  # share of all cores' time from which programs wait for one another


@dataclass(frozen=True)
class Memory:
    """What a training step needs."""

    fixed_mb: float  # MB, whatever the size of the batch
    image_mb: float  # MB more for each image


@dataclass(frozen=True)
class Pace:
    """How fast this machine is."""

    step: float  # seconds of a training step
    evaluation: float  # seconds of an evaluation
    others: float = 0.0  # cores that other programs took while that was measured


def total_seconds(iterations: int, eval_period: int, step: float, evaluation: float) -> float:
    """How long a training takes, its evaluations included; a period of 0: one, at the end."""
    return iterations * step + math.ceil(iterations / (eval_period or iterations)) * evaluation


class StopWatch(HookBase):
    """Times the steps of a training, and ends it when enough were timed.

    Attributes:
        times: when the training began, and when each step ended.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Takes the clock, in seconds."""
        self._clock = clock
        self.times: list[float] = []

    def before_train(self) -> None:
        """Begins."""
        self.times = [self._clock()]

    def after_step(self) -> None:
        """Ends the training after some steps or seconds."""
        self.times.append(self._clock())
        timed = self.times[WARM_UP:]
        least, most = STEPS
        enough = len(timed) > least and timed[-1] - timed[0] >= SECONDS
        if enough or len(timed) > most:
            self.trainer.stopped = True

    def step(self) -> float:
        """The mean time of a step, which is the one whose sum is that of the training."""
        first = min(WARM_UP, len(self.times) - 2)  # of very short trainings all steps are timed
        return (self.times[-1] - self.times[first]) / (len(self.times) - 1 - first)


class _Trial(MaskDINOTrainer):
    """Trains until its pace is known, and writes nothing."""

    def build_hooks(self) -> list[HookBase]:
        self.watch = StopWatch()
        return [self.watch]


def measure_pace(cfg: CfgNode, register: Callable[[], None], images: int) -> Pace | None:
    """Trains for some seconds, and evaluates a few of `images`, in a process of its own.

    None if there was not enough memory. The function that registers the datasets is pickled.
    """
    before = _processor_seconds()
    pace = _in_own_process(_pace, cfg.clone(), register, images)
    wall, busy, own = (y - x for x, y in zip(before, _processor_seconds(), strict=True))
    if pace is None or busy < FULL * wall * (os.cpu_count() or 1):
        return pace
    return replace(pace, others=max(busy - own, 0.0) / wall)


def _processor_seconds() -> tuple[float, float, float]:
    """Time, busy seconds of all cores so far (0: not known), and this program's part of them."""
    own = os.times()
    lines = STATISTICS.read_text().splitlines() if STATISTICS.is_file() else []
    user, nice, system, _, _, *interrupts = map(int, lines[0].split()[1:9]) if lines else [0] * 8
    busy = (user + nice + system + sum(interrupts)) / (os.sysconf("SC_CLK_TCK") if lines else 1)
    return time.perf_counter(), busy, sum(own[:4])


def _pace(cfg: CfgNode, register: Callable[[], None], images: int) -> Pace:
    logging.disable(logging.INFO)
    register()
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = WARM_UP + STEPS[1] + 1, ()
        cfg.SOLVER.WARMUP_ITERS = 0
        trainer = _Trial(cfg)
        trainer.train()
    loader = MaskDINOTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    model = as_evaluated(cfg, trainer.model.eval())
    times, evaluated = [], 0
    with torch.inference_mode():
        for batch in islice(loader, 1 + EVALUATED):
            model(batch)  # results are on the host: nothing is left to wait for
            times.append(time.perf_counter())
            evaluated += len(batch)
    spread = len(times) > 1
    image_seconds = (times[-1] - times[0]) / (evaluated - len(batch)) if spread else 0.0
    return Pace(trainer.watch.step(), images * image_seconds)


def measure_memory(cfg: CfgNode, objects: int) -> Memory | None:
    """Makes training steps on random images with so many objects; None if memory was short."""
    return _in_own_process(_memory, cfg.clone(), objects)


def _in_own_process(function: Callable[..., T], *arguments: object) -> T | None:
    """Calls a function; None if memory was short."""
    # Not forked: the peak memory of a fork begins with its parent's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, torch.cuda.OutOfMemoryError):
            return None


def _memory(cfg: CfgNode, objects: int) -> Memory:
    """Steps with one image, then with two: what the second one adds is an image's share."""
    model = MaskDINOTrainer.build_model(cfg).train()
    optimizer = MaskDINOTrainer.build_optimizer(cfg, model)
    device = torch.device(cfg.MODEL.DEVICE)
    keep_large_blocks(device)  # as trainers do, which peaks depend on
    dtype = mixed_precision_dtype(cfg.SOLVER.AMP.ENABLED, device)
    peaks = []
    for number in (1, 1, 2):  # the first one fills caches and makes the optimizer's state
        batch = [_random_image(cfg, objects) for _ in range(number)]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = sum(model(batch).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        peaks.append(peak_memory_mb(device))
    # Not less than a share of the first image's: allocators round, and keep what was freed.
    image_mb = max(peaks[2] - peaks[1], 0.05 * peaks[1])
    return Memory(peaks[1] - image_mb, image_mb)


def _random_image(cfg: CfgNode, objects: int) -> dict:
    """Noise, and as many square objects, of an eighth of the image, as the fullest image has."""
    height, width = cfg.INPUT.LSJ.SIZE
    side = width // 8
    low = (torch.rand(objects, 2) * torch.tensor([width - side, height - side])).floor()
    instances = Instances((height, width))
    instances.gt_classes = torch.randint(cfg.MODEL.MASK_DINO.NUM_CLASSES, (objects,))
    instances.gt_boxes = Boxes(torch.cat([low, low + side], dim=1))
    if cfg.MODEL.MASK_DINO.MASK_ON:
        masks = torch.zeros(objects, height, width, dtype=torch.bool)
        for mask, (x, y) in zip(masks, low.int().tolist(), strict=True):
            mask[y : y + side, x : x + side] = True
        instances.gt_masks = PackedMasks.from_bool(masks)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "file_name": "noise"}
