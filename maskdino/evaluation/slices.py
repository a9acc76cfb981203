"""Evaluation of large images: predicted in slices, and judged as whole images.

Shape key: K classes, H, W pixels of an image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from maskdino.data.reading import DataError
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.inference.tiles import TiledImage
from maskdino.postprocess import InferenceOptions
from maskdino.visualization.results import ImageResult


class SlicedModel(nn.Module):
    """Gives the results of `MaskDINOPredictor.sliced` as a model gives its own."""

    inference: InferenceOptions

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """Takes TEST.SLICES, and a `MaskDINO`, perhaps in a wrapper for several processes."""
        super().__init__()
        self.train(model.training)  # the predictor's is that of evaluation
        network: Any = getattr(model, "module", model)
        self.model, self.inference = model, network.inference
        self._predictor = MaskDINOPredictor.from_model(
            network,
            cfg,
            confidence_threshold=self.inference.score_threshold,
            batch_size=cfg.TEST.SLICES.BATCH_SIZE,
        )

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Predicts images, which are read from their files.

        Returns:
            For each image what the model would give, but "label_map" (H, W) beside "sem_seg".

        Raises:
            DataError: an image has another size than its annotations say.
        """
        return [self._predict(record) for record in batched_inputs]

    def _predict(self, record: dict) -> dict:
        image = TiledImage(record["file_name"])
        said = record.get("height", image.size[0]), record.get("width", image.size[1])
        if said != image.size:
            raise DataError(
                f"image {record['file_name']} has (height, width) {image.size}, but its "
                f"annotations say {said}"
            )
        progress = comm.is_main_process()
        result = self._predictor.sliced(image, progress=progress)
        return _Output(result, len(self._predictor.is_thing), self.inference.run_lengths)


class _Output(dict):
    """What evaluators read; "sem_seg" (K, H, W) is made of the label map when it is asked for."""

    def __init__(self, result: ImageResult, num_classes: int, run_lengths: bool) -> None:
        super().__init__()
        self._num_classes = num_classes
        if result.boxes is not None:
            self["instances"] = instances = replace(result, rles=None).to_instances()
            if result.rles is not None and run_lengths:
                instances.pred_rles = list(result.rles)
            elif result.rles is not None:
                instances.pred_masks = torch.from_numpy(result.masks)
        if result.panoptic_ids is not None:
            self["panoptic_seg"] = (
                torch.from_numpy(result.panoptic_ids),
                list(result.segments or ()),
            )
        if result.label_map is not None:
            self["label_map"] = torch.from_numpy(result.label_map)

    def __missing__(self, key: str) -> Tensor:
        if key != "sem_seg" or "label_map" not in self:
            raise KeyError(key)
        classes = torch.arange(self._num_classes)[:, None, None]
        return (self["label_map"] == classes).to(torch.uint8)
