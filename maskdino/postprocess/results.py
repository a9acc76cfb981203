"""From the predictions of one image to its results, for each of the tasks.

Shape key: Q queries, K classes, R objects, C channels; pixel embedding H/4, W/4; output OH, OW.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from maskdino.ops import clock
from maskdino.ops.host import run_steps
from maskdino.postprocess.frame import Frame
from maskdino.postprocess.instances import instance_steps
from maskdino.postprocess.options import InferenceOptions
from maskdino.postprocess.panoptic import panoptic_steps
from maskdino.postprocess.semantic import semantic_steps
from maskdino.structures import Predictions


def postprocess(
    predictions: Predictions,
    pixel_embedding: Tensor | None,
    frame: Frame,
    options: InferenceOptions,
    is_thing: Tensor,
    *,
    tasks: Collection[str] | None = None,
    compact: bool = False,
    features: bool = False,
    class_maps: bool = False,
) -> dict:
    """Results of one image.

    Args:
        predictions: (Q, ...).
        pixel_embedding: (C, H/4, W/4), or None without a mask branch.
        frame: the sizes.
        options: how predictions become results.
        is_thing: (K,) bool.
        tasks: of "instance", "panoptic" and "semantic"; None: those of the options.
        compact: whether results come to the host as small as they are: masks as run lengths, a few
            of them at one time, and the best class of each pixel alone. Maps of huge images are
            made at the size of the network, and enlarged.
        features: whether objects come with the decoder's content features.
        class_maps: whether "semantic" is the scores of all classes, compact or not.

    Returns:
        "instance": detectron2's `Instances` with `pred_boxes`, `scores`, `pred_classes` and, with a
        mask branch, `pred_masks` (R, OH, OW) bool, or compact `pred_rles`, R masks in COCO's
        compressed form; if asked for `features` (R, C) float32. Best first by class score; of
        panoptic models things alone. "panoptic": segment ids (OH, OW) int32, 0 where there is none,
        and a list with `id`, `isthing`, `category_id` and for things `score` of each segment.
        "semantic": class maps (K, OH, OW) float32, or compact the classes (OH, OW) uint8, int32 if
        there are more than 255.

    Raises:
        ValueError: the network gives no features, or no masks where the task needs them.
    """
    arguments = (predictions, pixel_embedding, frame, options)
    on_host = compact or options.run_lengths
    makers = {
        # First, as it asks for a number first: a GPU makes the others' results meanwhile.
        "panoptic": lambda: panoptic_steps(*arguments, is_thing, compact, on_host),
        "semantic": lambda: semantic_steps(*arguments, compact and not class_maps),
        "instance": lambda: instance_steps(*arguments, is_thing, on_host, features),
    }
    wanted = [task for task in makers if task in (options.tasks if tasks is None else tasks)]
    clock.begin("results")
    results = run_steps([makers[task]() for task in wanted])
    clock.begin("network")  # perhaps that of another size or slice
    return dict(zip(wanted, results, strict=True))
