"""What happens around training steps: checkpoints, resources, the console's lines."""

import datetime
import logging
import sys

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventWriter, get_event_storage

from maskdino.checkpoint.ema import WeightAverage
from maskdino.engine.metrics_file import WINDOW

logger = logging.getLogger(__name__)


class PeriodicCheckpoint(HookBase):
    """Writes checkpoints every `period` iterations and at the end, but never of broken weights.

    Raises:
        ValueError: if `period` is not positive.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, period: int) -> None:
        if period < 1:
            raise ValueError(f"SOLVER.CHECKPOINT_PERIOD is {period}; use at least 1.")
        self._checkpointer = checkpointer
        self._period = period

    def after_step(self) -> None:
        """Saves if it is time, once the step has proved to be sound (in all processes)."""
        iteration = self.trainer.iter
        last = iteration == self.trainer.max_iter - 1
        if last or (iteration + 1) % self._period == 0:
            self.trainer.check_gradient()
            name = "model_final" if last else f"model_{iteration:07d}"
            self._checkpointer.save(name, iteration=iteration)


class SaveAverage(HookBase):
    """Writes the averaged weights, at the end, as a model of its own, to a folder of its own."""

    def __init__(self, checkpointer: DetectionCheckpointer, average: WeightAverage) -> None:
        self._checkpointer = checkpointer
        self._average = average

    def after_train(self) -> None:
        """Saves after the last step, also in a resumed run that has no step left to make."""
        if self.trainer.iter >= self.trainer.max_iter:
            with self._average.applied():
                self._checkpointer.save("model_final")


class Evaluate(hooks.EvalHook):
    """Evaluates every so many iterations, and after a training that came to its end."""

    def after_train(self) -> None:
        """Evaluates; not after an error or Ctrl-C in the last iteration."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class Resources(HookBase):
    """Records throughput (images per second) and peak memory (see `peak_memory_mb`).

    Args:
        batch_size: images of all processes per iteration.
        device: of this process.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._batch_size = batch_size
        self._device = device

    def after_step(self) -> None:
        """Reads the time of the step from the timer, which must come before this hook."""
        storage = self.trainer.storage
        seconds = storage.latest().get("time")
        if seconds is not None:
            storage.put_scalar("images_per_second", self._batch_size / seconds[0])
        storage.put_scalar("max_memory_mb", peak_memory_mb(self._device), smoothing_hint=False)


def peak_memory_mb(device: torch.device) -> float:
    """Returns the peak so far, in MB: what tensors took of a GPU, or the process of the host.

    0 where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class ConsoleWriter(EventWriter):
    """Prints one compact line: progress, the main losses, learning rate, speed, memory.

    Main losses are those whose name does not extend another's (`loss_class`, not
    `loss_class_3`): the others are in TensorBoard and `metrics.json`.

    Args:
        max_iter: iterations in all, for the estimated time of arrival (ETA).
    """

    def __init__(self, max_iter: int) -> None:
        self._max_iter = max_iter
        self._last = -1  # iteration that was written

    def write(self) -> None:
        """Writes the line of the present iteration, once; nothing after the last one."""
        storage = get_event_storage()
        if not self._last < storage.iter < self._max_iter:
            return
        self._last = storage.iter
        histories = storage.histories()
        parts = [f"iter {storage.iter + 1}/{self._max_iter}"]
        if "time" in histories:
            step = histories["time"].median(WINDOW)
            left = int(histories["time"].global_avg() * (self._max_iter - storage.iter - 1))
            storage.put_scalar("eta_seconds", left, smoothing_hint=False)
            parts += [f"eta {datetime.timedelta(seconds=left)}", f"{step:.3g} s/iter"]
        for name in ("total_loss", *_main_losses(histories)):
            if name in histories:
                parts.append(f"{name} {histories[name].median(WINDOW):.4g}")
        for name, form in (
            ("lr", "lr {:.3g}"),
            ("images_per_second", "{:.3g} images/s"),
            ("data_time", "data {:.3g} s"),
            ("max_memory_mb", "memory {:.0f} MB"),
        ):
            if name in histories:
                parts.append(form.format(histories[name].latest()))
        logger.info("  ".join(parts))


def _main_losses(names: dict) -> list[str]:
    losses = sorted(name for name in names if name.startswith("loss"))
    return [name for name in losses if not any(name.startswith(f"{other}_") for other in losses)]
