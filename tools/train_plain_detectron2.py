"""Trains Mask DINO with detectron2's own trainer, data loading and evaluation, in a few lines.

python tools/train_plain_detectron2.py configs/coco/instance/maskdino_R50.yaml OUTPUT_DIR output
"""

import sys

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator

import maskdino  # registers Mask DINO with detectron2


class Trainer(DefaultTrainer):
    """Detectron2's, with the optimizer of the paper."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """AdamW; clips nothing."""
        decay = cfg.SOLVER.WEIGHT_DECAY
        return torch.optim.AdamW(model.parameters(), cfg.SOLVER.BASE_LR, weight_decay=decay)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's AP of boxes and masks."""
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR, use_fast_impl=False)


if __name__ == "__main__":
    cfg = get_cfg()
    maskdino.add_maskdino_config(cfg)
    cfg.merge_from_file(sys.argv[1])
    cfg.merge_from_list(["MODEL.MASK_ON", True, *sys.argv[2:]])  # detectron2's mapper reads masks
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
