"""One optimizer step: micro-batches, mixed precision, clipping, and the numbers for the log.

Shape key: L logged losses.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from maskdino.engine.solver import GradientClipper
from maskdino.system.errors import NotFiniteError
from maskdino.system.precision import mixed_precision_dtype, training_precision

logger = logging.getLogger(__name__)

# Steps in a row that float16 may leave out. Each halves the scale of the losses, which begins at
# 2 ** 16: after 25 it is below 1, and what still overflows is not the scale's doing.
MAX_LEFT_OUT = 25


class LossReader:
    """Brings the losses of a batch to the host in one copy, without waiting for the backward pass.

    The copy is started between forward and backward; by the time the backward pass is enqueued,
    it is done. With several processes it carries this process's losses and the mean over all.

    Args:
        losses: scalars by name; the same names in every process.
        extra: one more scalar that travels along, equal in all processes.
        told: whether this process was told to end; travels along where there are several.

    Attributes:
        ends: once read, whether any of several processes was told to end.
    """

    def __init__(self, losses: dict[str, Tensor], extra: Tensor, *, told: bool = False) -> None:
        self.ends = False
        self._names = sorted(losses)
        own = torch.stack([losses[name] for name in self._names]).detach().float()  # (L,)
        mean = own
        if comm.get_world_size() > 1:
            mean = torch.cat([own, own.new_full((1,), float(told))]) / comm.get_world_size()
            torch.distributed.all_reduce(mean)
        values = torch.cat([own, mean, extra.detach().float().reshape(1)])
        self._host = values.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            # Of the device of the losses, which need not be the current one.
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Returns this process's losses, their mean over processes, and the extra scalar."""
        if self._copied is not None:
            self._copied.synchronize()
        values = self._host.tolist()
        count = len(self._names)
        own = dict(zip(self._names, values[:count], strict=True))
        mean = dict(zip(self._names, values[count : 2 * count], strict=True))
        self.ends = any(values[2 * count : -1])
        return own, mean, values[-1]


class TrainStep:
    """Trains a model that turns a batch into a dict of weighted scalar losses.

    Gradients are the mean over micro-batches (and processes) of the gradient of each one's summed
    losses. This is the gradient of the whole batch if losses are means over images; where they are
    normalized otherwise (Mask DINO: by the mean number of objects per process of a micro-batch), it
    is that normalization which applies.

    Attributes:
        model: the model, possibly wrapped for several processes.
        optimizer: its optimizer.
        grad_scaler: scales losses in float16 training; does nothing otherwise.
        told: says whether this process was told to end.
        ends: whether any of several processes was, by the same step in all of them; None before the
            first step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        clip_gradients: GradientClipper,
        *,
        accumulation_steps: int,
        mixed_precision: bool,
    ) -> None:
        """Puts the model in training mode.

        Raises:
            ValueError: if `accumulation_steps` is not positive.
        """
        if accumulation_steps < 1:
            raise ValueError(f"SOLVER.ACCUMULATION_STEPS is {accumulation_steps}; use at least 1.")
        self.model = model.train()
        self.optimizer = optimizer
        self._clip_gradients = clip_gradients
        self._accumulation_steps = accumulation_steps
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._dtype = mixed_precision_dtype(mixed_precision, self._device)
        logger.info("Training computes in %s.", training_precision(self._dtype, self._device))
        half = self._dtype is torch.float16
        self.grad_scaler = torch.amp.GradScaler(self._device.type, enabled=half)
        self._gradient_norm = torch.zeros((), device=self._device)
        self._images: list[str] = []
        self._overflow: dict[str, float] = {}  # losses of the last step that are not finite
        self._left_out = 0  # steps in a row
        self.told: Callable[[], bool] = lambda: False
        self.ends: bool | None = None

    def run(self, batches: Iterator[list[dict]]) -> dict[str, float]:
        """Takes the next micro-batches and makes one step.

        Returns:
            Scalars for the log: every loss and `total_loss` (means over micro-batches and
            processes; none if float16 left the step out), `data_time` in seconds,
            `gradient_norm` of the step before.

        Raises:
            FloatingPointError: if a loss is not finite (the weights are then those before the
                step), or the gradient of the step before was not; in float16 only if
                `MAX_LEFT_OUT` steps in a row were left out for it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        data_time, norm = 0.0, 0.0
        last_images, self._images = self._images, []
        last_overflow, self._overflow = self._overflow, {}
        for micro in range(self._accumulation_steps):
            start = time.perf_counter()
            batch = next(batches)
            data_time += time.perf_counter() - start
            self._images += [str(image.get("file_name", "?")) for image in batch]
            reader = self._backward(batch, synchronize=micro == self._accumulation_steps - 1)
            own, mean, norm = reader.read()
            self.ends = reader.ends  # of the last micro-batch, like the gradient
            if micro == 0:
                self._check_norm(norm, last_images, last_overflow)
            self._check_losses(own, mean)
            for name, value in mean.items():
                sums[name] = sums.get(name, 0.0) + value / self._accumulation_steps
        if self._overflow:
            self._spoil_gradient()
            sums = {}
        self._step()
        totals = {"total_loss": sum(sums.values())} if sums else {}
        return {**sums, **totals, "data_time": data_time, "gradient_norm": norm}

    def check_gradient(self) -> None:
        """Waits for the last step, and raises FloatingPointError if its gradient was not finite.

        In float16 such a step has not changed the weights, and nothing is raised.
        """
        if not self.grad_scaler.is_enabled():
            self._check_norm(float(self._gradient_norm), self._images, {})

    def _backward(self, batch: list[dict], synchronize: bool) -> LossReader:
        alone: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not synchronize:
            alone = self.model.no_sync()
        with alone:
            with torch.autocast(
                self._device.type, dtype=self._dtype, enabled=self._dtype is not None
            ):
                losses = self.model(batch)
            reader = LossReader(losses, self._gradient_norm, told=self.told())
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            self.grad_scaler.scale(total / self._accumulation_steps).backward()
        return reader

    def _step(self) -> None:
        self.grad_scaler.unscale_(self.optimizer)
        self._gradient_norm = self._clip_gradients(self._parameters)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_losses(self, own: dict[str, float], mean: dict[str, float]) -> None:
        """Raises if this process's losses are not finite; in float16 notes those of any process."""
        bad = _not_finite(own)
        if self.grad_scaler.is_enabled():
            self._overflow |= bad or _not_finite(mean)
        elif bad:
            raise NotFiniteError(
                f"Losses that are not finite: {bad}, on the images {self._images}. No step was "
                "made, and the last checkpoint stays. Look at these images and their annotations, "
                "or lower SOLVER.BASE_LR."
            )

    def _spoil_gradient(self) -> None:
        """Makes the gradient infinite, so that the scaler leaves the step out.

        An infinite loss may have a finite gradient. The means over processes decide, so that all
        processes do the same.
        """
        logger.warning(
            "Losses that are not finite in float16: %s, on the images %s. The step is left out.",
            self._overflow,
            self._images,
        )
        gradient = next(p.grad for p in self._parameters if p.grad is not None)
        gradient.fill_(float("inf"))

    def _check_norm(self, norm: float, images: list[str], overflow: dict[str, float]) -> None:
        """Checks the last step: the norm of its gradient, equal in all processes."""
        if math.isfinite(norm):
            self._left_out = 0
            return
        if not self.grad_scaler.is_enabled():
            raise NotFiniteError(
                f"The norm of the gradient was {norm} on the images {images}, though every loss "
                "was finite. The last checkpoint stays; resume from it with a lower SOLVER.BASE_LR."
            )
        # In float16 an overflow is expected now and then: the scaler leaves such a step out.
        self._left_out += 1
        if self._left_out >= MAX_LEFT_OUT:
            losses = f"losses {overflow}" if overflow else "finite losses, but not gradients,"
            raise NotFiniteError(
                f"Float16 overflowed in {self._left_out} steps in a row, the last time with "
                f"{losses} on the images {images}. The last checkpoint stays. Look at these images "
                "and their annotations, lower SOLVER.BASE_LR, or train without SOLVER.AMP.ENABLED."
            )


def _not_finite(losses: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in losses.items() if not math.isfinite(value)}


def distribute(model: nn.Module) -> nn.Module:
    """The model wrapped for several processes, or as it is in one."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
