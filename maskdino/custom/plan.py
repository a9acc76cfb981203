"""From a summary of the data and of the machine to a whole configuration."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from maskdino.custom.annotations import Summary
from maskdino.custom.request import Request
from maskdino.data import DataError
from maskdino.engine.hooks import peak_memory_mb
from maskdino.engine.trainer import MaskDINOTrainer
from maskdino.structures import PackedMasks
from maskdino.system.precision import mixed_precision_dtype

ASSUMED_FREE_MB = 4096  # where the system does not tell
TRAIN_NAME, VALIDATION_NAME = "custom_train", "custom_val"
MEMORY_SHARE = 0.8  # of the free memory: images differ in their number of objects
MIN_SIZE, MAX_SIZE_GPU, MAX_SIZE_CPU = 256, 1024, 512  # pixels of the longest side
SIZE_STEP = 32
VIEWS = 24_000  # images seen in a training, where the number of epochs leaves the choice
EPOCHS = (12, 300)  # least and most
CPU_SECONDS = 3600  # a training without a GPU is planned to take about this long
EVALUATIONS = 20  # at most, in a training
STEPS_PER_EPOCH = 8  # small data: rather smaller batches than fewer steps


@dataclass(frozen=True)
class Machine:
    """What a training may use.

    Attributes:
        device: "cuda" or "cpu".
        memory_mb: free memory of each device, in MB.
        processes: number of processes, each with a device of its own if there are GPUs.
    """

    device: str
    memory_mb: float
    processes: int


@dataclass(frozen=True)
class Cost:
    """What a training step costs on this machine.

    Attributes:
        fixed_mb: memory whatever the batch.
        image_mb: memory of each image more.
        image_seconds: time of each image.
    """

    fixed_mb: float
    image_mb: float
    image_seconds: float


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
    """Sets what follows from the data: classes, tasks, image size, queries (in place)."""
    node = cfg.MODEL.MASK_DINO
    node.NUM_CLASSES = len(summary.counts)
    node.CLASS_NAMES = list(summary.counts)
    node.MASK_ON = summary.has_masks and not request.boxes_only
    if not node.MASK_ON:
        node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS = "none"
        if node.DENOISING.MODE == "boxes_and_masks":
            node.DENOISING.MODE = "boxes"
    node.TEST.INSTANCE_ON, node.TEST.PANOPTIC_ON, node.TEST.SEMANTIC_ON = True, False, False
    queries = max(node.QUERY_SELECTION.NUM_QUERIES, _round_up(2 * summary.most_objects, 50))
    node.QUERY_SELECTION.NUM_QUERIES = queries
    cfg.TEST.DETECTIONS_PER_IMAGE = max(100, _round_up(summary.most_objects, 50))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN_NAME,), (VALIDATION_NAME,)
    cfg.INPUT.DATASET_MAPPER_NAME = "instance"
    cfg.MODEL.DEVICE = machine.device
    # Images without objects teach what the background looks like.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cores = os.cpu_count() or 1
    cfg.DATALOADER.NUM_WORKERS = max(1, min(8 if machine.device == "cuda" else 1, cores // 2))
    most = MAX_SIZE_GPU if machine.device == "cuda" else MAX_SIZE_CPU
    size = request.image_size or min(max(summary.longest_side, MIN_SIZE), most)
    _set_size(cfg, _round_up(size, SIZE_STEP))


def _set_size(cfg: CfgNode, size: int) -> None:
    """The longest side is `size`, in training at a jitter of 1 as in evaluation."""
    cfg.INPUT.LSJ.ENABLED = True
    cfg.INPUT.LSJ.SIZE = [size, size]
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = size


def fit_memory(cfg: CfgNode, summary: Summary, machine: Machine, request: Request) -> Cost:
    """Measures a training step, and makes images smaller until one fits (in place).

    Raises:
        DataError: not even small images fit, or the size that was asked for does not.
    """
    while True:
        size = cfg.INPUT.LSJ.SIZE[0]
        cost = measure(cfg, summary.most_objects)
        if cost is not None and _fitting(cost, machine) >= 1:
            return cost
        if request.image_size or size <= MIN_SIZE:
            needed = (
                "more than there is" if cost is None else f"{cost.fixed_mb + cost.image_mb:.0f}"
            )
            raise DataError(
                f"one image of {size} pixels does not fit: {needed} of {machine.memory_mb:.0f} MB; "
                "give a smaller --image-size or a --config-file of a smaller model"
            )
        _set_size(cfg, max(MIN_SIZE, size * 3 // 4 // SIZE_STEP * SIZE_STEP))


def _fitting(cost: Cost, machine: Machine) -> int:
    """Images per process whose training step fits in memory."""
    room = MEMORY_SHARE * machine.memory_mb - cost.fixed_mb
    return int(room / max(cost.image_mb, 1.0))


def apply_schedule(
    cfg: CfgNode, summary: Summary, machine: Machine, request: Request, cost: Cost | None
) -> int:
    """Sets batch size, learning rate and schedule (in place), and returns the number of epochs.

    The configuration's own batch size and learning rate belong together: with another batch size,
    the rate follows its square root, as suits Adam.

    Args:
        cfg: configuration to which `apply_data` was applied.
        summary: of the training data.
        machine: where it will train.
        request: what was asked for.
        cost: measured; may be None if epochs and batch size were asked for.
    """
    solver = cfg.SOLVER
    batch, epochs = request.batch_size, request.epochs
    if cost is not None:
        batch = batch or _batch_size(solver.IMS_PER_BATCH, summary, machine, cost)
        epochs = epochs or _epochs(summary, machine, cost)
    if batch is None or epochs is None:
        raise ValueError("epochs and batch size must be asked for where no cost was measured")
    solver.BASE_LR = float(f"{solver.BASE_LR * math.sqrt(batch / solver.IMS_PER_BATCH):.3g}")
    solver.IMS_PER_BATCH = batch
    per_epoch = max(1, math.ceil(summary.images / batch))
    iterations = epochs * per_epoch
    solver.MAX_ITER = iterations
    decay = int(0.9 * iterations)
    solver.STEPS = (decay,) if decay else ()
    solver.WARMUP_ITERS = min(100, iterations // 10)
    # Whole epochs, so that an evaluation tells of equally many views of each image.
    period = per_epoch * math.ceil(epochs / EVALUATIONS)
    cfg.TEST.EVAL_PERIOD = solver.CHECKPOINT_PERIOD = period
    return epochs


def _batch_size(usual: int, summary: Summary, machine: Machine, cost: Cost) -> int:
    """A power of two for each process, at most the configuration's own batch in all."""
    most = min(
        _fitting(cost, machine),
        usual // machine.processes,
        max(2, summary.images // STEPS_PER_EPOCH) // machine.processes,
    )
    return machine.processes * 2 ** int(math.log2(max(most, 1)))


def _epochs(summary: Summary, machine: Machine, cost: Cost) -> int:
    least, most = EPOCHS
    epochs = min(max(round(VIEWS / summary.images), least), most)
    if machine.device == "cpu":
        affordable = CPU_SECONDS / (cost.image_seconds * summary.images)
        epochs = min(epochs, max(1, round(affordable)))
    return epochs


def measure(cfg: CfgNode, objects: int) -> Cost | None:
    """Makes training steps on random images, in a process of its own; None if it was killed.

    Args:
        cfg: configuration to which `apply_data` was applied.
        objects: in each image.
    """
    # Not forked: the peak memory of a fork begins with its parent's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, cfg.clone(), objects).result()
        except (BrokenProcessPool, torch.cuda.OutOfMemoryError):
            return None


def _measure(cfg: CfgNode, objects: int) -> Cost:
    """Steps with one image, then with two: what the second one adds is an image's share."""
    model = MaskDINOTrainer.build_model(cfg).train()
    optimizer = MaskDINOTrainer.build_optimizer(cfg, model)
    device = torch.device(cfg.MODEL.DEVICE)
    dtype = mixed_precision_dtype(cfg.SOLVER.AMP.ENABLED, device)
    peaks = []
    for number in (1, 1, 2):  # the first one fills caches and makes the optimizer's state
        batch = [_random_image(cfg, objects) for _ in range(number)]
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = sum(model(batch).values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peaks.append(peak_memory_mb(device))
    # Not less than a share of the first image's: allocators round, and keep what was freed.
    image_mb = max(peaks[2] - peaks[1], 0.05 * peaks[1])
    return Cost(peaks[1] - image_mb, image_mb, seconds / 2)


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


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
