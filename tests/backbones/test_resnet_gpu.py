"""Fused blocks of a ResNet on a GPU against detectron2's on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskdino.backbones.resnet import fuse_blocks
from maskdino.modeling.half_weights import half_weights
from maskdino.modeling.prepared import Prepared
from maskdino.ops import _library
from tests.backbones.test_resnet import drawn_blocks, images

CUDA = torch.device("cuda")
TYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (_library.serves("cuda") and _library.has("affine")):
        pytest.skip(_library.why_not("cuda") or "the library lacks the operator")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, half: float = 0.03) -> None:
    error = (found.float().cpu() - expected).norm() / expected.norm()
    assert error < (1e-3 if dtype == torch.float32 else half), error


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def step(blocks: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with half_weights(blocks, x.device, (), [blocks]):
        made = blocks(x)
    (made.float() * made.float()).sum().backward()
    return made.detach(), {name: p.grad for name, p in blocks.named_parameters()}


@pytest.mark.parametrize("dtype", TYPES)
def test_training(dtype: torch.dtype) -> None:
    """Channels-last in half precision; gradients lie as the weights do."""
    expected, expected_grads = step(drawn_blocks(), images())
    blocks = fuse_blocks(drawn_blocks()).to(CUDA)
    with autocast(dtype):
        made, grads = step(blocks, images().to(CUDA))
    close(made, expected, dtype)
    assert made.dtype == dtype
    if dtype == torch.bfloat16:
        assert made.is_contiguous(memory_format=torch.channels_last)
    for name, grad in grads.items():
        assert grad.is_contiguous()
        close(grad, expected_grads[name], dtype, half=0.25)  # some signs before ReLU differ


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES)
def test_inference_in_a_graph(dtype: torch.dtype) -> None:
    expected = drawn_blocks().eval()(images())
    blocks = fuse_blocks(drawn_blocks()).to(CUDA).eval()
    with autocast(dtype):
        network = Prepared().of(blocks, (), CUDA)
        assert network is not blocks
        x = images().to(CUDA)
        close(network(x), expected, dtype)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            network(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = network(x)
        x.zero_()
        graph.replay()
        zero = drawn_blocks().eval()(torch.zeros_like(images()))
        close(made, zero, dtype)
        x.copy_(images())
        graph.replay()
        close(made, expected, dtype)
