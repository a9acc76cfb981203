"""Operators that the model is built on; this package imports torch only."""

from maskdino.ops.points import PointSampler, mask_logits

__all__ = ["PointSampler", "mask_logits"]
