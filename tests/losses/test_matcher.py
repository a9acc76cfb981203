"""Hybrid matching against costs of single pairs and against all permutations."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from maskdino.losses import assignment
from maskdino.losses import functional as losses
from maskdino.losses import matcher as matcher_module
from maskdino.losses.matcher import CostWeights, HybridMatcher
from maskdino.ops import points as points_module
from maskdino.ops.points import sample_maps
from maskdino.structures import Matches, Predictions, Targets
from tests.helpers import tiny_cfg
from tests.losses.drawn import FixedPoints, drawn_predictions, drawn_targets
from tests.memory import NewTensors

WEIGHTS = CostWeights(4.0, 5.0, 2.0, 5.0, 5.0)


def slow_costs(
    weights: CostWeights,
    decoupled: bool,
    predictions: Predictions,
    pixels: Tensor,
    targets: Targets,
    points: Tensor,
    place: tuple[int, int],
) -> Tensor:
    """Costs (Q, n) of one (output, image), pair by pair, from float masks."""
    output, image = place
    first, count = targets.offsets[image], targets.counts[image]
    queries = predictions.boxes.shape[2]
    masks = targets.masks.to_bool().float()
    boxes_cost, cost = torch.zeros(queries, count), torch.zeros(queries, count)
    for q in range(queries):
        logits = predictions.class_logits[output, image, q]
        box = predictions.boxes[output, image, q][None]
        map_logits = torch.einsum(
            "c,chw->hw", predictions.mask_embeddings[output, image, q], pixels[image]
        )
        sampled = sample_maps(map_logits[None, None], points[None])[0]  # (1, P)
        for j in range(count):
            k = first + j
            wanted = sample_maps(masks[k][None, None], points[None])[0]
            cost[q, j] = weights.class_weight * losses.focal_cost(logits[targets.labels[k]])
            if targets.has_mask[k]:
                cost[q, j] += weights.mask_bce_weight * losses.mask_bce_loss(sampled, wanted)[0]
                cost[q, j] += weights.mask_dice_weight * losses.mask_dice_loss(sampled, wanted)[0]
            of_box = targets.boxes[k][None]
            boxes_cost[q, j] = weights.l1_weight * losses.l1_loss(box, of_box)[0]
            boxes_cost[q, j] += weights.giou_weight * losses.giou_loss(box, of_box)[0]
    things = targets.is_thing[first : first + count]
    if decoupled:
        mean = boxes_cost[:, things].mean() if things.any() else 0.0
        boxes_cost[:, ~things] = mean
    return cost + boxes_cost


class DrawnPoints(FixedPoints):
    """Draws points anew and keeps what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.given = []

    def sample_uniform(self, number: int, device: torch.device) -> Tensor:
        self.given.append(torch.rand(number, len(self.points), 2, device=device))
        return self.given[-1]


@pytest.mark.parametrize("at_once", [1, matcher_module.ELEMENTS_AT_ONCE])
def test_every_output_and_image_has_points_of_its_own(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The costs of each are those at its points, whichever outputs are computed together."""
    monkeypatch.setattr(matcher_module, "ELEMENTS_AT_ONCE", at_once)
    targets, points = drawn_targets((3, 0, 2), stuff=(0, 1)), DrawnPoints()
    predictions, pixels = drawn_predictions(4, 3, 5)
    matcher = HybridMatcher(weights=WEIGHTS, decouple_stuff_boxes=True, points=points)
    costs = matcher.start(predictions, pixels, targets)._costs
    places = torch.cat(points.given)  # of the first image's outputs, then of the last one's
    assert len(places) == 8 and len(places.flatten(1).unique(dim=0)) == 8
    for i, (image, output) in enumerate(itertools.product((0, 2), range(4))):
        first, count = targets.offsets[image], targets.counts[image]
        with torch.no_grad():
            expected = slow_costs(
                WEIGHTS, True, predictions, pixels, targets, places[i], (output, image)
            )
        torch.testing.assert_close(
            costs[output, :, first : first + count], expected, atol=1e-4, rtol=1e-4
        )


def least_cost(costs: Tensor) -> float:
    """The smallest sum of an assignment, by trying all."""
    queries, objects = costs.shape
    if objects > queries:
        return least_cost(costs.t())
    return min(
        sum(costs[q, j].item() for j, q in enumerate(chosen))
        for chosen in itertools.permutations(range(queries), objects)
    )


def match(
    predictions: Predictions,
    pixels: Tensor | None,
    targets: Targets,
    points: FixedPoints,
    *,
    weights: CostWeights = WEIGHTS,
    decoupled: bool = False,
) -> Matches:
    matcher = HybridMatcher(weights=weights, decouple_stuff_boxes=decoupled, points=points)
    return matcher(predictions, pixels, targets)


def check_optimal(
    matches: Matches,
    weights: CostWeights,
    decoupled: bool,
    inputs: tuple[Predictions, Tensor, Targets, FixedPoints],
) -> None:
    """Every output and image has its own best assignment, one query per object."""
    predictions, pixels, targets, points = inputs
    outputs, images, queries = predictions.boxes.shape[:3]
    found = 0
    for output, image in itertools.product(range(outputs), range(images)):
        first, count = targets.offsets[image], targets.counts[image]
        here = (matches.output == output) & (matches.image == image)
        found += int(here.sum())
        query, target = matches.query[here], matches.target[here] - first
        assert len(query) == min(queries, count)
        assert len(set(query.tolist())) == len(set(target.tolist())) == len(query)
        assert ((target >= 0) & (target < count)).all()
        with torch.no_grad():
            costs = slow_costs(
                weights, decoupled, predictions, pixels, targets, points.points, (output, image)
            )
        total = costs[query, target].sum().item()
        assert total == pytest.approx(least_cost(costs), abs=1e-3)
    assert found == len(matches.query) == sum(matches.pairs_per_image)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        CostWeights(0.0, 5.0, 2.0, 0.0, 0.0),
        CostWeights(0.0, 0.0, 0.0, 5.0, 5.0),
        CostWeights(4.0, 0.0, 2.0, 0.0, 5.0),
    ],
)
def test_assignment_is_the_best(weights: CostWeights, decoupled: bool) -> None:
    """With objects without masks, images without objects, and more objects than queries."""
    targets = drawn_targets((3, 0, 2, 6), stuff=(0, 1))
    targets = replace(targets, has_mask=torch.rand(len(targets)) < 0.7)
    predictions, pixels = drawn_predictions(2, 4, 5)
    points = FixedPoints()
    matches = match(predictions, pixels, targets, points, weights=weights, decoupled=decoupled)
    check_optimal(matches, weights, decoupled, (predictions, pixels, targets, points))
    assert not matches.query.requires_grad


def test_stuff_alone_has_no_box_cost() -> None:
    targets = drawn_targets((4,), stuff=range(10))
    predictions, pixels = drawn_predictions(1, 1, 5)
    points = FixedPoints()
    matches = match(predictions, pixels, targets, points, decoupled=True)
    no_boxes = replace(WEIGHTS, l1_weight=0.0, giou_weight=0.0)
    check_optimal(matches, no_boxes, False, (predictions, pixels, targets, points))


def test_decoupling_changes_a_matching_that_boxes_decide() -> None:
    """A stuff object whose box fits query 1 is matched by its mask, to query 0."""
    targets = drawn_targets((1,), stuff=range(10))
    predictions, pixels = drawn_predictions(1, 1, 2)
    with torch.no_grad():
        predictions.class_logits.zero_()
        predictions.boxes[0, 0, 1] = targets.boxes[0]
        predictions.boxes[0, 0, 0] = torch.tensor([0.01, 0.01, 0.01, 0.01])
        signs = targets.masks.to_bool()[0].float() * 2 - 1
        pixels.zero_()
        pixels[0, 0] = 0.3 * signs
        predictions.mask_embeddings.zero_()
        predictions.mask_embeddings[0, 0, :, 0] = torch.tensor([1.0, -1.0])
    points = FixedPoints(200)
    for decoupled, query in ((True, 0), (False, 1)):
        matches = match(predictions, pixels, targets, points, decoupled=decoupled)
        assert matches.query.tolist() == [query]


def test_no_objects_at_all() -> None:
    predictions, pixels = drawn_predictions(3, 2, 4)
    matches = match(predictions, pixels, drawn_targets((0, 0)), FixedPoints())
    assert len(matches.query) == 0 and matches.pairs_per_image == (0, 0)


def test_without_mask_branch() -> None:
    predictions, _ = drawn_predictions(2, 1, 4)
    predictions = replace(predictions, mask_embeddings=None)
    weights = replace(WEIGHTS, mask_bce_weight=0.0, mask_dice_weight=0.0)
    matches = match(predictions, None, drawn_targets((3,)), FixedPoints(), weights=weights)
    assert matches.pairs_per_image == (6,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_name_the_image(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A query gone bad in image 1 is matched to nothing while there are others."""
    targets = drawn_targets((2, 2))
    predictions, pixels = drawn_predictions(1, 2, 4)
    with torch.no_grad():
        predictions.boxes[0, 1, 2] = value
    with caplog.at_level(logging.WARNING, logger="maskdino.losses.assignment"):
        matches = match(predictions, pixels, targets, FixedPoints())
    assert "image drawn_1.png" in caplog.text and "drawn_0.png" not in caplog.text
    assert "2 of 8" in caplog.text
    assert matches.pairs_per_image == (2, 2)
    assert 2 not in matches.query[matches.image == 1].tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_cost_is_the_last_choice(value: float) -> None:
    costs = torch.tensor([[[value], [0.5], [0.7]]])
    matches = assignment.PendingMatches(costs, drawn_targets((1,))).result()
    assert matches.query.tolist() == [1]


def test_stuff_has_the_mean_box_cost_of_things() -> None:
    """One query for two things and stuff: their box costs are compared, and not only added."""
    targets = drawn_targets((3,))
    targets = replace(
        targets,
        labels=torch.tensor([0, 0, 1]),
        is_thing=torch.tensor([True, True, False]),
        boxes=torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(3, 1),
    )
    predictions, pixels = drawn_predictions(1, 1, 1)
    with torch.no_grad():
        predictions.boxes[:] = torch.tensor([0.5, 0.5, 0.2, 0.4])
        predictions.class_logits.zero_()[..., 1] = 0.1
    # A box cost of 0.2 for things and of their mean for stuff; the class favors stuff by less.
    weights = CostWeights(1.0, 1.0, 0.0, 0.0, 0.0)
    matches = match(predictions, pixels, targets, FixedPoints(), weights=weights, decoupled=True)
    assert matches.target.tolist() == [2]


def test_everything_not_a_number(caplog: pytest.LogCaptureFixture) -> None:
    predictions, pixels = drawn_predictions(1, 1, 4)
    broken = predictions.map(lambda x: x * float("nan"))
    matches = match(broken, pixels, drawn_targets((3,)), FixedPoints())
    assert matches.pairs_per_image == (3,) and "drawn_0.png" in caplog.text


TERMS = {
    "class_weight": "focal_cost",
    "l1_weight": "l1_loss",
    "giou_weight": "giou_loss",
    "mask_bce_weight": "mask_bce_cost",
    "mask_dice_weight": "mask_dice_cost",
}


@pytest.mark.parametrize("weight", TERMS)
def test_a_term_of_weight_zero_is_not_computed(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = {}
    for name in TERMS.values():
        computed[name] = Mock(wraps=getattr(matcher_module, name))
        monkeypatch.setattr(matcher_module, name, computed[name])
    predictions, pixels = drawn_predictions(2, 1, 4)
    weights = replace(WEIGHTS, **{weight: 0.0})
    match(predictions, pixels, drawn_targets((3,)), FixedPoints(), weights=weights)
    called = {name for name, term in computed.items() if term.called}
    assert called == set(TERMS.values()) - {TERMS[weight]}


def test_without_any_term_every_object_still_has_a_query() -> None:
    predictions, pixels = drawn_predictions(1, 2, 4)
    weights = CostWeights(0.0, 0.0, 0.0, 0.0, 0.0)
    matches = match(predictions, pixels, drawn_targets((3, 1)), FixedPoints(), weights=weights)
    assert matches.pairs_per_image == (3, 1)


def test_a_thousand_objects() -> None:
    predictions, pixels = drawn_predictions(2, 1, 60)
    matches = match(predictions, pixels, drawn_targets((1000,)), FixedPoints())
    assert matches.pairs_per_image == (120,)
    for output in (0, 1):
        assert sorted(matches.query[matches.output == output].tolist()) == list(range(60))


def test_threads_are_made_at_the_first_matching() -> None:
    """Not at import: processes that load or predict have none."""
    pools = (assignment._waiter, assignment._solvers)
    for pool in pools:
        pool.cache_clear()
    matcher = HybridMatcher(weights=WEIGHTS, decouple_stuff_boxes=False, points=FixedPoints())
    assert [pool.cache_info().currsize for pool in pools] == [0, 0]
    matcher(*drawn_predictions(1, 1, 4), drawn_targets((3,)))
    assert [pool.cache_info().currsize for pool in pools] == [1, 1]


def test_config_gives_the_weights_of_the_paper() -> None:
    assert HybridMatcher(tiny_cfg()).weights == WEIGHTS
    assert not HybridMatcher(tiny_cfg(MASK_ON=False)).weights.masks
    off = HybridMatcher(tiny_cfg(MATCHER__L1_WEIGHT=0.0, MATCHER__GIOU_WEIGHT=0.0)).weights
    assert not off.boxes and off.masks


@pytest.mark.parametrize("weights", [CostWeights(2, 0, 0, 0, 0), CostWeights(0, 5, 2, 0, 0)])
def test_costs_of_many_objects_need_little_memory(weights: CostWeights) -> None:
    """No copy of all queries for each object: nothing is larger than the costs themselves."""
    targets = drawn_targets((1500, 500), stuff=(0,))
    predictions, _ = drawn_predictions(4, 2, 50)
    matcher = HybridMatcher(weights=weights, decouple_stuff_boxes=True, points=FixedPoints())
    with NewTensors() as tensors:
        pending = matcher.start(predictions, None, targets)
    costs = pending._costs.nbytes
    assert costs == 4 * 50 * 2000 * 4 and tensors.largest == costs


def test_costs_of_few_objects_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, points = drawn_targets((7, 0, 4), stuff=(0, 1)), FixedPoints()
    predictions, pixels = drawn_predictions(3, 3, 5)
    matcher = HybridMatcher(
        weights=WEIGHTS, decouple_stuff_boxes=True, points=points, position_modulated=True
    )
    together = matcher.start(predictions, pixels, targets)._costs
    monkeypatch.setattr(points_module, "CPU_NUMBERS_AT_ONCE", 2 * 4 * 3 * 5)
    found = matcher.start(predictions, pixels, targets)._costs
    torch.testing.assert_close(found, together, atol=1e-6, rtol=1e-5)  # SIMD rounds its ends anew
