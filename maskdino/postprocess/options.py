"""How predictions become results."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferenceOptions:
    """MODEL.MASK_DINO.TEST, and the class scores that follow from the loss.

    `run_lengths` asks for objects on the host with `pred_rles` in place of `pred_masks`, and for
    segment ids there.
    """

    instance_on: bool
    panoptic_on: bool
    semantic_on: bool
    decoder_layer: int
    max_detections: int
    score_threshold: float
    mask_scoring: bool
    panoptic_score_threshold: float
    panoptic_overlap_threshold: float
    temperature: float
    resize_before_sum: bool
    cross_entropy: bool
    precision: str
    cuda_graphs: bool
    run_lengths: bool = False
    mask_limit: float = 0.0

    @staticmethod
    def from_config(cfg: CfgNode) -> InferenceOptions:
        """How the configuration wants predictions to become results.

        Raises:
            ValueError: there is no such decoder layer.
        """
        node = cfg.MODEL.MASK_DINO.TEST
        layers = cfg.MODEL.MASK_DINO.DECODER.NUM_LAYERS
        if not -1 <= node.DECODER_LAYER <= layers:
            raise ValueError(
                f"MODEL.MASK_DINO.TEST.DECODER_LAYER is {node.DECODER_LAYER}; it must be -1 to "
                f"{layers}"
            )
        return InferenceOptions(
            instance_on=node.INSTANCE_ON,
            panoptic_on=node.PANOPTIC_ON,
            semantic_on=node.SEMANTIC_ON,
            decoder_layer=node.DECODER_LAYER,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            score_threshold=_score_threshold(cfg),
            mask_scoring=node.MASK_SCORING,
            mask_limit=node.MASK_LIMIT,
            panoptic_score_threshold=node.PANOPTIC_SCORE_THRESHOLD,
            panoptic_overlap_threshold=node.PANOPTIC_OVERLAP_THRESHOLD,
            temperature=node.TEMPERATURE,
            resize_before_sum=node.RESIZE_BEFORE_SUM,
            cross_entropy=cfg.MODEL.MASK_DINO.LOSS.CLASSIFICATION == "cross_entropy",
            precision=node.PRECISION,
            cuda_graphs=node.CUDA_GRAPHS,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Which of "instance", "panoptic" and "semantic" the model does."""
        switches = {
            "instance": self.instance_on,
            "panoptic": self.panoptic_on,
            "semantic": self.semantic_on,
        }
        return tuple(task for task, on in switches.items() if on)

    @property
    def sum_in_output_frame(self) -> bool:
        """Whether masks are resized to the output before the class maps are summed up.

        So it is in models that also do instance or panoptic segmentation.
        """
        return self.resize_before_sum or self.instance_on or self.panoptic_on

    def class_scores(self, class_logits: Tensor) -> Tensor:
        """(..., K) logits to scores of the real classes."""
        logits = class_logits.float()
        return logits.softmax(-1)[..., :-1] if self.cross_entropy else logits.sigmoid()

    def class_probs(self, class_logits: Tensor) -> Tensor:
        """(..., K) logits to probabilities of the real classes that compete with each other."""
        return self.competing(self.class_scores(class_logits))

    def competing(self, class_scores: Tensor) -> Tensor:
        """`class_probs` of `class_scores`, both (..., K)."""
        if self.cross_entropy:
            return class_scores
        return (class_scores / self.temperature).softmax(-1)


def _score_threshold(cfg: CfgNode) -> float:
    """Ours; or else that of detectron2's models, if somebody set it (its demo, SAHI)."""
    own, theirs = cfg.MODEL.MASK_DINO.TEST.SCORE_THRESHOLD, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    if own or theirs == get_cfg().MODEL.ROI_HEADS.SCORE_THRESH_TEST:
        return own
    logger.info("Scores from %g (MODEL.ROI_HEADS.SCORE_THRESH_TEST).", theirs)
    return theirs
