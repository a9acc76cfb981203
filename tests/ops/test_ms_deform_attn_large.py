"""Deformable attention of more than 2**31 elements, where 32-bit indices would overflow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.deform_attn_cases import slow_ms_deform_attn

HEIGHT, WIDTH, HEADS, CHANNELS = 2897, 2900, 8, 32
LINES = 4  # at the end, where indices are largest; all others are zero
TOLERANCE = 1.6e-2  # of bfloat16 results of size 1

pytestmark = pytest.mark.slow


def need_memory(gibibytes: float) -> None:
    """Skips a test where less memory is free."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        pytest.skip("this system does not tell its free memory in /proc/meminfo")
    lines = meminfo.read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free memory, there are {free:.1f}")


class Inputs:
    """Queries that look at the last lines of a large map, and the same for these lines alone."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lines = torch.randn(1, LINES * WIDTH, HEADS, CHANNELS, generator=generator).bfloat16()
        self.weights = torch.rand(1, 3, HEADS, 1, 2, generator=generator)
        self.grad_output = torch.randn(1, 3, HEADS * CHANNELS, generator=generator).bfloat16()
        self.in_lines = 0.2 + 0.7 * torch.rand(1, 3, HEADS, 1, 2, 2, generator=generator)
        # The same places in the whole map.
        x, y = self.in_lines.double().unbind(-1)
        self.in_map = torch.stack((x, (y * LINES + HEIGHT - LINES) / HEIGHT), dim=-1).float()

    def arguments(self, device: str) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """What the operator takes, with a value of 4 GiB."""
        value = torch.zeros(1, HEIGHT * WIDTH, HEADS, CHANNELS, dtype=torch.bfloat16, device=device)
        assert value.numel() > 2**31
        value[:, -LINES * WIDTH :] = self.lines.to(device)
        return value, [HEIGHT, WIDTH], self.in_map.to(device), self.weights.to(device)

    def check_forward(self, output: Tensor) -> None:
        """Compares with a loop over the samples in the last lines."""
        expected = slow_ms_deform_attn(self.lines, ((LINES, WIDTH),), self.in_lines, self.weights)
        torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=TOLERANCE)

    def check_backward(self, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Compares with the operator on the last lines alone."""
        expected = torch.ops.maskdino.ms_deform_attn_backward(
            self.grad_output, self.lines, [LINES, WIDTH], self.in_lines, self.weights
        )
        tail = grads[0][:, -LINES * WIDTH :].cpu()
        torch.testing.assert_close(tail, expected[0], rtol=0, atol=TOLERANCE)
        assert expected[0].abs().amax() > 0.1
        assert not grads[0][:, : -LINES * WIDTH].any()
        stretch = torch.tensor([1.0, HEIGHT / LINES])  # a step in y is this much longer
        places = grads[1].cpu() / stretch
        unit = expected[1].abs().amax()
        torch.testing.assert_close(places / unit, expected[1] / unit, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(grads[2].cpu(), expected[2], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.usefixtures("compiled")
def test_cpu() -> None:
    need_memory(12)
    inputs, threads = Inputs(), torch.get_num_threads()
    arguments = inputs.arguments("cpu")
    torch.set_num_threads(
        1
    )  # each thread takes 1 GiB for the head it works on, and 1 for gradients
    try:
        inputs.check_forward(torch.ops.maskdino.ms_deform_attn(*arguments))
        inputs.check_backward(
            torch.ops.maskdino.ms_deform_attn_backward(inputs.grad_output, *arguments)
        )
    finally:
        torch.set_num_threads(threads)


def test_emulated_cuda(emulated: object) -> None:
    need_memory(6)
    inputs = Inputs()
    inputs.check_forward(emulated.ms_deform_attn(*inputs.arguments("cpu")))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library", "compiled")
def test_gpu() -> None:
    inputs = Inputs()
    arguments = inputs.arguments("cuda")
    inputs.check_forward(torch.ops.maskdino.ms_deform_attn(*arguments))
    grad = inputs.grad_output.cuda()
    inputs.check_backward(torch.ops.maskdino.ms_deform_attn_backward(grad, *arguments))
