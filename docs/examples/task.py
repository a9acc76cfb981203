"""A task of one's own: the number of objects, MODEL.META_ARCHITECTURE CountingMaskDINO."""

from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from maskdino import MaskDINO


@META_ARCH_REGISTRY.register()
class CountingMaskDINO(MaskDINO):
    """Adds "count" to the results of each image; training and weights are Mask DINO's."""

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """See `MaskDINO`."""
        results = super().forward(batched_inputs)
        if isinstance(results, list):
            for result in results:
                result["count"] = int((result["instances"].scores > 0.3).sum())
        return results
