"""Stable matching (arXiv 2304.04742) against its formulas, pair by pair in plain numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskdino.config import load_config
from maskdino.losses.criterion import Criterion, denoising_matches
from maskdino.losses.functional import focal_cost, focal_loss, position_targets
from maskdino.losses.matcher import CostWeights, HybridMatcher
from maskdino.ops.points import PointSampler
from maskdino.structures import DenoisedOutputs, Matches, Predictions, Targets
from tests.helpers import drawn_batch, tiny_cfg, tiny_model
from tests.losses.drawn import FixedPoints, drawn_predictions, drawn_targets, named
from tests.losses.test_criterion import check_gradients, criterion_with, noised
from tests.ops.test_boxes import slow_giou

ALPHA, GAMMA = 0.25, 2
CLASS_ONLY = {"loss_class": 1.0}
INSTANCE = Path(__file__).resolve().parents[2] / "configs" / "coco" / "instance"


def corners(box: Tensor) -> list[float]:
    cx, cy, w, h = box.tolist()
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def slow_iou(box: Tensor, other: Tensor) -> float:
    a, b = corners(box), corners(other)
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = width * height if width > 0 and height > 0 else 0.0
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def bce(probability: Tensor, wanted: float) -> Tensor:
    return -wanted * probability.log() - (1 - wanted) * (1 - probability).log()


def slow_loss(
    predictions: Predictions, targets: Targets, matches: Matches, output: int, decoupled: bool
) -> Tensor:
    """Equation 3 of one output, not yet divided; Phi makes the largest of each image 1."""
    total = torch.zeros(())
    pairs = [
        (b, q, k)
        for o, b, q, k in zip(
            *(x.tolist() for x in (matches.output, matches.image, matches.query, matches.target)),
            strict=True,
        )
        if o == output
    ]
    probs = predictions.class_logits[output].sigmoid()
    for image in range(probs.shape[0]):
        here = {q: k for b, q, k in pairs if b == image}
        squared = {
            q: slow_iou(predictions.boxes[output, image, q], targets.boxes[k]) ** 2
            for q, k in here.items()
            if targets.is_thing[k] or not decoupled
        }
        best = max(squared.values(), default=1.0)
        for q, label in torch.cartesian_prod(*map(torch.arange, probs.shape[1:])).tolist():
            p = probs[image, q, label]
            if q in here and targets.labels[here[q]] == label:
                asked = squared[q] / best if q in squared else 1.0
                total = total + ALPHA * (asked - p).abs() ** GAMMA * bce(p, asked)
            else:
                total = total + (1 - ALPHA) * p**GAMMA * bce(p, 0.0)
    return total


@pytest.mark.parametrize("decoupled", [False, True])
def test_loss_equals_equation_3(decoupled: bool) -> None:
    """Of every output, with an image without objects and one whose only object is stuff."""
    targets = drawn_targets((3, 0, 4, 1))
    targets.is_thing[[1, 4, 7]] = False
    predictions, pixels = drawn_predictions(2, 4, 6)
    criterion = criterion_with(
        FixedPoints(),
        weights=CLASS_ONLY,
        position_supervised=True,
        decouple_stuff_boxes=decoupled,
    )
    found = criterion(named(predictions, "_layer1", ""), None, None, pixels, targets)
    matches = criterion.matcher(predictions, pixels, targets)
    expected = [slow_loss(predictions, targets, matches, o, decoupled) / 8 for o in (0, 1)]
    torch.testing.assert_close(found["loss_class_layer1"], expected[0])
    torch.testing.assert_close(found["loss_class"], expected[1])
    check_gradients(sum(found.values()), sum(expected), [predictions.class_logits])


def test_loss_of_noised_queries_equals_equation_3() -> None:
    """Their pairs of all groups are one training example, as in the authors' code."""
    targets = drawn_targets((1, 3))
    matched, pixels = drawn_predictions(1, 2, 4)
    predictions, _ = drawn_predictions(2, 2, 6)
    denoised = DenoisedOutputs(named(predictions, "_layer1", ""), noised(groups=2, slots=3))
    criterion = criterion_with(FixedPoints(), weights=CLASS_ONLY, position_supervised=True)
    found = criterion(named(matched, ""), None, denoised, pixels, targets)
    pairs = denoising_matches(denoised, targets)
    for output, name in enumerate(("loss_class_denoising_layer1", "loss_class_denoising")):
        expected = slow_loss(predictions, targets, pairs, output, decoupled=False) / (4 * 2)
        torch.testing.assert_close(found[name], expected)


def test_the_probability_asked_for_has_no_gradient() -> None:
    """Boxes learn from their own losses alone, as without the key."""
    predictions, pixels = drawn_predictions(2, 2, 5)
    criterion = criterion_with(FixedPoints(), weights=CLASS_ONLY, position_supervised=True)
    outputs = named(predictions, "_layer1", "")
    total = sum(criterion(outputs, None, None, pixels, drawn_targets((2, 3))).values())
    inputs = [predictions.class_logits, predictions.boxes]
    of_logits, of_boxes = torch.autograd.grad(total, inputs, allow_unused=True)
    assert of_boxes is None
    assert of_logits.abs().sum() > 0


def test_a_probability_as_asked_for_costs_nothing() -> None:
    logits = torch.tensor([[0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    asked = logits.detach().sigmoid() * torch.tensor([[1.0, 0.0]])
    loss = focal_loss(logits, torch.tensor([[1.0, 0.0]], dtype=torch.float64), asked)
    assert loss[0, 0].item() == pytest.approx(0, abs=1e-30)
    p = logits[0, 1].sigmoid().item()
    assert loss[0, 1].item() == pytest.approx(-0.75 * p**2 * math.log(1 - p))
    assert torch.autograd.grad(loss[0, 0], logits)[0].abs().max() < 1e-15


def pairs_of(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every query of boxes (O, B, Q, 4) is in a pair."""
    outputs, images, queries = torch.cartesian_prod(*map(torch.arange, boxes.shape[:3])).unbind(1)
    return outputs, images, queries


def test_the_best_box_of_an_image_is_asked_for_with_1() -> None:
    """However bad it is; of each output by itself."""
    wanted = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(12, 4)
    boxes = wanted.reshape(2, 2, 3, 4).clone()
    boxes[0, 0, :, 2] = torch.tensor([0.002, 0.001, 0.0005])  # IoU 0.01, 0.005, 0.0025
    boxes[0, 1, :, 0] = torch.tensor([0.5, 0.6, 0.9])  # 1, 1/3, 0
    boxes[1, 1, :, 0] = 0.9  # 0
    expected = [1, 1 / 4, 1 / 16, 1, 1 / 9, 0, 1, 1, 1, 0, 0, 0]
    found = position_targets(boxes, wanted, pairs_of(boxes))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_a_perfect_box_of_one_pixel_counts_in_full() -> None:
    """Beside a large one: IoU has no term that divides small areas."""
    boxes = torch.tensor([[[[0.5, 0.5, 1 / 2048, 1 / 2048], [0.5, 0.5, 0.8, 0.8]]]])
    found = position_targets(boxes, boxes[0, 0], pairs_of(boxes))
    torch.testing.assert_close(found, torch.ones(2))


@pytest.mark.parametrize("size", [0.0, 0.2])
def test_boxes_without_area_are_finite(size: float) -> None:
    targets, (predictions, pixels) = drawn_targets((2, 2)), drawn_predictions(1, 2, 4)
    with torch.no_grad():
        predictions.boxes[..., 2:] = 0.0
    targets.boxes[:, 2:] = size
    criterion = criterion_with(PointSampler(16, 3.0, 0.75), position_supervised=True)
    criterion.matcher.position_modulated = True
    found = criterion(named(predictions, ""), None, None, pixels, targets)
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()
    assert predictions.class_logits.grad.isfinite().all()


def test_stuff_without_box_loss_is_asked_for_as_before() -> None:
    """To the last bit, where there is nothing but stuff; learned boxes of stuff count."""
    targets = drawn_targets((2, 3), stuff=range(10))
    predictions, pixels = drawn_predictions(2, 2, 6)
    outputs, points = named(predictions, "_layer1", ""), FixedPoints()

    def losses(**options: bool) -> dict[str, Tensor]:
        return criterion_with(points, weights=CLASS_ONLY, **options)(
            outputs, None, None, pixels, targets
        )

    usual = losses()
    assert losses(position_supervised=True, decouple_stuff_boxes=True) == usual
    assert losses(position_supervised=True) != usual


@pytest.mark.parametrize("decoupled", [False, True])
def test_cost_equals_equation_4(decoupled: bool) -> None:
    """With the GIoU of each pair by itself; stuff whose box cost is decoupled keeps equation 2."""
    targets = drawn_targets((3, 0, 2), stuff=(0, 1))
    targets.is_thing[:2] = torch.tensor([True, False])
    predictions, _ = drawn_predictions(2, 3, 4)
    matcher = HybridMatcher(
        weights=CostWeights(1.0, 0.0, 0.0, 0.0, 0.0),
        decouple_stuff_boxes=decoupled,
        points=FixedPoints(),
        position_modulated=True,
    )
    costs = matcher.start(predictions, None, targets)._costs
    assert costs.shape == (2, 4, 5)
    for output, q, k in torch.cartesian_prod(*map(torch.arange, costs.shape)).tolist():
        image = 0 if k < 3 else 2
        p = predictions.class_logits[output, image, q, targets.labels[k]].sigmoid().item()
        if targets.is_thing[k] or not decoupled:
            box = predictions.boxes[output, image, q]
            p *= math.sqrt((slow_giou(corners(box), corners(targets.boxes[k])) + 1) / 2)
        expected = -ALPHA * (1 - p) ** GAMMA * math.log(p)
        expected += (1 - ALPHA) * p**GAMMA * math.log(1 - p)
        assert costs[output, q, k].item() == pytest.approx(expected, abs=1e-4)


def test_the_better_box_is_matched_where_classes_say_the_same() -> None:
    """By the class cost alone."""
    targets = drawn_targets((1,))
    predictions, _ = drawn_predictions(1, 1, 3)
    with torch.no_grad():
        predictions.class_logits.zero_()
        predictions.boxes[0, 0] = targets.boxes[0] + torch.tensor([[0.3], [0.01], [0.1]])
        predictions.class_logits[0, 0, 0] = 0.01  # would be matched by its class
    for modulated, query in ((False, 0), (True, 1)):
        weights = CostWeights(4.0, 0.0, 0.0, 0.0, 0.0)
        matcher = HybridMatcher(
            weights=weights,
            decouple_stuff_boxes=False,
            points=FixedPoints(),
            position_modulated=modulated,
        )
        assert matcher(predictions, None, targets).query.tolist() == [query]


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_extreme_logits_stay_finite(value: float) -> None:
    logits = torch.full((2, 3), value, requires_grad=True)
    loss = focal_loss(logits, torch.ones(2, 3), torch.full((2, 3), 0.4)).sum()
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert focal_cost(logits.detach(), torch.rand(2, 3)).isfinite().all()


@pytest.mark.parametrize("objects", [(0, 0), (0, 3)])
def test_a_step_of_the_model_is_finite(objects: tuple[int, int]) -> None:
    """With stuff, denoising, proposals and all outputs, also where there is nothing to find."""
    model = tiny_model(LOSS__POSITION_SUPERVISED=True, MATCHER__POSITION_MODULATED=True).train()
    assert model.criterion.position_supervised and model.criterion.matcher.position_modulated
    total = sum(model(drawn_batch(((64, 64), (48, 80)), objects)).values())
    total.backward()
    assert total.isfinite()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients)


NO_BOXES = {"LOSS__L1_WEIGHT": 0.0, "LOSS__GIOU_WEIGHT": 0.0}


@pytest.mark.parametrize("key", ["LOSS__POSITION_SUPERVISED", "MATCHER__POSITION_MODULATED"])
def test_boxes_that_are_not_learned_are_refused(key: str) -> None:
    """As with masks alone (table 11 of Mask DINO): an IoU of such boxes says nothing."""
    with pytest.raises(ValueError, match=f"{key.replace('__', '.')} compares boxes"):
        Criterion(tiny_cfg(**{key: True}, **NO_BOXES))
    Criterion(tiny_cfg(**{key: True}, LOSS__L1_WEIGHT=0.0))
    Criterion(tiny_cfg(**NO_BOXES))


def test_cross_entropy_is_refused() -> None:
    with pytest.raises(ValueError, match="POSITION_SUPERVISED is a form of the focal loss"):
        Criterion(tiny_cfg(LOSS__POSITION_SUPERVISED=True, LOSS__CLASSIFICATION="cross_entropy"))


def test_configuration_changes_nothing_else() -> None:
    stable = load_config(str(INSTANCE / "maskdino_R50_12ep_stable.yaml"))
    usual = load_config(
        str(INSTANCE / "maskdino_R50_12ep.yaml"),
        [
            "MODEL.MASK_DINO.LOSS.POSITION_SUPERVISED",
            "True",
            "MODEL.MASK_DINO.MATCHER.POSITION_MODULATED",
            "True",
        ],
    )
    assert stable == usual
