"""A mapper and an augmentation of one's own, used by their names."""

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from maskdino.data import InstanceMapper
from maskdino.integration.extensions import AUGMENTATION_REGISTRY, MAPPER_REGISTRY


@MAPPER_REGISTRY.register()
class GrayMapper(InstanceMapper):
    """Shows the model brightness alone: INPUT.DATASET_MAPPER_NAME GrayMapper."""

    def __call__(self, dataset_dict: dict) -> dict:
        """See `InstanceMapper`."""
        example = super().__call__(dataset_dict)
        gray = example["image"].float().mean(dim=0)
        example["image"] = gray.byte().expand_as(example["image"]).contiguous()
        return example


@AUGMENTATION_REGISTRY.register()
def tilted(cfg: CfgNode) -> list[T.Augmentation]:
    """INPUT.AUGMENTATIONS ["tilted"]; an albumentations.Compose may be returned as well."""
    return [T.RandomBrightness(0.8, 1.2), T.RandomRotation(cfg.INPUT.TILT, expand=False)]


def add_config(cfg: CfgNode) -> None:
    """Adds a key."""
    cfg.INPUT.TILT = [-10.0, 10.0]  # degrees
