"""Training on the device: is it sound, and how long does a step take."""

from __future__ import annotations

import itertools
import math

import torch
from benchmarks.model import drawn_input

from gpu_checks.common import (
    R50,
    TINY,
    Run,
    build_model,
    config,
    free_memory,
    host_waits,
    launches,
    milliseconds,
    peak_mebibytes,
)
from maskdino.engine.solver import build_gradient_clipper, build_optimizer
from maskdino.engine.train_step import TrainStep
from maskdino.model import MaskDINO

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}
OBJECTS = ((5, 3), (0, 0), (0, 2), (60, 90))
TASKS = {
    "instance": TINY,
    "panoptic": "coco/panoptic/maskdino_tiny.yaml",
    "semantic": "nuclei/semantic/maskdino_tiny.yaml",
    "boxes": TINY,
}
BOXES_ALONE = (
    "MODEL.MASK_DINO.MASK_ON",
    "False",
    "MODEL.MASK_DINO.QUERY_SELECTION.MASK_ENHANCED_ANCHORS",
    "none",
)


def is_sound(run: Run) -> None:
    """Steps of each task with many, few and no objects: losses, and where the host waits."""
    size = 96 if run.dry else 256
    for task, name in TASKS.items():
        overrides = BOXES_ALONE if task == "boxes" else ()
        for precision in PRECISIONS if task == "instance" else ("bfloat16",):
            cfg = config(run, name, *overrides)
            step = train_step(run, cfg, build_model(cfg, train=True), PRECISIONS[precision])
            classes = cfg.MODEL.MASK_DINO.NUM_CLASSES
            for objects in OBJECTS[:3] if run.dry else OBJECTS:
                batch = [drawn_input(size, size, number, classes) for number in objects]
                case = {"task": task, "precision": precision, "objects": objects}
                _one_step(run, step, batch, case)


def _one_step(run: Run, step: TrainStep, batch: list[dict], case: dict) -> None:
    try:
        with host_waits(run) as waits:
            scalars = step.run(iter([batch]))
    except Exception as error:  # noqa: BLE001 - the next case is worth trying
        run.say("training_is_sound", **case, FAILED=f"{type(error).__name__}: {error}"[:600])
        return
    loss = scalars["total_loss"]
    run.say(
        "training_is_sound",
        **case,
        loss=round(loss, 3),
        ok=math.isfinite(loss),
        waits=sum(waits.values()),
        where=dict(waits),
    )


def speed(run: Run) -> None:
    """A step of the R50 model on two images of 1024 x 1024 with ten objects each."""
    size = 128 if run.dry else 1024
    for precision in ("bfloat16",) if run.dry else ("bfloat16", "float32"):
        cfg = config(run, TINY if run.dry else R50)
        step = train_step(run, cfg, build_model(cfg, train=True), PRECISIONS[precision])
        batch = [drawn_input(size, size, 10), drawn_input(size, size, 10)]
        _measure(run, "training_speed", {"precision": precision, "size": size}, step, batch)
        del step
        free_memory(run)
    if run.dry:
        return
    cfg = config(run, R50)
    step = train_step(run, cfg, build_model(cfg, train=True), torch.bfloat16)
    batch = [drawn_input(size, size, 100), drawn_input(size, size, 100)]
    case = {"precision": "bfloat16", "size": size, "objects": 100}
    _measure(run, "training_speed", case, step, batch)


def _measure(run: Run, name: str, case: dict, step: TrainStep, batch: list[dict]) -> None:
    def call() -> dict:
        return step.run(itertools.repeat(batch))

    ms = milliseconds(run, call, repeats=2 if run.dry else 8)
    run.say(name, **case, batch=len(batch), ms=ms, peak_mib=peak_mebibytes(run, call))
    with host_waits(run) as waits:
        call()
    case = {**case, "batch": len(batch), "waits": sum(waits.values()), "where": dict(waits)}
    run.say(name, **case, **launches(run, call))


def train_step(run: Run, cfg: object, model: MaskDINO, dtype: torch.dtype | None) -> TrainStep:
    """The step that the trainer makes, in the precision asked for (on a CPU in float32)."""
    step = TrainStep(
        model,
        build_optimizer(cfg, model),
        build_gradient_clipper(cfg),
        accumulation_steps=1,
        mixed_precision=True,
    )
    step._dtype = dtype if run.on_gpu else None
    half = step._dtype is torch.float16
    step.grad_scaler = torch.amp.GradScaler(run.device, enabled=half)
    return step
