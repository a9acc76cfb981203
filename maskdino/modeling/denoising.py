"""Unified denoising (section 3.6, appendix B.2): the decoder reconstructs noised ground truth.

Shape key: B images, N objects of the batch, G groups, T slots of a group, C channels, Q queries, W
noised queries, with those that fill up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from maskdino.ops.boxes import inverse_sigmoid
from maskdino.ops.constants import constant_of_shape
from maskdino.structures import DenoisedOutputs, Denoising, Outputs, Queries, Targets, send


class DenoisingQueries(nn.Module):
    """Makes noised queries of the objects of a batch."""

    @configurable
    def __init__(
        self,
        *,
        hidden_dim: int,
        num_classes: int,
        num_queries: int,
        label_noise: float,
        box_noise: float,
        with_masks: bool,
    ) -> None:
        """Makes the embedding of labels.

        Args:
            hidden_dim: C.
            num_classes: labels that there are.
            num_queries: at most this many noised queries, but at least one group.
            label_noise: probability that a label is drawn anew.
            box_noise: lambda_1 and lambda_2 of DN-DETR, see `_noised_boxes`.
            with_masks: whether noised queries have mask losses too.
        """
        super().__init__()
        self.num_queries, self.label_noise, self.box_noise = num_queries, label_noise, box_noise
        self.with_masks = with_masks
        self.label_embedding = nn.Embedding(num_classes, hidden_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.DENOISING."""
        node = cfg.MODEL.MASK_DINO
        return {
            "hidden_dim": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "num_queries": node.DENOISING.NUM_QUERIES,
            "label_noise": node.DENOISING.LABEL_NOISE,
            "box_noise": node.DENOISING.BOX_NOISE,
            "with_masks": node.DENOISING.MODE == "boxes_and_masks",
        }

    def forward(self, targets: Targets, *, filled: bool = False) -> Denoising:
        """Noised queries in groups, each of which holds every object of an image once.

        There are `num_queries // T` groups, at least one. A batch without objects gets one group of
        one empty slot, so that every parameter takes part in every step.

        Args:
            targets: the objects.
            filled: whether there are always `num_queries` noised queries, or if that is too few a
                multiple, so that nearly all batches have equal shapes. Nobody sees those that fill
                up.
        """
        slots = max(1, *targets.counts)
        groups = max(1, self.num_queries // slots) if len(targets) else 1
        device = targets.boxes.device
        image, slot = slot_index(targets.counts, device)
        labels = self._noised_labels(targets.labels.expand(groups, -1))  # (G, N)
        boxes = self._noised_boxes(targets.boxes.expand(groups, -1, -1))  # (G, N, 4)
        content = self.label_embedding(labels)  # (G, N, C)
        batch = len(targets.counts)
        place = (image, slot)
        all_content = content.new_zeros(batch, slots, groups, content.shape[-1])
        all_content = all_content.index_put(place, content.transpose(0, 1))
        anchor_logits = boxes.new_zeros(batch, slots, groups, 4)
        anchor_logits = anchor_logits.index_put(place, inverse_sigmoid(boxes).transpose(0, 1))
        parts = [x.transpose(1, 2).flatten(1, 2) for x in (all_content, anchor_logits)]
        missing = -(groups * slots) % self.num_queries if filled else 0
        if missing:
            parts = [F.pad(x, (0, 0, 0, missing)) for x in parts]
        queries = Queries(*parts)
        group_of = group_index(groups * slots + missing, slots, device)
        return Denoising(queries, group_of, groups, slots, self.with_masks)

    def _noised_labels(self, labels: Tensor) -> Tensor:
        flip = torch.rand(labels.shape, device=labels.device) < self.label_noise
        drawn = torch.randint_like(labels, self.label_embedding.num_embeddings)
        return torch.where(flip, drawn, labels)

    def _noised_boxes(self, boxes: Tensor) -> Tensor:
        """Adds DN-DETR's noise: |dx| < lambda_1 w / 2 and |dw| < lambda_2 w; y and h likewise.

        Here lambda_1 (shift of the center) and lambda_2 (change of the size) are one number,
        `box_noise`, and what is drawn is uniform in these bounds.
        """
        size = boxes[..., 2:]
        reach = torch.cat([size / 2, size], dim=-1) * self.box_noise
        return (boxes + (2 * torch.rand_like(boxes) - 1) * reach).clamp(0, 1)


def build_denoising(cfg: CfgNode) -> DenoisingQueries | None:
    """Denoising as the configuration asks for; None when it is off."""
    mode = cfg.MODEL.MASK_DINO.DENOISING.MODE
    if mode not in ("boxes_and_masks", "boxes", "off"):
        raise ValueError(
            f'MODEL.MASK_DINO.DENOISING.MODE is {mode!r}; it must be "boxes_and_masks", '
            '"boxes" or "off"'
        )
    return None if mode == "off" else DenoisingQueries(cfg)


def slot_index(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and position in its image of each object of the batch: two (N,) int64 tensors."""
    image = [image for image, count in enumerate(counts) for _ in range(count)]
    slot = [slot for count in counts for slot in range(count)]
    return tuple(send(torch.tensor([image, slot], dtype=torch.int64), device))


@constant_of_shape
def group_index(width: int, slots: int, device: torch.device) -> Tensor:
    """(W,) group of each noised query; those that fill up have groups of their own."""
    return torch.arange(width, device=device) // slots


def join_noised(queries: Queries, *noised: Tensor) -> tuple[Queries, Tensor | None]:
    """Puts noised queries in front of the others.

    Args:
        queries: Q of them.
        noised: the tensors of `Denoising`, or nothing.

    Returns:
        The queries, and who may see whom: see `attention_mask`; None: everybody.
    """
    if not noised:
        return queries, None
    content, anchor_logits, group_of = noised
    joined = Queries(
        torch.cat([content.to(queries.content.dtype), queries.content], dim=1),
        torch.cat([anchor_logits, queries.anchor_logits.float()], dim=1),
    )
    return joined, attention_mask(group_of, queries.content.shape[1])


def split_noised(
    outputs: Outputs, denoising: Denoising | None
) -> tuple[Outputs, DenoisedOutputs | None]:
    """Takes what `join_noised` joined apart: outputs to be matched, and those to be denoised."""
    if denoising is None:
        return outputs, None
    count, width = denoising.num_queries, len(denoising.group_of)
    noised = outputs.map(lambda x: x[:, :, :count])
    return outputs.map(lambda x: x[:, :, width:]), DenoisedOutputs(noised, denoising)


def attention_mask(group_of: Tensor, num_queries: int) -> Tensor:
    """Who may see whom: a group of noised queries is seen by itself only, the others by all.

    Args:
        group_of: (W,) group of each noised query, from 0.
        num_queries: Q.

    Returns:
        (W + Q, W + Q) bool with the noised queries first; rows see columns where True.
    """
    group = F.pad(group_of, (0, num_queries), value=-1)
    return (group[:, None] == group) | (group == -1)
