"""What the pretend device computes where the CPU has no such operation (`tests.pretend_device`).

Shape key: B images, M heads, Q queries, K keys, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskdino.ops.host import pack_masks

ATTENTION = "_scaled_dot_product_efficient_attention"


def compute(func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The results of an operation, of tensors of the CPU."""
    if name == "cudnn_batch_norm":
        reserve = torch.zeros(0, dtype=torch.uint8)
        return (*torch.ops.aten.native_batch_norm(*args), reserve)
    if func is getattr(torch.ops.aten.mm, "dtype", None):
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]))
    if name == "resized_packed_masks":
        masks, quality = torch.ops.maskdino.resized_masks(*args[:4], True, args[4])
        return pack_masks(masks), quality
    if name == ATTENTION:
        return _attention(*args[:4])
    if name == f"{ATTENTION}_backward":
        return _attention_backward(*args[:7])
    return func(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, M, Q, C), keys and values (B, M, K, C), a bias of the scores (.., Q, K)."""
    scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.float()
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)
    seed = torch.zeros((), dtype=torch.int64)
    # In memory as CUDA returns it: heads of a query beside each other.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, scores.logsumexp(-1), seed, seed.clone()


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor, None]:
    scale = query.shape[-1] ** -0.5
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias.float()
    weights = (scores - logsumexp[..., None]).exp()
    grad_weights = grad.float() @ value.float().transpose(-1, -2)
    grad_scores = weights * (grad_weights - (grad.float() * out.float()).sum(-1, keepdim=True))
    parts = (
        grad_scores @ key.float() * scale,
        grad_scores.transpose(-1, -2) @ query.float() * scale,
        weights.transpose(-1, -2) @ grad.float(),
    )
    of_query, of_key, of_value = (part.to(query.dtype) for part in parts)
    return of_query, of_key, of_value, None
