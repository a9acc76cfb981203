"""A backbone of one's own: MODEL.BACKBONE.NAME PatchPyramid."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn


@BACKBONE_REGISTRY.register()
class PatchPyramid(Backbone):
    """Gives features called res2 to res5, of strides 4, 8, 16 and 32."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        self.width = cfg.MODEL.PATCH_PYRAMID.WIDTH
        stages = [nn.Conv2d(input_shape.channels, self.width, 4, stride=4)]
        stages += [nn.Conv2d(self.width, self.width, 2, stride=2) for _ in range(3)]
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Takes (B, C, H, W)."""
        features = {}
        for name, stage in zip(self.output_shape(), self.stages, strict=True):
            features[name] = images = stage(images).relu()
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Tells channels and strides."""
        return {f"res{i}": ShapeSpec(channels=self.width, stride=2**i) for i in range(2, 6)}


def add_config(cfg: CfgNode) -> None:
    """Adds the keys of the backbone."""
    cfg.MODEL.PATCH_PYRAMID = CfgNode({"WIDTH": 64})
