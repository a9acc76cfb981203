"""Unified and enhanced query selection (section 3.5), and the learned queries that stand in for it.

Shape key: B images, S tokens, Q queries, C channels, K class logits; H, W of the pixel embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from maskdino.modeling.layers import linear, rounded
from maskdino.ops.boxes import inverse_sigmoid, masks_to_boxes, xyxy_to_cxcywh
from maskdino.ops.constants import constant_of_shape
from maskdino.ops.ms_deform_attn import cell_centers
from maskdino.ops.points import mask_logits
from maskdino.structures import Memory, Predictions, Queries, SpatialShapes, of_mask_branch

if TYPE_CHECKING:
    from maskdino.modeling.heads import PredictionHeads

SMALLEST_PROPOSAL = 0.05  # width and height, as a part of the canvas; each further level doubles it
BORDER = 0.01  # proposals with a coordinate this close to 0 or 1 are invalid
ROUNDING = 1e-6  # of coordinates that lie at the border, as in 50 rows: compiled code divides so


class UnifiedQuerySelection(nn.Module):
    """Tokens with the best class scores become queries, their boxes or masks the first anchors."""

    @configurable
    def __init__(
        self,
        *,
        hidden_dim: int,
        num_queries: int,
        mask_enhanced_anchors: str,
        empty_masks: str,
        largest_proposals: str,
    ) -> None:
        """Makes the layer in front of the heads.

        Args:
            hidden_dim: C.
            num_queries: Q.
            mask_enhanced_anchors: boxes of the predicted masks as anchors: "mask2box" (the border
                is the last foreground pixel) or "bitmask" (the pixel behind it); "none": the
                predicted boxes.
            empty_masks: anchor of a query whose mask is empty: its predicted "box", or a "corner"
                of the image.
            largest_proposals: the level that proposes the largest boxes, "coarsest" or "finest".

        Raises:
            ValueError: if one of the last three is none of these words.
        """
        super().__init__()
        _check_choice("EMPTY_MASKS", empty_masks, ("box", "corner"))
        _check_choice(
            "MASK_ENHANCED_ANCHORS", mask_enhanced_anchors, ("mask2box", "bitmask", "none")
        )
        _check_choice("LARGEST_PROPOSALS", largest_proposals, ("coarsest", "finest"))
        self.num_queries = num_queries
        self.mask_enhanced_anchors = mask_enhanced_anchors
        self.empty_masks = empty_masks
        self.coarsest_largest = largest_proposals == "coarsest"
        self.output = nn.Linear(hidden_dim, hidden_dim)
        self.output_norm = nn.LayerNorm(hidden_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.QUERY_SELECTION."""
        node = cfg.MODEL.MASK_DINO
        return {
            "hidden_dim": node.HIDDEN_DIM,
            "num_queries": node.QUERY_SELECTION.NUM_QUERIES,
            "mask_enhanced_anchors": node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS
            if node.MASK_ON
            else "none",
            "empty_masks": node.QUERY_SELECTION.EMPTY_MASKS,
            "largest_proposals": node.QUERY_SELECTION.LARGEST_PROPOSALS,
        }

    def forward(
        self,
        memory: Memory,
        pixel_embedding: Tensor | None,
        heads: PredictionHeads,
        *,
        supervised: bool = True,
    ) -> tuple[Queries, Predictions | None]:
        """Selects queries.

        Args:
            memory: the encoder's tokens.
            pixel_embedding: (B, C, H, W), or None without a mask branch.
            heads: the heads that the decoder also uses.
            supervised: whether predictions are asked for.

        Returns:
            min(Q, S) queries, without gradient, and their predictions, or None.
        """
        proposals = proposal_logits(
            memory.spatial_shapes, self.coarsest_largest, memory.tokens.device
        )
        valid = proposals[:, :1] < float("inf")  # (S, 1)
        with torch.no_grad():
            candidates = self._candidates(memory.tokens, valid)
            scores = heads.class_logits(candidates).amax(-1)  # (B, S)
            index = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices  # (B, Q)
        if not torch.compiler.is_compiling():
            # PyTorch before its pull request 165068 (December 2025) gives the weights that autocast
            # has just converted without gradient to the pass with gradient too: not to be trained.
            torch.clear_autocast_cache()
        channels = index[..., None].expand(-1, -1, memory.tokens.shape[2])
        if supervised:
            # Only selected tokens are supervised: all is computed again for them, with gradient.
            content = self._candidates(memory.tokens.gather(1, channels), valid[index])
        else:
            content = candidates.gather(1, channels)
        box_logits = heads.box_logits(content, proposals[index])
        anchor_logits, predictions, embeddings = box_logits.detach(), None, None
        if supervised:
            class_logits, embeddings = heads.classes_and_masks(content)
            predictions = Predictions(class_logits, box_logits.sigmoid(), embeddings)
        elif self.mask_enhanced_anchors != "none":
            embeddings = heads.masks(heads.norm(content))
        if self.mask_enhanced_anchors != "none":
            anchor_logits = self._mask_anchors(embeddings, pixel_embedding, anchor_logits)
        return Queries(content.detach(), anchor_logits), predictions

    def _candidates(self, tokens: Tensor, valid: Tensor) -> Tensor:
        return self.output_norm(
            linear(self.output, rounded(torch.mul, tokens, valid, to=self.output.weight.dtype))
        )

    @torch.no_grad()
    def _mask_anchors(
        self, mask_embeddings: Tensor | None, pixel_embedding: Tensor | None, predicted: Tensor
    ) -> Tensor:
        """Mask-enhanced anchor boxes: those of the predicted masks, (B, Q, 4) as logits."""
        masks = mask_logits(*of_mask_branch(mask_embeddings, pixel_embedding)) > 0
        height, width = masks.shape[-2:]
        inclusive = self.mask_enhanced_anchors == "mask2box"
        corners = masks_to_boxes(masks, inclusive)
        boxes = xyxy_to_cxcywh(corners)
        anchor_logits = inverse_sigmoid(boxes / _sizes(height, width, boxes.device))
        if self.empty_masks == "corner":
            return anchor_logits
        # The last pixel of an inclusive box may be the first.
        has_pixels = corners[..., 3:] > corners[..., 1:2] - int(inclusive)
        return torch.where(has_pixels, anchor_logits, predicted)


class LearnedQueries(nn.Module):
    """Learned content queries and anchors, equal for all images: without query selection."""

    @configurable
    def __init__(self, *, hidden_dim: int, num_queries: int) -> None:
        """Draws Q queries (`num_queries`) of C channels (`hidden_dim`)."""
        super().__init__()
        self.content = nn.Parameter(torch.randn(num_queries, hidden_dim))
        self.anchor_logits = nn.Parameter(torch.randn(num_queries, 4))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES."""
        node = cfg.MODEL.MASK_DINO
        return {"hidden_dim": node.HIDDEN_DIM, "num_queries": node.QUERY_SELECTION.NUM_QUERIES}

    def forward(self, memory: Memory, *_: object, **__: object) -> tuple[Queries, None]:
        """The same queries for each image; there are no proposals to supervise.

        Args:
            memory: tells how many images there are. What query selection needs beyond is ignored.
        """
        lead = (memory.tokens.shape[0], -1, -1)
        return Queries(self.content.expand(lead), self.anchor_logits.expand(lead)), None


def build_query_selection(cfg: CfgNode) -> nn.Module:
    """Query selection as the configuration asks for."""
    return (
        UnifiedQuerySelection(cfg)
        if cfg.MODEL.MASK_DINO.QUERY_SELECTION.ENABLED
        else LearnedQueries(cfg)
    )


@constant_of_shape
def _sizes(height: int, width: int, device: torch.device) -> Tensor:
    """(4,) by which boxes in pixels are divided."""
    # Filled on the device: nothing is copied, and exported programs keep the size variable.
    sides = (width, height, width, height)
    return torch.cat([torch.full((1,), side, dtype=torch.float32, device=device) for side in sides])


@constant_of_shape
def proposal_logits(
    spatial_shapes: SpatialShapes, coarsest_largest: bool, device: torch.device
) -> Tensor:
    """Logits of one anchor per token: its cell, with a size that depends on the level.

    Returns:
        (S, 4); all four are +inf where the anchor is too close to the border.
    """
    levels = []
    for level, (height, width) in enumerate(spatial_shapes):
        step = level if coarsest_largest else len(spatial_shapes) - 1 - level
        centers = cell_centers([(height, width)], device)
        sizes = torch.full_like(centers, SMALLEST_PROPOSAL * 2.0**step)
        levels.append(torch.cat([centers, sizes], dim=-1))
    anchors = torch.cat(levels)
    border = BORDER + ROUNDING
    valid = ((anchors > border) & (anchors < 1 - border)).all(-1, keepdim=True)
    return torch.where(valid, torch.log(anchors / (1 - anchors)), float("inf"))


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"MODEL.MASK_DINO.QUERY_SELECTION.{key} is {value!r}; it must be one of {choices}"
        )
