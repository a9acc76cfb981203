"""From a summary of the data and of the machine to a whole configuration."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode

from maskdino.custom.annotations import Summary
from maskdino.custom.measure import Memory, Pace, measure_memory
from maskdino.custom.request import TASKS, Request
from maskdino.data import DataError
from maskdino.data.records import TRAIN_NAME, VALIDATION_NAME

ASSUMED_FREE_MB = 4096  # where the system does not tell
MEMORY_SHARE = 0.8  # of the free memory: images differ in their number of objects
MIN_SIZE, MAX_SIZE_GPU, MAX_SIZE_CPU = 256, 1024, 512  # pixels of the longest side
SIZE_STEP = 32
SMALL_OBJECT, ENLARGED_OBJECT = 20, 25  # pixels that the network sees of half of the objects
MOST_ZOOM = 4  # 25 slices of an image
LEAST_SLICE = 48  # pixels that TEST.SLICES.SIZE may have
VIEWS = 24_000  # images seen in a training, where the number of epochs leaves the choice
EPOCHS = (12, 300)  # least and most
CPU_MINUTES = 60  # a training without a GPU is planned to take about this long
EVALUATIONS = 20  # at most, in a training
SEMANTIC_QUERIES = 100  # enough for the classes of an image
RARE = 0.05  # mixing of fewer images than this adds no queries, as the fullest images add none
STEPS_PER_EPOCH = 8  # small data: rather smaller batches than fewer steps


@dataclass(frozen=True)
class Machine:
    """What a training may use."""

    device: str  # "cuda" or "cpu"
    memory_mb: float  # free memory of each device, in MB
    processes: int  # number of processes, each with a device of its own if there are GPUs


def find_machine(processes: int) -> Machine:
    """Looks at the GPU, or else at the memory of this machine."""
    if torch.cuda.is_available():
        return Machine("cuda", torch.cuda.mem_get_info()[0] / 2**20, processes)
    return Machine("cpu", _free_memory_mb() / processes, processes)


def _free_memory_mb() -> float:
    """Of the machine and, in a container, of its share."""
    names = getattr(os, "sysconf_names", {})  # Windows has none
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else ASSUMED_FREE_MB * 2**20
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # knows which cached pages can be given up
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free / 2**20


def apply_data(cfg: CfgNode, summary: Summary, machine: Machine, request: Request) -> None:
    """Sets what follows from the data: classes, tasks, image size, queries (in place).

    Raises:
        DataError: only boxes are asked for, which the data are not about.
    """
    if request.boxes_only and summary.task != "instance":
        raise DataError(f"--boxes-only is of objects, but the data teach the task {summary.task}")
    node = cfg.MODEL.MASK_DINO
    node.NUM_CLASSES = len(summary.counts)
    node.CLASS_NAMES, node.STUFF_CLASSES = list(summary.counts), list(summary.stuff)
    node.MASK_ON = summary.has_masks and not request.boxes_only
    if not node.MASK_ON:
        node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS = "none"
        if node.DENOISING.MODE == "boxes_and_masks":
            node.DENOISING.MODE = "boxes"
    for task in TASKS:
        node.TEST[f"{task.upper()}_ON"] = task == summary.task
    cfg.INPUT.DATASET_MAPPER_NAME = summary.task
    least = node.QUERY_SELECTION.NUM_QUERIES
    if summary.task == "semantic":  # as ADE20K's models, whose classes have no objects
        least = min(least, SEMANTIC_QUERIES)
        node.MATCHER.DECOUPLE_STUFF_BOXES = node.LOSS.DECOUPLE_STUFF_BOXES = False
    if summary.task != "instance":  # as in the paper
        node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS = "none"
    # Not of the one fullest image, which all others would pay for.
    queries = max(least, _round_up(2 * mixed_objects(cfg, summary.many_objects), 50))
    node.QUERY_SELECTION.NUM_QUERIES = queries
    cfg.TEST.DETECTIONS_PER_IMAGE = max(100, _round_up(summary.most_objects, 50))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN_NAME,), (VALIDATION_NAME,)
    cfg.MODEL.DEVICE = machine.device
    # Images without objects teach what the background looks like.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cores = os.cpu_count() or 1
    cfg.DATALOADER.NUM_WORKERS = max(1, min(8 if machine.device == "cuda" else 1, cores // 2))
    most = MAX_SIZE_GPU if machine.device == "cuda" else MAX_SIZE_CPU
    size = request.image_size or min(max(summary.longest_side, MIN_SIZE), most)
    _set_size(cfg, _round_up(size, SIZE_STEP))


def enlarge_small_objects(cfg: CfgNode, summary: Summary, request: Request) -> None:
    """Small objects are learned from enlarged parts of images, and predicted in such slices.

    In place, and after `fit_memory`: what is small follows from the size that fits. A step costs
    what it costs with whole images.
    """
    side = summary.object_side * cfg.INPUT.LSJ.SIZE[0]
    if request.image_size or not 0 < side < SMALL_OBJECT:
        return
    zoom = min(ENLARGED_OBJECT / side, MOST_ZOOM)
    cfg.INPUT.LSJ.MIN_SCALE *= zoom
    cfg.INPUT.LSJ.MAX_SCALE *= zoom
    cfg.TEST.SLICES.SIZE = max(LEAST_SLICE, round(summary.longest_side / zoom))


def mixed_objects(cfg: CfgNode, number: int) -> int:
    """Objects of a training image that INPUT.MOSAIC and COPY_PASTE make of images with `number`."""
    pasting, mosaic = cfg.INPUT.COPY_PASTE, cfg.INPUT.MOSAIC
    total = float(number)
    if mosaic.PROBABILITY > RARE:
        # Four images, each of which shows as many objects as have room in a quarter of the mosaic.
        total *= 4 * min(1.0, 1 / (mosaic.MIN_SCALE + mosaic.MAX_SCALE)) ** 2
    if pasting.PROBABILITY > RARE:
        total += min(number, pasting.MAX_OBJECTS)
    return math.ceil(total)


def _set_size(cfg: CfgNode, size: int) -> None:
    """The longest side is `size`, in training at a jitter of 1 as in evaluation."""
    cfg.INPUT.LSJ.ENABLED = True
    cfg.INPUT.LSJ.SIZE = [size, size]
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = size


def fit_memory(cfg: CfgNode, summary: Summary, machine: Machine, request: Request) -> Memory:
    """Measures the memory of a step, and makes images smaller until one fits (in place).

    Raises:
        DataError: not even small images fit, or the size that was asked for does not.
    """
    while True:
        size = cfg.INPUT.LSJ.SIZE[0]
        memory = measure_memory(cfg, mixed_objects(cfg, summary.most_objects))
        if memory is not None and _fitting(memory, machine) >= 1:
            return memory
        if request.image_size or size <= MIN_SIZE:
            needed = (
                "more than there is"
                if memory is None
                else f"{memory.fixed_mb + memory.image_mb:.0f}"
            )
            raise DataError(
                f"one image of {size} pixels does not fit: {needed} of {machine.memory_mb:.0f} MB; "
                "give a smaller --image-size or a --config-file of a smaller model"
            )
        _set_size(cfg, max(MIN_SIZE, size * 3 // 4 // SIZE_STEP * SIZE_STEP))


def _fitting(memory: Memory, machine: Machine) -> int:
    """Images per process whose training step fits in memory."""
    room = MEMORY_SHARE * machine.memory_mb - memory.fixed_mb
    return int(room / max(memory.image_mb, 1.0))


def apply_batch(
    cfg: CfgNode, summary: Summary, machine: Machine, request: Request, memory: Memory | None
) -> None:
    """Sets batch size and learning rate, after `apply_data` (in place)."""
    batch = request.batch_size
    if batch is None:
        assert memory is not None  # it is measured unless batch size and epochs were asked for
        batch = _batch_size(cfg.SOLVER.IMS_PER_BATCH, summary, machine, memory)
    set_batch(cfg, batch)


def set_batch(cfg: CfgNode, batch: int) -> None:
    """Changes the batch size, and the learning rate with it (in place).

    The configuration's own belong together: with another batch size, the rate follows its square
    root, as suits Adam.
    """
    solver = cfg.SOLVER
    solver.BASE_LR = float(f"{solver.BASE_LR * math.sqrt(batch / solver.IMS_PER_BATCH):.3g}")
    solver.IMS_PER_BATCH = batch


def _batch_size(usual: int, summary: Summary, machine: Machine, memory: Memory) -> int:
    """A power of two for each process, at most the configuration's own batch in all."""
    most = min(
        _fitting(memory, machine),
        usual // machine.processes,
        max(2, summary.images // STEPS_PER_EPOCH) // machine.processes,
    )
    return machine.processes * 2 ** int(math.log2(max(most, 1)))


def apply_schedule(
    cfg: CfgNode, summary: Summary, machine: Machine, request: Request, pace: Pace | None
) -> int:
    """Sets the schedule, after `apply_batch` (in place), and returns the number of epochs."""
    solver = cfg.SOLVER
    per_epoch = epoch_length(cfg, summary)
    epochs = request.epochs or _epochs(summary, machine, request, pace, per_epoch)
    iterations = epochs * per_epoch
    solver.MAX_ITER = iterations
    decay = int(0.9 * iterations)
    solver.STEPS = (decay,) if decay else ()
    solver.WARMUP_ITERS = min(100, iterations // 10)
    # Whole epochs, so that an evaluation tells of equally many views of each image.
    period = per_epoch * math.ceil(epochs / EVALUATIONS)
    cfg.TEST.EVAL_PERIOD = solver.CHECKPOINT_PERIOD = period
    return epochs


def epoch_length(cfg: CfgNode, summary: Summary) -> int:
    """Iterations that show about as many images as there are."""
    return max(1, math.ceil(summary.images / cfg.SOLVER.IMS_PER_BATCH))


def _epochs(
    summary: Summary, machine: Machine, request: Request, pace: Pace | None, per_epoch: int
) -> int:
    least, most = EPOCHS
    epochs = min(max(round(VIEWS / summary.images), least), most)
    minutes = request.minutes or (CPU_MINUTES if machine.device == "cpu" else None)
    if minutes is None:
        return epochs
    assert pace is not None  # likewise
    epoch = per_epoch * pace.step
    # Each epoch is evaluated, unless they are many.
    few = 60 * minutes / (epoch + pace.evaluation)
    many = (60 * minutes - EVALUATIONS * pace.evaluation) / epoch
    affordable = max(1, round(max(many, EVALUATIONS) if few > EVALUATIONS else few))
    return affordable if request.minutes else min(epochs, affordable)


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
