"""From the images of a dataset to its numbers: a model that is judged image by image.

On a GPU the evaluators work in a thread beside the main one, which launches kernels alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator, inference_context
from detectron2.utils.logger import log_every_n_seconds
from torch import nn

from maskdino.ops.clock import Clock
from maskdino.system.words import counted

logger = logging.getLogger(__name__)

PENDING = 1  # batches whose results may wait while the next is computed; maps may be large
WARM_UP = 5  # batches whose times do not count, where there are more than twice as many
PARTS = {
    "data": "waiting for images",
    "network": "network",
    "results": "results",
    "evaluation": "run lengths and evaluators",
}


def evaluate_images(
    model: nn.Module, loader: Iterable[list[dict]], evaluator: DatasetEvaluator
) -> dict[str, Any]:
    """Evaluates a model on a dataset, and logs where the time goes.

    On a GPU the evaluator's `process` runs in a thread of its own, batch after batch in their
    order, while the next ones are computed. Its errors end the evaluation when the batch that is
    computed meanwhile is done; what waits for it is bounded.

    Returns:
        What the evaluator's `evaluate` says; empty where that is None, as in all but the main
        process.
    """
    number = len(loader)  # type: ignore[arg-type]
    logger.info("Evaluating %s of images.", counted(number, "batch"))
    evaluator.reset()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    hand_over = partial(_hand_over, evaluator, device)
    seconds: list[dict[str, float]] = []  # of each batch, by part
    beside = ThreadPoolExecutor(1, "evaluation") if device.type == "cuda" else None
    pending: deque[Future[dict[str, float]]] = deque()
    begin = time.perf_counter()
    try:
        with inference_context(model), torch.no_grad():
            for done, (inputs, waited) in enumerate(_timed(loader), start=1):
                with _names(inputs), Clock(device, "network") as clock:
                    outputs = model(inputs)
                if beside is None:
                    seconds.append(hand_over(inputs, outputs, clock, waited))
                else:
                    pending.append(beside.submit(hand_over, inputs, outputs, clock, waited))
                while pending and (len(pending) > PENDING or pending[0].done()):
                    seconds.append(pending.popleft().result())
                each = (time.perf_counter() - begin) / done
                left = f"{each * (number - done):.0f} s left"
                message = f"Evaluated {done} of {number}, {each:.3f} s each; {left}."
                log_every_n_seconds(logging.INFO, message, n=5, name=__name__)
        seconds += [batch.result() for batch in pending]
    finally:
        if beside is not None:
            beside.shutdown(cancel_futures=True)
    _log_times(seconds, time.perf_counter() - begin, beside=beside is not None)
    begin = time.perf_counter()
    results = evaluator.evaluate()
    logger.info("The dataset's numbers took %.1f s.", time.perf_counter() - begin)
    return {} if results is None else results


def _hand_over(
    evaluator: DatasetEvaluator,
    device: torch.device,
    inputs: list[dict],
    outputs: list[dict],
    clock: Clock,
    waited: float,
) -> dict[str, float]:
    """Gives a batch to the evaluator, in any thread; returns how many seconds each part took.

    `clock` measured the model, and `waited` are the seconds before its images came.
    """
    seconds = clock.seconds()
    begin = time.perf_counter()
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with _names(inputs), torch.no_grad(), there:
        evaluator.process(inputs, outputs)
    return {**seconds, "data": waited, "evaluation": time.perf_counter() - begin}


def _timed(loader: Iterable[list[dict]]) -> Iterator[tuple[list[dict], float]]:
    """Batches, and the seconds that each was waited for."""
    begin = time.perf_counter()
    for inputs in loader:
        yield inputs, time.perf_counter() - begin
        begin = time.perf_counter()


@contextmanager
def _names(inputs: list[dict]) -> Iterator[None]:
    """If an error ends the block, the log names the images of the batch."""
    try:
        yield
    except Exception:
        names = ", ".join(str(x.get("file_name", x.get("image_id"))) for x in inputs)
        logger.error("The evaluation ended at %s.", names)
        raise


def _log_times(seconds: list[dict[str, float]], total: float, *, beside: bool) -> None:
    if not seconds:
        return
    counted = seconds[WARM_UP:] if len(seconds) > 2 * WARM_UP else seconds
    means = {part: sum(s.get(part, 0.0) for s in counted) / len(counted) for part in PARTS}
    logger.info(
        "%d batches in %.1f s. Milliseconds of each%s: %s%s.",
        len(seconds),
        total,
        "" if counted is seconds else f", without the first {WARM_UP}",
        ", ".join(f"{PARTS[part]} {1000 * mean:.1f}" for part, mean in means.items()),
        " (beside the others)" if beside else "",
    )
