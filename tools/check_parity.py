#!/usr/bin/env python3
"""Compares this project with worked cases of the released one: outputs, losses, gradients.

    python tools/check_parity.py [--case NAME] [--folder FOLDER]

FOLDER (tests/data/parity, whose README describes the format) holds NAME_config.yaml (released
keys), NAME_parameters.tsv and make_weights.py (which make the weights), NAME_inputs.npz and
NAME_expected.npz; without --case all of its cases are compared. The exit status is 0 only if
outputs, results and losses agree to 1e-4 and gradient norms to 1e-3, relative to the largest
magnitude of each.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from detectron2.structures import BitMasks, Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskdino.checkpoint.released_config import convert_config
from maskdino.checkpoint.released_weights import ReleasedStructure, convert_weights, our_names
from maskdino.config import load_config
from maskdino.model import MaskDINO
from maskdino.ops import PointSampler, mask_logits
from maskdino.structures import PackedMasks
from maskdino.targets import prepare_targets

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "data" / "parity"
VALUE_BOUND, GRADIENT_BOUND = 1e-4, 1e-3
OUTPUT_SIZE = (256, 320)  # height and width that the cases ask for
RELEASED_TERMS = {
    "loss_class": "loss_ce",
    "loss_l1": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_mask_bce": "loss_mask",
    "loss_mask_dice": "loss_dice",
}


class FixedPoints(PointSampler):
    """Gives the same points at every draw."""

    def __init__(self, points: Tensor) -> None:
        super().__init__(len(points), 1.0, 0.0)
        self.points = points

    def sample_uniform(self, number: int, device: torch.device) -> Tensor:
        """See `PointSampler`; (number, points, 2)."""
        return self.points.to(device).expand(number, -1, -1)

    def sample_uncertain(self, maps: Tensor) -> Tensor:
        """See `PointSampler`; (maps, points, 2)."""
        return self.points.to(maps.device).expand(len(maps), -1, -1)


class Case:
    """A worked case: our model with its weights, its inputs, and what it must compute."""

    def __init__(self, folder: Path, name: str, device: str = "cpu") -> None:
        self.inputs = dict(np.load(folder / f"{name}_inputs.npz"))
        self.expected = dict(np.load(folder / f"{name}_expected.npz"))
        made = runpy.run_path(str(folder / "make_weights.py"))["released_weights"](
            str(folder / f"{name}_parameters.tsv")
        )
        self.weights = {key: torch.from_numpy(value) for key, value in made.items()}
        self.cfg = load_config()
        convert_config(yaml.safe_load((folder / f"{name}_config.yaml").read_text()), self.cfg)
        self.cfg.MODEL.DEVICE = device
        self.model = MaskDINO(self.cfg).to(device)
        heads = self.cfg.MODEL.MASK_DINO.ENCODER.NUM_HEADS
        missing, unexpected = self.model.load_state_dict(
            convert_weights(self.weights, heads), strict=False
        )
        buffers = ("num_batches_tracked", "relative_position_index")
        missing = [key for key in missing if not key.endswith(buffers)]
        if self.model.denoising is None:  # released files keep its embedding
            unexpected = [key for key in unexpected if not key.startswith("denoising.")]
        if missing or unexpected:
            raise ValueError(
                f"weights do not fit: missing {missing[:8]}, left over {unexpected[:8]}"
            )
        self.images = torch.from_numpy(self.inputs["images"]).float().to(device)

    def normalized(self) -> Tensor:
        """The images as the network takes them, (B, 3, H, W)."""
        return self.model.preprocess([{"image": image} for image in self.images]).tensor

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[str, Tensor]]:
        """What `eval/...` names: the last layer's predictions and the encoder's."""
        model = self.model.eval()
        images = self.normalized()
        predictions, pixels = model.predict(images)
        yield "eval/pred_logits", predictions.class_logits
        yield "eval/pred_boxes", predictions.boxes
        yield "eval/pred_masks", mask_logits(predictions.mask_embeddings, pixels)
        memory, pixels = model._encode(images)
        _, proposals = model.query_selection(memory, pixels, model.heads)
        if proposals is not None:
            yield "eval/interm_logits", proposals.class_logits
            yield "eval/interm_boxes", proposals.boxes

    @torch.no_grad()
    def results(self) -> Iterator[tuple[str, Tensor]]:
        """What `result/<image>/...` names: after post-processing."""
        height, width = OUTPUT_SIZE
        inputs = [{"image": image, "height": height, "width": width} for image in self.images]
        for i, result in enumerate(self.model.eval()(inputs)):
            if "instances" in result:
                instances = result["instances"]
                yield f"result/{i}/instances/scores", instances.scores
                yield f"result/{i}/instances/classes", instances.pred_classes
                yield f"result/{i}/instances/boxes", instances.pred_boxes.tensor
                yield f"result/{i}/instances/mask_area", instances.pred_masks.sum((1, 2))
            if "sem_seg" in result:
                yield f"result/{i}/sem_seg", result["sem_seg"]
                classes = result["sem_seg"].argmax(0).flatten()
                counts = torch.bincount(classes, minlength=len(result["sem_seg"]))
                yield f"result/{i}/sem_seg_argmax_hist", counts
            if "panoptic_seg" in result:
                ids, segments = result["panoptic_seg"]
                yield f"result/{i}/panoptic_seg", ids
                keys = ("id", "category_id", "isthing")
                rows = [[int(segment[key]) for key in keys] for segment in segments]
                yield f"result/{i}/panoptic_segments", torch.tensor(rows).reshape(-1, len(keys))

    def losses(self) -> dict[str, Tensor]:
        """Weighted losses under released names, with every random point replaced by the case's."""
        model = self.model.train()
        points = FixedPoints(torch.from_numpy(self.inputs["points"]).float())
        model.criterion.points = model.criterion.matcher.points = points
        images = self.normalized()
        instances = []
        for i in range(len(self.images)):
            masks = torch.from_numpy(self.inputs[f"masks_{i}"]).bool()
            of_image = Instances(tuple(masks.shape[1:]))
            of_image.gt_classes = torch.from_numpy(self.inputs[f"labels_{i}"]).long()
            of_image.gt_boxes = BitMasks(masks).get_bounding_boxes()
            of_image.gt_masks = PackedMasks.from_bool(masks)
            instances.append(of_image)
        canvas = tuple(images.shape[-2:])
        targets = prepare_targets(instances, canvas, model.is_thing, images.device)
        first = 1 - int(model.criterion.supervise_initial)
        return {
            released_loss_name(name, first): loss
            for name, loss in model.losses(images, targets).items()
        }

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the gradient of each released parameter; 0 of those that take no part.

        Reordering levels does not change a norm.
        """
        shapes = {k: tuple(v.shape) for k, v in self.weights.items()}
        structure = ReleasedStructure.from_shapes(shapes)
        parameters = self.model.named_parameters()
        gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        return {
            f"grad_norm/{name}": gradients[ours].norm().item() if ours in gradients else 0.0
            for name, ours in our_names(self.weights, structure).items()
        }


def released_loss_name(name: str, first_layer: int = 0) -> str:
    """`loss_l1_denoising_layer2` to `loss/loss_bbox_dn_2`; numbers count from `first_layer`."""
    found = re.fullmatch(r"(loss_\w+?)(_denoising)?(_initial|_proposal|_layer\d+)?", name)
    suffix = {None: "", "_initial": "_0", "_proposal": "_interm"}.get(found[3])
    if suffix is None:
        suffix = f"_{int(found[3].removeprefix('_layer')) - first_layer}"
    return f"loss/{RELEASED_TERMS[found[1]]}{'_dn' if found[2] else ''}{suffix}"


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest magnitude that is expected."""
    if ours.shape != expected.shape:
        return float("inf")
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6)
    return float(np.abs(ours.astype(np.float64) - expected).max(initial=0.0)) / scale


def pooled(ours: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """What a case may have kept of a map: means over blocks of (K, height, width) values.

    Of (height, width) segments, which have no mean, it is the upper left pixel of each block.
    """
    is_map = ours.ndim in (2, 3) and ours.ndim == expected.ndim
    if not is_map or ours.shape[-1] == expected.shape[-1]:
        return ours
    sizes = zip(ours.shape[-2:], expected.shape[-2:], strict=True)
    block = tuple(max(1, have // max(1, want)) for have, want in sizes)
    if ours.ndim == 2:
        return ours[:: block[0], :: block[1]]
    return F.avg_pool2d(torch.from_numpy(ours)[None], block)[0].numpy()


def align_instances(
    computed: dict[str, np.ndarray], expected: dict[str, np.ndarray], image: int
) -> None:
    """Puts our instances of an image in the expected order, which is not defined (in place)."""
    prefix = f"result/{image}/instances/"
    theirs, ours = (known.get(f"{prefix}boxes") for known in (expected, computed))
    if theirs is None or ours is None or len(theirs) != len(ours):
        return
    distance = np.abs(theirs[:, None] - ours).sum(-1)
    other_class = expected[f"{prefix}classes"][:, None] != computed[f"{prefix}classes"]
    distance = distance + other_class * distance.max(initial=0.0)
    order = linear_sum_assignment(distance)[1]
    for name in [name for name in computed if name.startswith(prefix)]:
        computed[name] = computed[name][order]


def compare(case: Case) -> Iterator[tuple[str, float, float]]:
    """Yields (quantity, relative error, bound).

    An expected quantity that we do not compute has an infinite error, but a loss of weight 0 is 0.
    """
    computed = {name: value.cpu().numpy() for name, value in (*case.outputs(), *case.results())}
    for image in range(len(case.images)):
        align_instances(computed, case.expected, image)
    losses = case.losses()
    sum(losses.values()).backward()
    computed |= {name: loss.detach().cpu().numpy() for name, loss in losses.items()}
    computed |= {name: np.asarray(norm) for name, norm in case.gradient_norms().items()}
    for name in sorted(losses.keys() - case.expected.keys()):
        yield f"{name} (not expected)", float("inf"), VALUE_BOUND
    for name, expected in case.expected.items():
        bound = GRADIENT_BOUND if name.startswith("grad_norm/") else VALUE_BOUND
        ours = computed.get(name, np.zeros(()) if name.startswith("loss/") else None)
        error = float("inf") if ours is None else relative_error(pooled(ours, expected), expected)
        yield name, error, bound


def report(case: Case, name: str) -> bool:
    """Prints one line for each quantity, then the verdict, which is returned."""
    failed = 0
    worst: dict[str, float] = {}
    for quantity, error, bound in compare(case):
        ok = error <= bound
        failed += not ok
        group = quantity.split("/")[0]
        worst[group] = max(worst.get(group, 0.0), error)
        print(f"{'ok  ' if ok else 'FAIL'} {error:9.2e}  {quantity}")
    print("; ".join(f"{group}: {error:.1e}" for group, error in worst.items()))
    print(f"case {name}: {'passed' if not failed else f'{failed} quantities differ'}")
    return not failed


def main(arguments: list[str] | None = None) -> int:
    """Compares the cases that are asked for; the exit status is 0 only if all pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the worked cases")
    parser.add_argument("--case", help="name of the case, such as instance; by default all")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(arguments)
    suffix = "_expected.npz"
    found = sorted(path.name.removesuffix(suffix) for path in asked.folder.glob(f"*{suffix}"))
    if not found or (asked.case and asked.case not in found):
        parser.error(f"no case {asked.case or ''} in {asked.folder}; found: {found}")
    names = [asked.case] if asked.case else found
    passed = [report(Case(asked.folder, name, asked.device), name) for name in names]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
