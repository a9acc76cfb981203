"""Small building blocks: multi-layer perceptron and sine embeddings."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 10000.0  # of the sine embeddings


_holders: list[list[Tensor]] = []


@contextmanager
def holding_constants() -> Iterator[list[Tensor]]:
    """Collects the constants used inside: whoever keeps the list keeps them in memory.

    A CUDA graph reads them where they were, whatever the caches have dropped since.
    """
    held: list[Tensor] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders.remove(held)


def constant_of_shape(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Caches a tensor that depends on sizes and device alone; traced programs compute it anew."""
    cached = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def constant(*args: object) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*args)
        # Whoever asks first, the tensor must be of use in training too.
        with torch.inference_mode(False), torch.no_grad():
            value = cached(*args)
        for held in _holders:
            held.append(value)
        return value

    return constant


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(
        self, *, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int
    ) -> None:
        super().__init__()
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        layers = [nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True)]
        # What differs between inputs must not drown in biases, or all queries begin with one mask.
        for layer in layers:
            nn.init.zeros_(layer.bias)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.xavier_uniform_(layers[-1].weight)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def sine_embedding(angles: Tensor, channels: int) -> Tensor:
    """Sines and cosines of a coordinate at wavelengths that grow geometrically, interleaved.

    Args:
        angles: (...) in radians.
        channels: an even number.

    Returns:
        (..., channels).
    """
    x = angles[..., None] / _wavelengths(channels, angles.device)
    return torch.stack([x.sin(), x.cos()], dim=-1).flatten(-2)


@constant_of_shape
def _wavelengths(channels: int, device: torch.device) -> Tensor:
    """(channels / 2,), in turns."""
    exponents = 2 * torch.arange(channels // 2, dtype=torch.float32, device=device) / channels
    return TEMPERATURE**exponents


def box_sine_embedding(boxes_cxcywh: Tensor, channels: int) -> Tensor:
    """Positional embedding of boxes (DAB-DETR), of y, x, w, h: (..., 4) to (..., 4 * channels)."""
    x, y, width, height = (2 * math.pi * boxes_cxcywh.float()).unbind(-1)
    angles = torch.stack([y, x, width, height], dim=-1)
    return sine_embedding(angles, channels).flatten(-2)


@constant_of_shape
def map_sine_embedding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Positional embedding of the cells of a map, row by row, half for y and half for x.

    Returns:
        (height * width, channels).
    """
    y, x = (
        2 * math.pi * torch.arange(1, size + 1, dtype=torch.float32, device=device) / (size + 1e-6)
        for size in (height, width)
    )
    y = sine_embedding(y, channels // 2)[:, None].expand(-1, width, -1)
    x = sine_embedding(x, channels // 2)[None].expand(height, -1, -1)
    return torch.cat([y, x], dim=-1).flatten(0, 1)
