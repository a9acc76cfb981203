"""Semantic segmentation of one image.

Shape key: Q queries, K classes; output OH, OW pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskdino.ops.host import Steps
from maskdino.postprocess.frame import (
    Frame,
    coarse_frame,
    full_size,
    mask_parts,
    output_masks,
    resize_to_output,
)
from maskdino.postprocess.options import InferenceOptions
from maskdino.structures import Predictions


def semantic_steps(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    frame: Frame,
    options: InferenceOptions,
    compact: bool,
) -> Steps[Tensor]:
    """Mask times class probabilities, summed over queries; see `postprocess`."""
    embeddings, pixel_embedding = mask_parts(predictions, pixel_embedding)
    probs = options.class_probs(predictions.class_logits)
    num_classes = probs.shape[1]
    made = coarse_frame(frame, num_classes) if compact else frame
    tile = made if options.sum_in_output_frame else replace(made, output=made.image)
    shape, begin = (num_classes, tile.output[0] * tile.output[1]), 0
    make = torch.empty if len(probs) else torch.zeros
    total = make(shape, dtype=torch.float32, device=probs.device)
    for logits in output_masks(embeddings, pixel_embedding, tile):
        some = probs[begin : begin + len(logits)].t()
        total.addmm_(some, logits.sigmoid_().flatten(1), beta=min(begin, 1))  # 0: the first sets it
        begin += len(logits)
    total = total.unflatten(1, tile.output)
    if not options.sum_in_output_frame:
        total = resize_to_output(total, made)
    if not compact:
        return total
    # 255 means "ignored" in maps of 8 bits.
    dtype = torch.uint8 if num_classes <= 255 else torch.int32
    (labels,) = yield (full_size(total.argmax(0).to(dtype), frame),)
    return labels
