"""From one image's predictions to results, as the released models do it, in slow loops.

Shape key: Q queries, K classes, R results; sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.slow.mask_dino import Prediction

Size = tuple[int, int]
ROUNDING = 1e-5  # relative; float32 computed in another order is closer than that


def resized(maps: Tensor, size: Size) -> Tensor:
    """(Q, h, w) to another size."""
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


class SlowResults:
    """Results of one image.

    Args:
        config: nested mapping with released keys.
        is_thing: of each class.
        canvas, image, output: sizes of the padded canvas, of the image on it, of what is wanted.
    """

    def __init__(
        self, config: dict, is_thing: list[bool], canvas: Size, image: Size, output: Size
    ) -> None:
        self.options = config["MODEL"]["MaskDINO"]
        self.test = self.options["TEST"]
        self.max_detections = config["TEST"]["DETECTIONS_PER_IMAGE"]
        self.is_thing = is_thing
        self.canvas, self.image, self.output = canvas, image, output

    def __call__(self, prediction: Prediction) -> Iterator[tuple[str, Tensor]]:
        """Names as in the worked cases, without the image, and values."""
        masks = resized(prediction.mask_logits, self.canvas)
        masks = masks[:, : self.image[0], : self.image[1]]
        output_masks = resized(masks, self.output)
        if self.test["SEMANTIC_ON"]:
            yield "sem_seg", self.semantic(prediction, masks, output_masks)
        if self.test["PANOPTIC_ON"]:
            yield "panoptic_seg", self.panoptic(prediction, output_masks)
            yield "panoptic_undecided", self.undecided(prediction, output_masks)
        if self.test["INSTANCE_ON"]:
            for name, value in self.instances(prediction, output_masks).items():
                yield f"instances/{name}", value

    def competing(self, prediction: Prediction) -> Tensor:
        """(Q, K) class probabilities that sum to 1, or to less where "no object" is a class."""
        if self.options["SEMANTIC_CE_LOSS"]:
            return prediction.class_logits.softmax(-1)[:, :-1]
        scores = prediction.class_logits.sigmoid()
        return (scores / self.test["PANO_TEMPERATURE"]).softmax(-1)

    def semantic(self, prediction: Prediction, masks: Tensor, output_masks: Tensor) -> Tensor:
        """(K, height, width): the sum over queries, before or after the last resize."""
        before = (
            self.test["SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE"]
            or self.test["PANOPTIC_ON"]
            or self.test["INSTANCE_ON"]
        )
        probs = (output_masks if before else masks).sigmoid()
        total = (self.competing(prediction).t() @ probs.flatten(1)).view(-1, *probs.shape[1:])
        return total if before else resized(total, self.output)

    def panoptic(self, prediction: Prediction, masks: Tensor) -> Tensor:
        """(height, width) int32 segment ids; 0: nothing."""
        scores, labels, masks = self.taking_part(prediction, masks)
        ids = torch.zeros(self.output, dtype=torch.int32)
        if not len(masks):
            return ids
        winner = (scores[:, None, None] * masks).argmax(0)
        number, stuff = 0, {}
        for i, (mask, label) in enumerate(zip(masks, labels.tolist(), strict=True)):
            own, won = mask >= 0.5, winner == i
            visible = own & won
            if not visible.any() or won.sum() / own.sum() < self.test["OVERLAP_THRESHOLD"]:
                continue
            if not self.is_thing[label] and label in stuff:
                ids[visible] = stuff[label]
                continue
            number += 1
            ids[visible] = number
            if not self.is_thing[label]:
                stuff[label] = number
        return ids

    def undecided(self, prediction: Prediction, masks: Tensor) -> Tensor:
        """(height, width) bool: pixels whose segment hangs on rounding."""
        scores, _, masks = self.taking_part(prediction, masks)
        if not len(masks):
            return torch.zeros(self.output, dtype=torch.bool)
        first, *others = (scores[:, None, None] * masks).sort(0, descending=True).values
        close = torch.zeros(self.output, dtype=torch.bool)
        for other in others[:1]:
            close = first - other < ROUNDING * first
        return close | ((masks - 0.5).abs() < ROUNDING).any(0)

    def taking_part(self, prediction: Prediction, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, classes and mask probabilities of the queries that are sure enough."""
        sure = prediction.class_logits.sigmoid().max(-1).values
        keep = sure > self.test["OBJECT_MASK_THRESHOLD"]
        scores, labels = self.competing(prediction)[keep].max(-1)
        return scores, labels, masks[keep].sigmoid()

    def instances(self, prediction: Prediction, masks: Tensor) -> dict[str, Tensor]:
        """The best pairs of query and class; in panoptic models those of things."""
        class_scores = prediction.class_logits.sigmoid()
        pairs = [(q, k) for q in range(len(class_scores)) for k in range(class_scores.shape[1])]
        best = class_scores.flatten().argsort(descending=True)[: self.max_detections]
        scores, classes, boxes, areas = [], [], [], []
        for query, label in (pairs[i] for i in best.tolist()):
            if self.test["PANOPTIC_ON"] and not self.is_thing[label]:
                continue
            score, foreground = class_scores[query, label], masks[query] > 0
            if not self.test["TEST_FOUCUS_ON_BOX"]:
                inside = (masks[query].sigmoid() * foreground).sum()
                score = score * inside / (foreground.sum() + 1e-6)
            scores.append(score)
            classes.append(label)
            boxes.append(self.output_box(prediction.boxes[query]))
            areas.append(foreground.sum())
        return {
            "scores": torch.tensor(scores),
            "classes": torch.tensor(classes, dtype=torch.int64),
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "mask_area": torch.tensor(areas, dtype=torch.int64),
        }

    def output_box(self, box: Tensor) -> list[float]:
        """x0, y0, x1, y1 in pixels of the output."""
        x, y, width, height = box.tolist()
        across = self.canvas[1] / self.image[1] * self.output[1]
        down = self.canvas[0] / self.image[0] * self.output[0]
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return [c * side for c, side in zip(corners, (across, down, across, down), strict=True)]
