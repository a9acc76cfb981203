"""The four kinds of models at a small size, and how two devices are compared.

Shape key: B images, Q queries, K classes, C channels; H, W of the pixel embedding; h, w pixels of
an image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskdino.model import MaskDINO
from maskdino.ops.points import mask_logits
from maskdino.structures import Predictions
from tests.helpers import drawn_batch, tiny_cfg

# Heads of 32 channels, as in the shipped models: other sizes take other kernels.
WIDTH = {"HIDDEN_DIM": 64, "ENCODER__NUM_HEADS": 2, "DECODER__NUM_HEADS": 2}
TASKS = {
    "instance": {},
    "panoptic": {
        "TEST__PANOPTIC_ON": True,
        "TEST__SEMANTIC_ON": True,
        "TEST__PANOPTIC_OVERLAP_THRESHOLD": 0.02,  # random masks overlap a lot
        "QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "bitmask",
    },
    "semantic": {
        "QUERY_SELECTION__ENABLED": False,
        "LOSS__CLASSIFICATION": "cross_entropy",
        "TEST__INSTANCE_ON": False,
        "TEST__SEMANTIC_ON": True,
    },
    "boxes": {"MASK_ON": False},
}
SIZES = ((64, 96), (60, 80))  # of the two images of a batch
THINGS = 3  # classes that are things where there is stuff


def make_cfg(task: str, **overrides: object) -> CfgNode:
    """Configuration of a narrow model; `overrides` as for `tiny_cfg`."""
    cfg = tiny_cfg(**(WIDTH | TASKS[task] | overrides))
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    return cfg


def make_model(cfg: CfgNode, *, class_spread: float = 0.5, seed: int = 0) -> MaskDINO:
    """A model on the CPU, with weights more like those of a trained one.

    None are zero, so that all parts take part. With the default spread of the class head's weights
    some objects are there, but far from all; with less, the model is at the start of training.
    """
    torch.manual_seed(seed)
    model = MaskDINO(cfg)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.05)
        model.heads.class_head.weight.normal_(std=class_spread)
        model.heads.class_head.bias.fill_(-1.0 if class_spread > 0.1 else -3.0)
    if model.inference.panoptic_on:
        model.is_thing[THINGS:] = False
    return model


def make_batch(task: str, counts: tuple[int, int] = (5, 3), seed: int = 1) -> list[dict]:
    """Two images with so many objects; the second one is asked for at another size."""
    torch.manual_seed(seed)
    batch = drawn_batch(SIZES, counts, masks=task != "boxes")
    batch[1] |= {"height": 90, "width": 120}
    return batch


def copy_to(model: MaskDINO, device: torch.device) -> MaskDINO:
    """The same weights on another device."""
    return copy.deepcopy(model).to(device)


class HostRandom(TorchFunctionMode):
    """Draws random numbers on the CPU, so that all devices get the same."""

    DRAWN = (torch.rand, torch.randn, torch.randint, torch.randperm)
    DRAWN_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in self.DRAWN:
            device = torch.device(kwargs.pop("device", None) or "cpu")
        elif function in self.DRAWN_LIKE:
            device, args = args[0].device, (args[0].cpu(), *args[1:])
        else:
            return function(*args, **kwargs)
        return function(*args, **kwargs).to(device)


@contextmanager
def same_draws(seed: int = 2) -> Iterator[None]:
    """Random numbers that depend on the seed alone, not on the device."""
    torch.manual_seed(seed)
    with HostRandom():
        yield


def to_host(outputs: list[dict]) -> list[dict]:
    """Copies results to the CPU."""
    return [{name: _host(value) for name, value in of_image.items()} for of_image in outputs]


def _host(value: Tensor | Instances | tuple) -> Tensor | Instances | tuple:
    if isinstance(value, tuple):  # a panoptic map and its segments
        return value[0].cpu(), value[1]
    return value.to("cpu")


def error_of(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a part of the largest expected magnitude."""
    found, expected = (x.detach().double().cpu() for x in (found, expected))
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max())


def summary(predictions: Predictions, pixels: Tensor | None) -> Tensor:
    """What all queries say together, whatever their order.

    Returns:
        Without masks (B, K, 4), the boxes by class; else (B, K, H, W), the masks by class.
    """
    scores = predictions.class_logits.double().sigmoid()
    if pixels is None:
        return torch.einsum("bqk,bqx->bkx", scores, predictions.boxes.double())
    masks = mask_logits(predictions.mask_embeddings.double(), pixels.double()).sigmoid()
    return torch.einsum("bqk,bqhw->bkhw", scores, masks)


def assert_same_results(found: list[dict], expected: list[dict]) -> None:
    """Results of two devices: equal to rounding, and up to ties."""
    for ours, theirs in zip(to_host(found), to_host(expected), strict=True):
        assert ours.keys() == theirs.keys()
        if "instances" in theirs:
            assert_same_instances(ours["instances"], theirs["instances"])
        if "panoptic_seg" in theirs:
            (ids, segments), (their_ids, their_segments) = (
                x["panoptic_seg"] for x in (ours, theirs)
            )
            assert_almost_everywhere(ids, their_ids)
            labels = [[s["category_id"] for s in x] for x in (segments, their_segments)]
            assert labels[0] == labels[1]
            assert labels[1]
        if "sem_seg" in theirs:
            assert error_of(ours["sem_seg"], theirs["sem_seg"]) < 1e-3


def assert_same_instances(found: Instances, expected: Instances) -> None:
    """Each instance of one side has a partner of nearly the same score on the other."""
    assert found.image_size == expected.image_size
    assert found.get_fields().keys() == expected.get_fields().keys()
    assert len(found) == len(expected) > 0
    left = set(range(len(found)))
    for i in range(len(expected)):
        same = (
            (found.pred_classes == expected.pred_classes[i])
            & ((found.scores - expected.scores[i]).abs() < 1e-3)
            & ((found.pred_boxes.tensor - expected.pred_boxes.tensor[i]).abs().amax(1) < 0.05)
        )
        partners = [j for j in same.nonzero()[:, 0].tolist() if j in left]
        assert partners, f"{expected[i]} has no partner in {found}"
        partner = min(
            partners, key=lambda j, i=i: float((found.scores[j] - expected.scores[i]).abs())
        )
        left.remove(partner)
        if expected.has("pred_masks"):
            assert_almost_everywhere(found.pred_masks[partner], expected.pred_masks[i])


def assert_almost_everywhere(found: Tensor, expected: Tensor) -> None:
    """Equal maps, but for a few pixels at borders."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert int((found != expected).sum()) <= 2e-3 * expected.numel()
