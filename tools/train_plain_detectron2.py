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
        """AdamW, and the clipping of SOLVER.CLIP_GRADIENTS."""
        return maskdino.build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO's AP of boxes and masks."""
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


if __name__ == "__main__":
    cfg = get_cfg()
    maskdino.add_maskdino_config(cfg)
    cfg.merge_from_file(sys.argv[1])
    cfg.merge_from_list(sys.argv[2:])
    maskdino.adapt_to_detectron2(cfg)  # keys of detectron2's mapper; the CPU where there is no GPU
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
