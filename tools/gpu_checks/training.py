"""Training on the device: is it sound, and how long does a step take."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial

import torch
from benchmarks.drawn import drawn_input, drawn_model
from detectron2.config import CfgNode

from gpu_checks.common import CONFIGS, R50, ROOT, TINY, Run, host_waits, measure
from maskdino.engine.compiled import compile_layers, replay_network
from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.engine.train_step import TrainStep
from maskdino.model import MaskDINO
from maskdino.modeling.training_graphs import CALLS_BEFORE

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}
SPEED_CASES = (  # precision, objects of an image, what is recomputed, and whether graphs replay
    ("bfloat16", 10, "none", False),
    ("bfloat16", 10, "none", True),
    ("bfloat16", 100, "none", False),
    ("bfloat16", 100, "none", True),
    ("float32", 10, "none", False),
    ("float32", 10, "none", True),
    ("bfloat16", 10, "cheap", False),
    ("bfloat16", 10, "cheap", True),
    ("bfloat16", 10, "all", False),
    ("bfloat16", 10, "all", True),
)
OBJECTS = ((5, 3), (0, 0), (0, 2), (60, 90))
NODE = "MODEL.MASK_DINO."
BOXES_ALONE = (NODE + "MASK_ON", "False")
BOXES_ALONE += (NODE + "QUERY_SELECTION.MASK_ENHANCED_ANCHORS", "none")
TASKS = {
    "instance": (TINY,),
    "panoptic": (CONFIGS.format("panoptic", "tiny"),),
    "semantic": (str(ROOT / "configs/nuclei/semantic/maskdino_tiny.yaml"),),
    "boxes": (TINY, *BOXES_ALONE),
}


def is_sound(run: Run) -> None:
    """Steps of each task with many, few and no objects: losses, and where the host waits."""
    for task, (file, *overrides) in TASKS.items():
        for precision in PRECISIONS if task == "instance" else ("bfloat16",):
            cfg, model = drawn_model(file, run.device, *overrides)
            step = train_step(run, cfg, model, precision)
            for objects in OBJECTS[:3] if run.dry else OBJECTS:
                case = {"task": task, "precision": precision, "objects": objects}
                with run.attempt(**case):
                    _one_step(run, step, case, cfg.MODEL.MASK_DINO.NUM_CLASSES)


def _one_step(run: Run, step: TrainStep, case: dict, classes: int) -> None:
    size = 96 if run.dry else 256
    batch = [drawn_input(size, size, number, classes) for number in case["objects"]]
    with host_waits(run) as waits:
        loss = step.run(iter([batch]))["total_loss"]
    found = {"loss": round(loss, 3), "ok": math.isfinite(loss)}
    run.say(**case, **found, waits=sum(waits.values()), where=dict(waits))


def speed(run: Run) -> None:
    """A step of the R50 model on two images of 1024 x 1024, and what recomputing saves."""
    for precision, objects, recompute, replays in SPEED_CASES[:1] if run.dry else SPEED_CASES:
        with run.attempt(precision=precision, objects=objects, recompute=recompute, graphs=replays):
            _speed(run, precision, objects, recompute=recompute, replays=replays)


def compiled(run: Run) -> None:
    """The same step with compiled layers (SOLVER.COMPILE)."""
    _speed(run, "bfloat16", 10, compiled=True)


def compile_ahead(run: Run) -> None:
    """Compiles what `compiled` runs, which then reads the compiler's cache."""
    _speed(run, "bfloat16", 10, compiled=True, timed=False)


def _speed(
    run: Run,
    precision: str,
    objects: int,
    *,
    recompute: str = "none",
    compiled: bool = False,
    replays: bool = False,
    timed: bool = True,
) -> None:
    size = 128 if run.dry else 1024
    cfg, model = drawn_model(TINY if run.dry else R50, run.device, NODE + "RECOMPUTE", recompute)
    step = train_step(run, cfg, model, precision)
    torch.manual_seed(5)
    batch = [drawn_input(size, size, objects) for _ in range(2)]
    case = {"precision": precision, "batch": 2, "size": size, "objects": objects}
    case |= {"recompute": recompute, "compiled": compiled, "graphs": 0}
    start = time.perf_counter()
    if compiled:
        compile_layers(model)
    if replays:
        replay_network(model)
    torch.manual_seed(0)
    first = step.run(iter([batch]))["total_loss"]
    case |= {"first_loss": round(first, 3), "first_s": round(time.perf_counter() - start, 1)}
    call = partial(step.run, itertools.repeat(batch))
    for _ in range(CALLS_BEFORE if replays else 0):
        call()
    if model.training_graphs is not None:
        case["graphs"] = len(model.training_graphs)  # 0: the log says why
    if timed:
        measure(run, case, call, repeats=8)
    else:
        call()
        run.say(**case)
    del step, model
    torch.cuda.empty_cache()


def train_step(run: Run, cfg: CfgNode, model: MaskDINO, precision: str) -> TrainStep:
    """The step that the trainer makes, in the precision asked for (on a CPU in float32)."""
    step = TrainStep(
        model,
        build_optimizer(cfg, model),
        build_gradient_clipper(cfg),
        accumulation_steps=1,
        mixed_precision=True,
    )
    step._dtype = PRECISIONS[precision] if run.on_gpu else None
    half = step._dtype is torch.float16
    step.grad_scaler = torch.amp.GradScaler(run.device, enabled=half)
    return step
