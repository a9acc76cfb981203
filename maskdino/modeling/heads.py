"""The prediction heads that query selection and every decoder layer share (section 3.5)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from maskdino.modeling.layers import MLP, predict_boxes

PRIOR_PROBABILITY = 0.01  # of every class before training with focal loss (RetinaNet)


class PredictionHeads(nn.Module):
    """Class, mask and box head, and the norm in front of the first two.

    Class and box head compute in the type of their weights whatever autocast says: they are small,
    and the 8 bits of a bfloat16 can neither tell the best queries apart nor place a box.

    Shape key: B images, Q queries, C channels, K class logits.
    """

    @configurable
    def __init__(
        self, *, hidden_dim: int, num_classes: int, no_object: bool, mask_on: bool
    ) -> None:
        """Makes the heads.

        Args:
            hidden_dim: C.
            num_classes: classes, "no object" not counted.
            no_object: whether the class head has one more output, for softmax cross-entropy.
            mask_on: whether there is a mask head.
        """
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_classes + no_object)
        self.box_head = MLP(input_dim=hidden_dim, hidden_dim=hidden_dim, output_dim=4, num_layers=3)
        self.mask_head = (
            MLP(input_dim=hidden_dim, hidden_dim=hidden_dim, output_dim=hidden_dim, num_layers=3)
            if mask_on
            else None
        )
        if not no_object:
            nn.init.constant_(
                self.class_head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
            )
        # Before training, layers leave anchors as they are.
        for parameter in self.box_head.layers[-1].parameters():
            nn.init.zeros_(parameter)

    @property
    def in_full(self) -> tuple[nn.Module, ...]:
        """Those that autocast leaves alone."""
        return self.class_head, self.box_head

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads sizes and kind of the heads from MODEL.MASK_DINO."""
        node = cfg.MODEL.MASK_DINO
        return {
            "hidden_dim": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "no_object": node.LOSS.CLASSIFICATION == "cross_entropy",
            "mask_on": node.MASK_ON,
        }

    def classes_and_masks(self, content: Tensor) -> tuple[Tensor, Tensor | None]:
        """Content (..., C) to class logits (..., K) and mask embeddings (..., C)."""
        normed = self.norm(content)
        return self.class_logits(normed), self.masks(normed)

    def masks(self, normed: Tensor) -> Tensor | None:
        """Normed content (..., C) to mask embeddings (..., C)."""
        return None if self.mask_head is None else self.mask_head(normed)

    def class_logits(self, normed: Tensor) -> Tensor:
        """Normed content (..., C) to class logits (..., K)."""
        return _unrounded(self.class_head, normed)

    def box_logits(self, content: Tensor, anchor_logits: Tensor) -> Tensor:
        """Content (..., C) and logits of the anchors (..., 4) it refines to logits of boxes."""
        return _unrounded(self.box_head, content).float() + anchor_logits

    def next_boxes(
        self, content: Tensor, anchor_logits: Tensor, channels: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the next decoder layer begins with; see `predict_boxes`."""
        of = partial(predict_boxes, self.box_head)
        return _unrounded(self.box_head, content, of, anchor_logits, channels, dtype)


def _unrounded(
    head: nn.Module, content: Tensor, compute: Callable[..., Any] | None = None, *others: Any
) -> Any:
    """`head(content)`, or `compute(content, *others)`, in the type of the head's weights."""
    device = content.device.type
    if compute is None:  # PyTorch 2.11 cannot compile `compute or head`
        compute = head
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta tensors: shapes alone
        return compute(content, *others)
    with torch.autocast(device, enabled=False):
        return compute(content.to(next(head.parameters()).dtype), *others)
