"""A model of a few weights in Mask DINO's place, to test training without its cost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from maskdino.config import load_config
from maskdino.engine.trainer import MaskDINOTrainer

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nuclei" / "Base-Nuclei.yaml"


@META_ARCH_REGISTRY.register()
class StandIn(nn.Module):
    """Guesses how many objects an image has; predicts one instance in its middle.

    Losses are means over images. With ``SUPERVISE_INITIAL``, one is of random numbers, as the
    points and the noise of the real model are.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 16, stride=16)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 1)
        self.random = cfg.MODEL.MASK_DINO.LOSS.SUPERVISE_INITIAL

    def forward(self, images: list[dict]) -> dict[str, Tensor] | list[dict]:
        if not self.training:
            return [{"instances": self._middle(image)} for image in images]
        pixels = torch.stack([image["image"].float() / 255 for image in images])
        features = self.norm(self.backbone(pixels).mean(dim=(2, 3)))
        counts = torch.tensor([[len(image["instances"]) / 10] for image in images])
        losses = {"loss_class": (self.head(features) - counts).square().mean()}
        if self.random:
            losses["loss_class_noise"] = (features * torch.randn_like(features)).mean()
        return losses

    def _middle(self, image: dict) -> Instances:
        height, width = image["height"], image["width"]
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, height // 4 : height // 2, width // 4 : width // 2] = True
        box = [[width // 4, height // 4, width // 2, height // 2]]
        score = image["image"].float().mean().reshape(1) / 255
        return Instances(
            (height, width),
            pred_boxes=Boxes(torch.tensor(box)),
            pred_masks=mask,
            scores=score,
            pred_classes=torch.zeros(1, dtype=torch.long),
        )


def tiny_config(output: Path, *overrides: object) -> CfgNode:
    """Six iterations on small nuclei images, without evaluation."""
    settings: tuple[object, ...] = (
        *("MODEL.META_ARCHITECTURE", "StandIn", "MODEL.DEVICE", "cpu"),
        *("OUTPUT_DIR", output, "SEED", 5, "INPUT.LSJ.SIZE", "[64, 64]"),
        *(
            "SOLVER.IMS_PER_BATCH",
            4,
            "SOLVER.MAX_ITER",
            6,
            "SOLVER.STEPS",
            "(4,)",
            "SOLVER.CHECKPOINT_PERIOD",
            2,
        ),
        *("SOLVER.WARMUP_ITERS", 2, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", "()"),
    )
    return load_config(str(CONFIG), [str(word) for word in (*settings, *overrides)])


def train(cfg: CfgNode, *, resume: bool = False, kill_after: int | None = None) -> MaskDINOTrainer:
    """Trains; with ``kill_after``, the process is killed after that iteration."""
    trainer = MaskDINOTrainer(cfg)
    if kill_after is not None:

        def kill(running: MaskDINOTrainer) -> None:
            if running.iter == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.register_hooks([CallbackHook(after_step=kill)])
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def train_in_process(cfg: CfgNode) -> None:
    """Trains, for processes that return nothing."""
    train(cfg)


def resume_in_process(cfg: CfgNode) -> None:
    """Goes on with a training."""
    train(cfg, resume=True)


def read_checkpoint(folder: Path, name: str = "model_final.pth") -> dict:
    """Reads a checkpoint without running code from it."""
    return torch.load(folder / name, weights_only=True)
