"""Inference on the device: time, equality with the CPU, CUDA graphs and compilation."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from benchmarks.drawn import drawn_input, drawn_model
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gpu_checks.common import (
    CONFIGS,
    DEFAULTS,
    PRECISION_KEY,
    R50,
    TINY,
    Run,
    arithmetic,
    captured,
    measure,
    milliseconds,
    relative_error,
)
from maskdino.model import MaskDINO
from maskdino.structures import Predictions

# The network's input, and the size that results are asked for at: an image of COCO.
INPUT, OUTPUT = (800, 1088), (480, 640)
PARTS = ("class_logits", "boxes", "mask_embeddings")
CASES = (
    ("instance", "bfloat16"),
    ("instance", "tf32"),
    ("instance", "float32"),
    ("panoptic", "bfloat16"),
)


def speed(run: Run) -> None:
    """The prepared network, as a CUDA graph and without, and from image to results."""
    for task, precision in (("instance", "float32"),) if run.dry else CASES:
        file, keys = CONFIGS.format(task, "R50"), (PRECISION_KEY, precision)
        model, inputs, images = _drawn(run, file, *keys)
        eager, *_ = _drawn(run, file, *keys, "MODEL.MASK_DINO.TEST.CUDA_GRAPHS", "False")
        calls = {
            "network": partial(model.predict_precisely, images),
            "results": partial(model, inputs),
            "network without graph": partial(eager.predict_precisely, images),
        }
        for part, call in calls.items():
            with torch.no_grad(), arithmetic(run, DEFAULTS):
                measure(run, {"task": task, "precision": precision, "part": part}, call)


def parity(run: Run) -> None:
    """Predictions on the device, in each precision, against float32 on the CPU."""
    model, _, images = _drawn(run, R50)
    found = {}
    for precision in ("float32", "tf32", "bfloat16", "float16") if run.on_gpu else ("float32",):
        with torch.no_grad(), arithmetic(run, precision):
            found[precision] = model.predict(images)
    model.cpu()
    with torch.no_grad():
        exact, exact_pixels = model.predict(images.cpu())
    for precision, (predictions, pixels) in found.items():
        predictions = predictions.of_image(0).map(lambda x: x.float().cpu())
        order = _paired(predictions, exact.of_image(0))
        paired = predictions.map(lambda x, order=order: x[order])
        errors = {
            part: relative_error(getattr(paired, part), getattr(exact, part)[0]) for part in PARTS
        }
        errors["pixel_embedding"] = relative_error(pixels, exact_pixels)
        distance = (paired.boxes - exact.boxes[0]).abs().amax(-1)
        same = round((distance < 0.01).float().mean().item(), 4)
        moved = int((order != torch.arange(len(order))).sum())
        run.say(precision=precision, of=errors, same_queries=same, moved=moved)


def _paired(ours: Predictions, exact: Predictions) -> Tensor:
    """(Q,) index of the query of ours that is each of the exact ones.

    Queries stand in the order of their tokens' scores, of which some are equal but for rounding.
    """
    cost = torch.cdist(exact.boxes, ours.boxes) + torch.cdist(exact.class_logits, ours.class_logits)
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def graphs(run: Run) -> None:
    """The network as it is, as one CUDA graph, and compiled, in bfloat16."""
    network, compiled = _networks(run)
    eager = network()
    run.say(what="eager", ms=milliseconds(run, network))
    if not run.on_gpu:
        return
    with run.attempt(what="CUDA graph"):
        _captured(run, network, eager)
    _first(run, compiled, eager)
    run.say(what="torch.compile", ms=milliseconds(run, compiled))
    _captured(run, compiled, eager, "torch.compile in a CUDA graph")


def compile_ahead(run: Run) -> None:
    """Compiles what `graphs` runs, which then reads the compiler's cache."""
    network, compiled = _networks(run)
    if run.on_gpu:
        _first(run, compiled, network())
    else:
        run.say(skipped="needs a GPU")


def _networks(run: Run) -> tuple[Callable, Callable]:
    model, _, images = _drawn(run, R50)

    def network(predict: Callable = model.predict) -> tuple[Predictions, Tensor | None]:
        autocast = torch.autocast(
            run.device, dtype=torch.bfloat16, enabled=run.on_gpu, cache_enabled=False
        )
        with torch.no_grad(), autocast:
            return predict(images)

    return network, partial(network, torch.compile(model.predict, dynamic=False))


def _first(run: Run, compiled: Callable, eager: tuple[Predictions, Tensor]) -> None:
    start = time.perf_counter()
    found = compiled()
    run.wait()
    first_s = round(time.perf_counter() - start, 1)
    error = relative_error(found[0].class_logits, eager[0].class_logits)
    run.say(what="first call of torch.compile", first_s=first_s, error=error)


def _captured(
    run: Run, network: Callable, eager: tuple[Predictions, Tensor], what: str = "CUDA graph"
) -> None:
    graph, kept = captured(network)
    graph.replay()
    error = relative_error(kept[0].class_logits, eager[0].class_logits)
    run.say(what=what, error=error, ms=milliseconds(run, graph.replay))


def _drawn(run: Run, file: str, *overrides: str) -> tuple[MaskDINO, list[dict], Tensor]:
    """A model (dry: the tiny one), its inputs, and these as the network takes them."""
    model = drawn_model(TINY if run.dry else file, run.device, *overrides)[1].eval()
    drawn = drawn_input(*((128, 160) if run.dry else INPUT))
    del drawn["instances"]
    inputs = [drawn | dict(zip(("height", "width"), OUTPUT, strict=True))]
    return model, inputs, model.preprocess(inputs).tensor
