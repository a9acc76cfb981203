"""Table 3 for detectron2's LazyConfig: R50, 50 epochs, 300 queries; as the YAML file of this name.

Trained by detectron2's tools/lazyconfig_train_net.py; docs/detectron2.md shows how.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from maskdino.backbones.frozen_norm import keep_frozen_norms
from maskdino.data.mappers import InferenceMapper, InstanceMapper
from maskdino.data.transforms import LargeScaleJitter
from maskdino.engine.plain_detectron2 import clipped_adamw, feature_shapes
from maskdino.engine.solver import parameter_groups
from maskdino.evaluation.coco import COCOInstanceEvaluator
from maskdino.losses.criterion import Criterion
from maskdino.losses.matcher import CostWeights, HybridMatcher
from maskdino.model import MaskDINO
from maskdino.modeling.attention import LayerSizes
from maskdino.modeling.decoder import Decoder
from maskdino.modeling.denoising import DenoisingQueries
from maskdino.modeling.encoder import MultiScaleDeformableEncoder, PixelEmbedding
from maskdino.modeling.heads import PredictionHeads
from maskdino.modeling.query_selection import UnifiedQuerySelection
from maskdino.ops.points import PointSampler
from maskdino.postprocess.options import InferenceOptions

gpu = torch.cuda.is_available()
num_classes = "${model.heads.num_classes}"  # which own data change, and model.is_thing
width = 256  # of tokens and queries
shapes = L(feature_shapes)(res2=256, res3=512, res4=1024, res5=2048)
sizes = L(LayerSizes)(
    hidden_dim=width, num_heads=8, num_levels=4, num_points=4, feedforward_dim=2048
)
points = L(PointSampler)(num_points=12544, oversample_ratio=3.0, importance_ratio=0.75)

# Modules in the order in which the YAML configuration makes them: a seed gives the same weights.
model = L(MaskDINO)(
    backbone=L(keep_frozen_norms)(
        module=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=0,
        ),
    ),
    encoder=L(MultiScaleDeformableEncoder)(
        input_shape=shapes,
        in_features=["res3", "res4", "res5"],
        num_layers=6,
        sizes=sizes,
    ),
    pixel_embedding=L(PixelEmbedding)(input_shape=shapes, in_feature="res2", hidden_dim=width),
    heads=L(PredictionHeads)(hidden_dim=width, num_classes=80, no_object=False, mask_on=True),
    query_selection=L(UnifiedQuerySelection)(
        hidden_dim=width,
        num_queries=300,
        mask_enhanced_anchors="mask2box",
        empty_masks="box",
        largest_proposals="coarsest",
    ),
    denoising=L(DenoisingQueries)(
        hidden_dim=width,
        num_classes=num_classes,
        num_queries=100,
        label_noise=0.2,
        box_noise=0.4,
        with_masks=True,
    ),
    decoder=L(Decoder)(num_layers=9, sizes=sizes),
    criterion=L(Criterion)(
        matcher=L(HybridMatcher)(
            weights=L(CostWeights)(
                class_weight=4.0,
                l1_weight=5.0,
                giou_weight=2.0,
                mask_bce_weight=5.0,
                mask_dice_weight=5.0,
            ),
            decouple_stuff_boxes=True,
            points=points,
        ),
        points=points,
        weights={
            "loss_class": 4.0,
            "loss_l1": 5.0,
            "loss_giou": 2.0,
            "loss_mask_bce": 5.0,
            "loss_mask_dice": 5.0,
        },
        cross_entropy=False,
        no_object_weight=0.1,
        decouple_stuff_boxes=True,
        deep_supervision=True,
        supervise_initial=True,
    ),
    inference=L(InferenceOptions)(
        instance_on=True,
        panoptic_on=False,
        semantic_on=False,
        decoder_layer=-1,
        max_detections=100,
        score_threshold=0.0,
        mask_scoring=True,
        panoptic_score_threshold=0.25,
        panoptic_overlap_threshold=0.8,
        temperature=0.06,
        resize_before_sum=False,
        cross_entropy=False,
        precision="auto",
        cuda_graphs=True,
    ),
    is_thing=[True] * 80,
    size_divisibility=32,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)

dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
    mapper=L(InstanceMapper)(
        augmentations=[
            L(RandomFlip)(horizontal=True, vertical=False),
            L(LargeScaleJitter)(size=[1024, 1024], min_scale=0.1, max_scale=2.0),
        ],
        image_format="RGB",
        num_classes=num_classes,
        use_masks=True,
    ),
    total_batch_size=16,
    num_workers=4,
    aspect_ratio_grouping=False,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
    mapper=L(InferenceMapper)(
        augmentations=[
            L(ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
        ],
        image_format="RGB",
        num_classes=num_classes,
    ),
    num_workers=4,
)
dataloader.evaluator = L(COCOInstanceEvaluator)(
    dataset_name="${dataloader.test.dataset.names}",
    output_folder="${train.output_dir}",
    with_masks=True,
    fast=False,
)

optimizer = L(clipped_adamw)(
    params=L(parameter_groups)(
        learning_rate="${optimizer.lr}",
        backbone_multiplier=0.1,
        bias_multiplier=1.0,
        weight_decay=0.05,
        weight_decay_norm=0.0,
        weight_decay_embed=0.0,
        weight_decay_bias=None,
    ),
    lr=0.0001,
    clip_norm=0.01,
)
lr_multiplier = L(MultiStepParamScheduler)(
    values=[1.0, 0.1, 0.01], milestones=[327778, 355092], num_updates="${train.max_iter}"
)
train = {
    "output_dir": "./output",
    "init_checkpoint": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "max_iter": 368750,
    "amp": {"enabled": gpu},
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda" if gpu else "cpu",
}
