"""Frozen batch norm as one operation in training."""

import operator

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn


class FrozenNorm(FrozenBatchNorm2d):
    """Detectron2's frozen batch norm, with the same buffers, whose scale and shift are kept.

    They follow from buffers that change only when weights are loaded; made anew in every training
    step, they are most of the kernels of a backbone.
    """

    @classmethod
    def of(cls, norm: FrozenBatchNorm2d) -> "FrozenNorm":
        """The same norm; the buffers are those of `norm`."""
        ours = cls(norm.num_features, norm.eps)
        for name, buffer in norm.named_buffers():
            setattr(ours, name, buffer)
        return ours.train(norm.training)

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self._made_of: tuple[Tensor, ...] = ()
        self._versions: tuple[object, ...] = ()
        self._kept: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # a CUDA graph may read them

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and dtype."""
        if not x.requires_grad or torch.compiler.is_compiling():
            return super().forward(x)
        scale, shift = self.constants(x.dtype)
        return torch.addcmul(shift, x, scale)

    @torch.no_grad()
    def constants(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (1, C, 1, 1), kept until a buffer changes."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        versions = tuple(buffer._version for buffer in buffers)
        same = len(self._made_of) and all(map(operator.is_, buffers, self._made_of))
        if not same or versions != self._versions:
            self._made_of, self._versions = buffers, versions
            self._kept.clear()
        if dtype not in self._kept:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            scale, shift = (x.view(1, -1, 1, 1).to(dtype) for x in (scale, shift))
            self._kept[dtype] = scale, shift
        return self._kept[dtype]


def keep_frozen_norms(module: nn.Module) -> nn.Module:
    """Puts `FrozenNorm` in the place of each of a module's frozen batch norms, and returns it."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is FrozenBatchNorm2d:
                setattr(parent, name, FrozenNorm.of(child))
    return module
