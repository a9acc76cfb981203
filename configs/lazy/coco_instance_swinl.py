"""Table 3 for detectron2's LazyConfig: Swin-L, five scales, 50 epochs, mask-enhanced anchors."""

from detectron2.config import LazyCall as L

from maskdino.backbones import TimmBackbone
from maskdino.engine.plain_detectron2 import feature_shapes

from .coco_instance_R50 import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

features = ["res2", "res3", "res4", "res5"]
model.backbone = L(TimmBackbone)(
    name="swin_large_patch4_window12_384.ms_in22k",
    in_channels=3,
    out_features=features,
    pretrained=True,
    output_norm=True,
    batch_norm="FrozenBN",
    drop_path_rate=0.3,
    activation_checkpoint=False,
    freeze_at=0,
    arguments={},
)
shapes = L(feature_shapes)(res2=192, res3=384, res4=768, res5=1536)
model.encoder.input_shape = model.pixel_embedding.input_shape = shapes
model.encoder.in_features = features
model.encoder.sizes.num_levels = model.decoder.sizes.num_levels = 5
train["init_checkpoint"] = ""
