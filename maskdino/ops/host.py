"""Between host and device with few waits.

Whoever reads a number of a GPU waits until everything before it is computed, and the GPU then
stands idle until the next launch arrives. So computations that need numbers on the host ask for
them together (`run_steps`), and masks travel with eight pixels in a byte.

Shape key: N masks, H, W pixels, P bytes of a packed mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from maskdino.ops.constants import is_traced

Result = TypeVar("Result")
# A computation that stops where it needs tensors on the host: it yields them, and is sent them. One
# that yields none lets others begin.
Steps = Generator[Sequence[Tensor], list[Tensor], Result]

PIXELS_AT_ONCE = 1 << 26  # of masks that are packed at one time
# Multiplies eight bytes that are 0 or 1, as one integer, to their bits in the highest byte.
GATHERED_BITS = 0x0102040810204080


def run_steps(computations: Sequence[Steps]) -> list:
    """Runs computations, round by round, so that what they ask for in one round is one copy.

    Nothing is waited for while one of them can go on.

    Args:
        computations: all on one device.

    Returns:
        The result of each.
    """
    results: list = [None] * len(computations)
    answers: dict[int, list[Tensor] | None] = dict.fromkeys(range(len(computations)))
    requests: dict[int, Sequence[Tensor]] = {}
    while answers:
        for number, answer in answers.items():
            try:
                steps = computations[number]
                requests[number] = next(steps) if answer is None else steps.send(answer)
            except StopIteration as end:
                requests.pop(number, None)
                results[number] = end.value
        answers = {number: [] for number, asked in requests.items() if not asked}
        if not answers:
            copies = iter(to_host([tensor for asked in requests.values() for tensor in asked]))
            answers = {
                number: list(itertools.islice(copies, len(asked)))
                for number, asked in requests.items()
            }
    return results


def asked_early(tensor: Tensor) -> Steps[Tensor]:
    """The tensor on the host. Of a GPU no more is waited for than its copy.

    Other computations begin meanwhile, whose kernels keep the GPU busy while the host goes on.
    """
    if not tensor.is_cuda or is_traced():
        (copy,) = yield (tensor,)
        return copy
    on_its_way = OnItsWay([tensor])
    yield ()
    return on_its_way.arrived()[0]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, from another device in one copy."""
    if len(tensors) < 2 or all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.cpu() for tensor in tensors]
    return _in_one_copy(tensors)


class OnItsWay:
    """A copy of tensors of a GPU to the host, which goes on as before until it looks at them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = tensors[0].device
        self._copies = _in_one_copy(tensors, non_blocking=True)
        # Of the device that copies, which need not be the current one.
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self._device))

    def arrived(self) -> list[Tensor]:
        """Waits for the copies, in any thread, and returns them."""
        # Without it, a thread's first call of CUDA makes a context on the first GPU.
        with torch.cuda.device(self._device):
            self._copied.synchronize()
        return self._copies


def _in_one_copy(tensors: Sequence[Tensor], *, non_blocking: bool = False) -> list[Tensor]:
    # Wide types first: each part then begins where its type may.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    parts = [tensors[i].reshape(-1).view(torch.uint8) for i in order]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    whole = whole.to("cpu", non_blocking=non_blocking)
    copies = whole.split([len(part) for part in parts])
    found = {
        i: copy.view(tensors[i].dtype).view(tensors[i].shape)
        for i, copy in zip(order, copies, strict=True)
    }
    return [found[i] for i in range(len(tensors))]


def to_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers (n,) on a device; the host does not wait for the copy."""
    host = torch.empty(len(numbers), dtype=dtype, pin_memory=device.type == "cuda")
    host.numpy()[:] = numbers
    return host.to(device, non_blocking=True)


def true_first(flags: Tensor) -> Tensor:
    """(n,) bool to indices (n,): those of True in ascending order, then the others.

    Unlike `nonzero`, whose result has a size that the host must wait for.
    """
    return flags.to(torch.uint8).argsort(descending=True, stable=True)


def pack_masks(masks: Tensor) -> Tensor:
    """Masks (N, H, W) bool to bits (N, P) uint8, column by column as COCO's RLE counts.

    The first of eight pixels is in the lowest bit, as devices and their hosts are little-endian.
    """
    at_once = max(1, PIXELS_AT_ONCE // max(1, masks.shape[1:].numel()))
    return torch.cat([_packed(part) for part in masks.split(at_once)])


def _packed(masks: Tensor) -> Tensor:
    number, height, width = masks.shape
    pixels = height * width
    flat = masks.new_zeros(number, -(-pixels // 8) * 8)
    flat[:, :pixels].view(number, width, height).copy_(masks.transpose(1, 2))
    return (flat.view(torch.int64) * GATHERED_BITS).bitwise_right_shift_(56).to(torch.uint8)
