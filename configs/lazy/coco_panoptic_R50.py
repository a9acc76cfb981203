"""Table 4 for detectron2's LazyConfig: R50, 50 epochs, 300 queries, 80 things and 53 of stuff."""

from detectron2.config import LazyCall as L
from detectron2.evaluation import DatasetEvaluators

from maskdino.data.mappers import PanopticMapper
from maskdino.evaluation.panoptic import PanopticEvaluator
from maskdino.evaluation.semantic import SemanticEvaluator

from .coco_instance_R50 import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

things, num_classes = 80, 133
model.is_thing = [number < things for number in range(num_classes)]
model.heads.num_classes = num_classes
model.query_selection.mask_enhanced_anchors = "none"
model.inference.panoptic_on = model.inference.semantic_on = True

mapper = dataloader.train.mapper
dataloader.train.dataset.names = "coco_2017_train_panoptic"
dataloader.train.mapper = L(PanopticMapper)(
    augmentations=mapper.augmentations,
    image_format=mapper.image_format,
    num_classes="${model.heads.num_classes}",
    thing_classes=list(range(things)),
)
dataloader.test.dataset.names = "coco_2017_val_panoptic_with_sem_seg"
where = {
    "dataset_name": "${dataloader.test.dataset.names}",
    "output_folder": "${train.output_dir}",
}
dataloader.evaluator = L(DatasetEvaluators)(
    evaluators=[
        L(PanopticEvaluator)(**where),
        dataloader.evaluator,
        L(SemanticEvaluator)(**where),
    ]
)
