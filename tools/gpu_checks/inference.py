"""Inference on the device: time, equality with the CPU, CUDA graphs and compilation."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmarks.model import drawn_input
from torch import Tensor

from gpu_checks.common import (
    PRECISION_KEY,
    R50,
    TINY,
    Run,
    arithmetic,
    build_model,
    captured,
    config,
    host_waits,
    launches,
    milliseconds,
    peak_mebibytes,
    relative_error,
    wait,
)
from maskdino.structures import Predictions

# The network's input, and the size that results are asked for at: an image of COCO.
INPUT, OUTPUT = (800, 1088), (480, 640)
PARTS = ("class_logits", "boxes", "mask_embeddings")
TASKS = {"instance": R50, "panoptic": "coco/panoptic/maskdino_R50.yaml"}


def speed(run: Run) -> None:
    """Network alone, and from image to results, in each precision."""
    for task, name in TASKS.items():
        for precision in ("bfloat16", "tf32", "float32") if task == "instance" else ("bfloat16",):
            if run.dry and precision != "float32":
                continue
            _speed_of(run, task, TINY if run.dry else name, precision)


def _speed_of(run: Run, task: str, name: str, precision: str) -> None:
    cfg = config(run, name, PRECISION_KEY, precision)
    model, inputs = build_model(cfg, train=False), [_input(run)]
    images = model.preprocess(inputs).tensor

    def network() -> tuple[Predictions, Tensor | None]:
        with torch.no_grad(), arithmetic(run, precision):
            return model.predict(images)

    def results() -> list[dict]:
        with torch.no_grad():
            return model(inputs)

    case = {"task": task, "precision": precision}
    run.say(
        "inference_speed",
        **case,
        network_ms=milliseconds(run, network),
        results_ms=milliseconds(run, results),
        peak_mib=peak_mebibytes(run, results),
    )
    for part, call in (("network", network), ("results", results)):
        with host_waits(run) as waits:
            call()
        case |= {"part": part, "waits": sum(waits.values()), "where": dict(waits)}
        run.say("inference_speed", **case, **launches(run, call))


def parity(run: Run) -> None:
    """Predictions on the device, in each precision, against float32 on the CPU."""
    model = build_model(config(run, TINY if run.dry else R50), train=False)
    images = model.preprocess([_input(run)]).tensor
    found = {}
    for precision in ("float32", "tf32", "bfloat16", "float16") if run.on_gpu else ("float32",):
        with torch.no_grad(), arithmetic(run, precision):
            found[precision] = model.predict(images)
    model.cpu()
    with torch.no_grad():
        exact, exact_pixels = model.predict(images.cpu())
    for precision, (predictions, pixels) in found.items():
        pairs = {part: (getattr(predictions, part)[0], getattr(exact, part)[0]) for part in PARTS}
        errors = {part: relative_error(*pair) for part, pair in pairs.items()}
        errors["pixel_embedding"] = relative_error(pixels, exact_pixels)
        run.say(
            "parity",
            precision=precision,
            of={part: float(f"{error:.2g}") for part, error in errors.items()},
            same_queries=_same_queries(predictions, exact),
        )


def _same_queries(ours: Predictions, exact: Predictions) -> float:
    """Share of queries whose box is within a hundredth of the canvas of the exact one's."""
    distance = (ours.boxes[0].float().cpu() - exact.boxes[0]).abs().amax(-1)
    return round((distance < 0.01).float().mean().item(), 4)


def graphs(run: Run) -> None:
    """The network as it is, as one CUDA graph, and compiled, in bfloat16."""
    model = build_model(config(run, TINY if run.dry else R50), train=False)
    images = model.preprocess([_input(run)]).tensor

    def network(predict: Callable = model.predict) -> tuple[Predictions, Tensor | None]:
        autocast = torch.autocast(
            run.device, dtype=torch.bfloat16, enabled=run.on_gpu, cache_enabled=False
        )
        with torch.no_grad(), autocast:
            return predict(images)

    eager = network()
    run.say("graph_and_compile", what="eager", ms=milliseconds(run, network))
    if not run.on_gpu:
        return
    try:
        _captured(run, network, eager)
    except Exception as error:  # noqa: BLE001 - what follows is worth trying
        run.say("graph_and_compile", what="CUDA graph", FAILED=str(error)[:600])
    compiled = torch.compile(model.predict, dynamic=False)
    start = time.perf_counter()
    found = network(compiled)
    wait(run)
    run.say(
        "graph_and_compile",
        what="torch.compile",
        first_s=round(time.perf_counter() - start, 1),
        error=relative_error(found[0].class_logits, eager[0].class_logits),
        ms=milliseconds(run, lambda: network(compiled)),
    )
    _captured(run, lambda: network(compiled), eager, "torch.compile in a CUDA graph")


def _captured(
    run: Run, network: Callable, eager: tuple[Predictions, Tensor], what: str = "CUDA graph"
) -> None:
    graph, kept = captured(network)
    graph.replay()
    error = relative_error(kept[0].class_logits, eager[0].class_logits)
    run.say("graph_and_compile", what=what, error=error, ms=milliseconds(run, graph.replay))


def _input(run: Run) -> dict:
    height, width = (128, 160) if run.dry else INPUT
    drawn = drawn_input(height, width)
    del drawn["instances"]
    return drawn | dict(zip(("height", "width"), OUTPUT, strict=True))
