"""The device that the GPU tests run on, and arithmetic that can be compared with the CPU's.

MASKDINO_TEST_DEVICE names another device than "cuda": with "cpu" all these tests run without a
GPU, but for those that need CUDA itself. This shows that the tests are right, not that a GPU is:

    MASKDINO_TEST_DEVICE=cpu python -m pytest tests/gpu
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read when cuBLAS starts: without it, deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tested side of each comparison runs."""
    return torch.device(os.environ.get("MASKDINO_TEST_DEVICE") or "cuda")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of tests that ask for CUDA's own tools."""
    if device.type != "cuda":
        pytest.skip("needs CUDA itself")
    return device


@pytest.fixture(scope="session")
def second_gpu(device: torch.device) -> torch.device:
    """A GPU that is not the current one."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """Multiplies without TF32, which has ten bits; afterwards as PyTorch does by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True
