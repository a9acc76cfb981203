"""The criterion against a slow computation: loops over outputs, images, queries and objects."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.losses import criterion as criterion_module
from maskdino.losses import functional
from maskdino.losses.criterion import Criterion, denoising_matches
from maskdino.losses.matcher import HybridMatcher
from maskdino.ops.points import PointSampler, sample_maps
from maskdino.structures import DenoisedOutputs, Denoising, Matches, Predictions, Queries, Targets
from tests.helpers import tiny_cfg
from tests.losses.drawn import SIZE, FixedPoints, drawn_predictions, drawn_targets, named
from tests.losses.test_matcher import WEIGHTS as COST_WEIGHTS

WEIGHTS = {
    "loss_class": 4.0,
    "loss_l1": 5.0,
    "loss_giou": 2.0,
    "loss_mask_bce": 5.0,
    "loss_mask_dice": 3.0,
}


def criterion_with(points: PointSampler, **overrides: object) -> Criterion:
    """A criterion for focal loss and coupled boxes, but for `overrides`."""
    options = {
        "matcher": HybridMatcher(weights=COST_WEIGHTS, decouple_stuff_boxes=False, points=points),
        "points": points,
        "weights": WEIGHTS,
        "cross_entropy": False,
        "no_object_weight": 0.1,
        "decouple_stuff_boxes": False,
        "deep_supervision": True,
        "supervise_initial": True,
    }
    return Criterion(**(options | overrides))


def slow_class_loss(
    logits: Tensor, assigned: dict[tuple[int, int], int], targets: Targets, cross_entropy: bool
) -> Tensor:
    """Class loss of one output (B, Q, K); `assigned` maps (image, query) to an object."""
    images, queries, classes = logits.shape
    total, weight = torch.zeros(()), 0.0
    for b in range(images):
        for q in range(queries):
            label = targets.labels[assigned[b, q]].item() if (b, q) in assigned else None
            if cross_entropy:
                wanted = classes - 1 if label is None else label
                share = 0.1 if label is None else 1.0
                total = total - share * logits[b, q].log_softmax(0)[wanted]
                weight += share
            else:
                wanted = torch.zeros(classes)
                if label is not None:
                    wanted[label] = 1
                total = total + functional.focal_loss(logits[b, q], wanted).sum()
    return total / weight if cross_entropy else total / max(1, len(targets))


def slow_losses(
    predictions: Predictions,
    pixels: Tensor,
    targets: Targets,
    matches: Matches,
    points: Tensor,
    *,
    cross_entropy: bool = False,
    decoupled: bool = False,
    more: float = 1.0,
) -> list[dict[str, Tensor]]:
    """Weighted terms of each output, object by object, from maps and float masks.

    `more` multiplies the number of objects that divides (groups of noised queries).
    """
    results, masks = [], targets.masks.to_bool().float()
    normalizer = max(1, len(targets)) * more
    for output in range(len(predictions.boxes)):
        sums = dict.fromkeys(WEIGHTS, torch.zeros(()))
        assigned = {}
        for o, b, q, k in zip(
            *(x.tolist() for x in (matches.output, matches.image, matches.query, matches.target)),
            strict=True,
        ):
            if o != output:
                continue
            assigned[b, q] = k
            box, wanted = predictions.boxes[o, b, q], targets.boxes[k]
            if targets.is_thing[k] or not decoupled:
                sums["loss_l1"] = sums["loss_l1"] + functional.l1_loss(box, wanted)
                sums["loss_giou"] = sums["loss_giou"] + functional.giou_loss(box, wanted)
            if targets.has_mask[k]:
                embedding = predictions.mask_embeddings[o, b, q]
                whole = torch.einsum("c,chw->hw", embedding, pixels[b])
                logits = sample_maps(whole[None, None], points[None])[0]
                label = sample_maps(masks[k][None, None], points[None])[0]
                bce = F.binary_cross_entropy_with_logits(logits, label)
                sums["loss_mask_bce"] = sums["loss_mask_bce"] + bce
                dice = functional.mask_dice_loss(logits, label)[0]
                sums["loss_mask_dice"] = sums["loss_mask_dice"] + dice
        terms = {term: value / normalizer for term, value in sums.items()}
        logits = predictions.class_logits[output]
        of_class = slow_class_loss(logits, assigned, targets, cross_entropy)
        terms["loss_class"] = of_class if cross_entropy else of_class / more
        results.append({term: WEIGHTS[term] * value for term, value in terms.items()})
    return results


def check_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    ours = torch.autograd.grad(found, inputs, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_losses_equal_the_slow_ones(cross_entropy: bool, decoupled: bool) -> None:
    """Images with and without masks and one without objects, in one batch."""
    targets = drawn_targets((3, 0, 2), stuff=(0, 1))
    has_mask = torch.tensor([True, True, False, False, True])
    targets = replace(targets, has_mask=has_mask)
    predictions, pixels = drawn_predictions(2, 3, 6, no_object=cross_entropy)
    points = FixedPoints()
    criterion = criterion_with(points, cross_entropy=cross_entropy, decouple_stuff_boxes=decoupled)
    found = criterion(named(predictions, "_layer1", ""), None, None, pixels, targets)
    matches = criterion.matcher(predictions, pixels, targets)
    expected = slow_losses(
        predictions,
        pixels,
        targets,
        matches,
        points.points,
        cross_entropy=cross_entropy,
        decoupled=decoupled,
    )
    assert set(found) == {f"{term}{suffix}" for term in WEIGHTS for suffix in ("", "_layer1")}
    for suffix, terms in zip(("_layer1", ""), expected, strict=True):
        for term, value in terms.items():
            torch.testing.assert_close(found[f"{term}{suffix}"], value, atol=1e-4, rtol=1e-4)
    total = sum(value for terms in expected for value in terms.values())
    inputs = [predictions.class_logits, predictions.boxes, predictions.mask_embeddings, pixels]
    check_gradients(sum(found.values()), total, inputs)


class TwoKindsOfPoints(FixedPoints):
    """Other points where the prediction is uncertain than where points are uniform."""

    def __init__(self) -> None:
        super().__init__()
        self.uncertain = torch.rand(40, 2)

    def sample_uncertain(self, maps: Tensor) -> Tensor:
        return self.uncertain.expand(len(maps), -1, -1)


def test_masks_are_compared_at_uncertain_points() -> None:
    """And matched at uniform ones (PointRend; appendix B.1)."""
    targets, points = drawn_targets((3, 2)), TwoKindsOfPoints()
    predictions, pixels = drawn_predictions(1, 2, 5)
    criterion = criterion_with(points)
    found = criterion(named(predictions, ""), None, None, pixels, targets)
    matches = criterion.matcher(predictions, pixels, targets)
    (expected,) = slow_losses(predictions, pixels, targets, matches, points.uncertain)
    for term in ("loss_mask_bce", "loss_mask_dice"):
        torch.testing.assert_close(found[term], expected[term], atol=1e-4, rtol=1e-4)


def noised(groups: int, slots: int, with_masks: bool = True) -> Denoising:
    empty = torch.zeros(2, groups * slots, 4)
    group_of = torch.arange(groups * slots) // slots
    return Denoising(Queries(empty, empty), group_of, groups, slots, with_masks)


def test_denoising_pairs_are_the_slots() -> None:
    targets = drawn_targets((1, 3))
    outputs = named(drawn_predictions(2, 2, 6)[0], "_layer1", "")
    matches = denoising_matches(DenoisedOutputs(outputs, noised(groups=2, slots=3)), targets)
    found = set(
        zip(
            *(x.tolist() for x in (matches.output, matches.image, matches.query, matches.target)),
            strict=True,
        )
    )
    expected = {
        (output, image, group * 3 + slot, targets.offsets[image] + slot)
        for output in range(2)
        for image in range(2)
        for group in range(2)
        for slot in range(targets.counts[image])
    }
    assert found == expected and len(matches.query) == len(expected)
    assert matches.pairs_per_image == (4, 12)


def test_denoising_losses_equal_the_slow_ones() -> None:
    """Normalized by objects times groups, without matching."""
    targets, points = drawn_targets((1, 3)), FixedPoints()
    matched, pixels = drawn_predictions(1, 2, 4)
    predictions, _ = drawn_predictions(2, 2, 6)
    denoised = DenoisedOutputs(named(predictions, "_layer1", ""), noised(groups=2, slots=3))
    found = criterion_with(points)(named(matched, ""), None, denoised, pixels, targets)
    pairs = denoising_matches(denoised, targets)
    expected = slow_losses(predictions, pixels, targets, pairs, points.points, more=2)
    for suffix, terms in zip(("_denoising_layer1", "_denoising"), expected, strict=True):
        for term, value in terms.items():
            torch.testing.assert_close(found[f"{term}{suffix}"], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("selected", [True, False])
def test_initial_outputs_of_noised_queries(selected: bool) -> None:
    """They are supervised where queries are selected, not beside learned ones."""
    matched, pixels = drawn_predictions(2, 1, 4)
    predictions, _ = drawn_predictions(2, 1, 2)
    proposals = matched.map(lambda x: x[0]) if selected else None
    denoised = DenoisedOutputs(named(predictions, "_initial", ""), noised(groups=1, slots=2))
    criterion = criterion_with(FixedPoints())
    found = criterion(
        named(matched, "_initial", ""), proposals, denoised, pixels, drawn_targets((2,))
    )
    names = {"", "_initial", "_denoising"}
    names |= {"_proposal", "_denoising_initial"} if selected else set()
    assert set(found) == {term + name for term in WEIGHTS for name in names}


def test_outputs_that_are_supervised() -> None:
    states = ["before", "first", "second", "last"]
    everything = {"_initial": "before", "_layer1": "first", "_layer2": "second", "": "last"}
    layers = {name: state for name, state in everything.items() if name != "_initial"}
    for deep, initial, expected in (
        (True, True, everything),
        (True, False, layers),
        (False, True, {"": "last"}),
        (False, False, {"": "last"}),
    ):
        options = {"deep_supervision": deep, "supervise_initial": initial}
        assert criterion_with(FixedPoints(), **options).supervised(states) == expected


def test_masks_cannot_be_learned_without_a_mask_branch() -> None:
    predictions, _ = drawn_predictions(1, 1, 4)
    predictions, targets = replace(predictions, mask_embeddings=None), drawn_targets((2,))
    with pytest.raises(ValueError, match="MASK_ON"):
        criterion_with(FixedPoints())(named(predictions, ""), None, None, None, targets)


def test_denoising_of_boxes_has_no_mask_losses() -> None:
    targets, points = drawn_targets((1, 3)), FixedPoints()
    predictions, pixels = drawn_predictions(1, 2, 6)
    outputs = named(predictions, "")
    denoised = DenoisedOutputs(outputs, noised(groups=2, slots=3, with_masks=False))
    found = criterion_with(points)(outputs, None, denoised, pixels, targets)
    assert {name for name in found if "denoising" in name} == {
        "loss_class_denoising",
        "loss_l1_denoising",
        "loss_giou_denoising",
    }


def test_terms_of_weight_zero_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("computed, though its weight is 0")

    monkeypatch.setitem(criterion_module.BOX_LOSSES, "loss_l1", refuse)
    monkeypatch.setitem(criterion_module.MASK_LOSSES, "loss_mask_dice", refuse)
    weights = WEIGHTS | {"loss_l1": 0.0, "loss_mask_dice": 0.0}
    predictions, pixels = drawn_predictions(1, 2, 4)
    found = criterion_with(FixedPoints(), weights=weights)(
        named(predictions, ""), None, None, pixels, drawn_targets((1, 1))
    )
    assert set(found) == {"loss_class", "loss_giou", "loss_mask_bce"}


@pytest.mark.parametrize("cross_entropy", [False, True])
def test_batches_without_objects(cross_entropy: bool) -> None:
    """Every prediction is background; other losses are zero, but every input has a gradient."""
    predictions, pixels = drawn_predictions(2, 2, 4, no_object=cross_entropy)
    criterion = criterion_with(PointSampler(16, 3.0, 0.75), cross_entropy=cross_entropy)
    outputs = named(predictions, "_layer1", "")
    found = criterion(outputs, None, None, pixels, drawn_targets((0, 0)))
    assert all(value.isfinite() for value in found.values())
    assert all(found[f"{term}"] == 0 for term in WEIGHTS if term != "loss_class")
    assert found["loss_class"] > 0
    sum(found.values()).backward()
    inputs = (predictions.class_logits, predictions.boxes, predictions.mask_embeddings, pixels)
    for x in inputs:
        assert x.grad is not None and x.grad.isfinite().all()


def test_a_thousand_objects_and_tiny_boxes() -> None:
    targets = drawn_targets((1000, 1))
    targets.boxes[:, 2:] = 1 / 1024  # one pixel of the canvas
    predictions, pixels = drawn_predictions(1, 2, 30)
    criterion = criterion_with(PointSampler(16, 3.0, 0.75))
    found = criterion(named(predictions, ""), None, None, pixels, targets)
    total = sum(found.values())
    total.backward()
    assert total.isfinite()
    inputs = (predictions.class_logits, predictions.boxes, predictions.mask_embeddings)
    assert all(x.grad.isfinite().all() for x in inputs)


def test_exact_predictions_cost_almost_nothing() -> None:
    targets = drawn_targets((2,))
    predictions, pixels = drawn_predictions(1, 1, 2)
    with torch.no_grad():
        predictions.boxes[0, 0] = targets.boxes
        predictions.class_logits.fill_(-20.0)
        for k in range(2):
            predictions.class_logits[0, 0, k, targets.labels[k]] = 20.0
        # Two channels that hold the masks, one per query. The points are the pixels' centers,
        # because between the pixels of random masks no prediction is exact.
        pixels.zero_()
        pixels[0, :2] = (targets.masks.to_bool().float() * 2 - 1) * 30
        predictions.mask_embeddings.zero_()
        predictions.mask_embeddings[0, 0, [0, 1], [0, 1]] = 1.0
    points = FixedPoints(SIZE[0] * SIZE[1])
    rows, columns = torch.meshgrid(*map(torch.arange, SIZE), indexing="ij")
    points.points = torch.stack(
        [(columns + 0.5) / SIZE[1], (rows + 0.5) / SIZE[0]], dim=-1
    ).flatten(0, 1)
    found = criterion_with(points)(named(predictions, ""), None, None, pixels, targets)
    assert all(value < 0.01 for value in found.values()), found


def test_unknown_classification_is_named() -> None:
    with pytest.raises(ValueError, match="CLASSIFICATION is 'softmax'"):
        Criterion(tiny_cfg(LOSS__CLASSIFICATION="softmax"))
