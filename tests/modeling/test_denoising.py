"""Noised queries: groups, slots, noise, and who may see whom."""

import pytest
import torch

from maskdino.modeling.denoising import (
    DenoisingQueries,
    attention_mask,
    build_denoising,
    group_index,
    join_noised,
    split_noised,
)
from maskdino.structures import Denoising, Outputs, PackedMasks, Predictions, Queries, Targets
from tests.helpers import NUM_CLASSES, tiny_cfg

CPU = torch.device("cpu")


def targets_of(counts: tuple[int, ...]) -> Targets:
    """Drawn objects without masks."""
    number = sum(counts)
    return Targets(
        labels=torch.randint(0, NUM_CLASSES, (number,)),
        boxes=torch.rand(number, 4) * 0.5 + 0.25,
        is_thing=torch.ones(number, dtype=torch.bool),
        has_mask=torch.zeros(number, dtype=torch.bool),
        masks=PackedMasks.empty(number, (8, 8)),
        counts=counts,
        names=tuple(map(str, range(len(counts)))),
    )


def quiet(**overrides: object) -> DenoisingQueries:
    """Denoising without noise."""
    return build_denoising(
        tiny_cfg(DENOISING__LABEL_NOISE=0.0, DENOISING__BOX_NOISE=0.0, **overrides)
    )


@pytest.mark.parametrize(
    ("counts", "groups", "slots"),
    [((3, 1), 2, 3), ((1,), 8, 1), ((8, 0), 1, 8), ((9, 2), 1, 9), ((50,), 1, 50), ((0, 0), 1, 1)],
)
def test_number_of_groups(counts: tuple[int, ...], groups: int, slots: int) -> None:
    """At most 8 queries here, but at least one group."""
    denoising = quiet()(targets_of(counts))
    assert (denoising.num_groups, denoising.slots_per_group) == (groups, slots)
    assert denoising.queries.content.shape[:2] == (len(counts), groups * slots)
    assert denoising.queries.anchor_logits.shape == (len(counts), groups * slots, 4)


def test_each_group_holds_each_object_and_slots_stay_empty() -> None:
    module, targets = quiet(), targets_of((3, 0, 2))
    denoising = module(targets)
    for image, (first, count) in enumerate(zip(targets.offsets, targets.counts, strict=True)):
        for group in range(denoising.num_groups):
            for slot in range(denoising.slots_per_group):
                place = group * denoising.slots_per_group + slot
                content = denoising.queries.content[image, place]
                anchor = denoising.queries.anchor_logits[image, place]
                if slot < count:
                    label, box = targets.labels[first + slot], targets.boxes[first + slot]
                    assert torch.equal(content, module.label_embedding.weight[label])
                    torch.testing.assert_close(anchor.sigmoid(), box)
                else:
                    assert not content.any() and not anchor.any()


def test_box_noise_stays_in_its_range() -> None:
    module = build_denoising(tiny_cfg(DENOISING__LABEL_NOISE=0.0, DENOISING__NUM_QUERIES=2000))
    targets = targets_of((2,))
    targets.boxes[:, 2:] *= 0.5  # so that nothing is clamped
    boxes = module(targets).queries.anchor_logits.sigmoid().unflatten(1, (-1, 2))[0]  # (G, 2, 4)
    moved = boxes - targets.boxes
    size = targets.boxes[:, 2:]
    reach = 0.4 * torch.cat([size / 2, size], dim=1)
    share = moved / reach
    assert (share.abs() <= 1 + 1e-4).all()
    assert (share.amax(0) > 0.95).all() and (share.amin(0) < -0.95).all()
    torch.testing.assert_close(share.mean(0), torch.zeros(2, 4), atol=0.1, rtol=0)


def test_noised_boxes_stay_on_the_canvas() -> None:
    module = build_denoising(tiny_cfg(DENOISING__BOX_NOISE=1.0, DENOISING__NUM_QUERIES=400))
    targets = targets_of((1,))
    targets.boxes[0] = torch.tensor([0.05, 0.95, 0.9, 0.9])
    logits = module(targets).queries.anchor_logits
    assert logits.isfinite().all()
    assert logits.sigmoid().amax() > 0.9999 and logits.sigmoid().amin() < 1e-4  # clamped, both


def test_label_noise_draws_that_share_uniformly() -> None:
    module = build_denoising(
        tiny_cfg(DENOISING__LABEL_NOISE=0.5, DENOISING__BOX_NOISE=0.0, DENOISING__NUM_QUERIES=5000)
    )
    with torch.no_grad():  # each class's embedding is its number
        module.label_embedding.weight.copy_(torch.arange(NUM_CLASSES)[:, None])
    targets = targets_of((1,))
    labels = module(targets).queries.content[0, :, 0].long()
    share = torch.bincount(labels, minlength=NUM_CLASSES) / len(labels)
    expected = torch.full((NUM_CLASSES,), 0.5 / NUM_CLASSES)
    expected[targets.labels[0]] += 0.5
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


def test_embedding_takes_part_in_batches_without_objects() -> None:
    module = quiet()
    module(targets_of((0, 0))).queries.content.sum().backward()
    gradient = module.label_embedding.weight.grad
    assert gradient is not None and not gradient.any()


def test_who_may_see_whom() -> None:
    groups, slots, matching = 3, 2, 4
    noised = groups * slots
    mask = attention_mask(group_index(noised, slots, CPU), matching)
    assert mask.shape == (noised + matching,) * 2 and mask.dtype == torch.bool
    for seer in range(noised + matching):
        for seen in range(noised + matching):
            matching_seen = seen >= noised
            same_group = max(seer, seen) < noised and seer // slots == seen // slots
            assert mask[seer, seen] == (matching_seen or same_group), (seer, seen)


def test_noised_queries_are_joined_and_split() -> None:
    queries = Queries(torch.rand(2, 3, 8), torch.rand(2, 3, 4))
    noised = Queries(torch.rand(2, 4, 8), torch.rand(2, 4, 4))
    group_of = group_index(4, 2, CPU)
    denoising = Denoising(noised, group_of, num_groups=2, slots_per_group=2, with_masks=True)
    joined, may_attend = join_noised(queries, *denoising.tensors)
    assert torch.equal(may_attend, attention_mask(group_of, 3))
    assert torch.equal(
        joined.anchor_logits, torch.cat([noised.anchor_logits, queries.anchor_logits], 1)
    )
    predictions = Predictions(joined.content[None], joined.anchor_logits[None], None)
    matched, denoised = split_noised(Outputs(predictions, ("",)), denoising)
    assert matched.names == denoised.outputs.names == ("",) and denoised.denoising is denoising
    assert torch.equal(matched.predictions.class_logits[0], queries.content)
    assert torch.equal(denoised.outputs.predictions.boxes[0], noised.anchor_logits)


@pytest.mark.parametrize("counts", [(3, 1), (0, 0), (7, 2), (120, 5)])
def test_queries_that_fill_up_are_seen_by_nobody_and_left_out(counts: tuple[int, ...]) -> None:
    module, targets = quiet(), targets_of(counts)
    exact, filled = (module(targets, filled=filled) for filled in (False, True))
    width, count = len(filled.group_of), exact.num_queries
    assert width == filled.queries.content.shape[1] and width % module.num_queries == 0
    assert width - count < module.num_queries
    for part in ("content", "anchor_logits"):
        whole = getattr(filled.queries, part)
        assert torch.equal(whole[:, :count], getattr(exact.queries, part))
        assert not whole[:, count:].any()
    mask = attention_mask(filled.group_of, 5)
    others = torch.cat([torch.arange(count), torch.arange(width, width + 5)])
    assert not mask[others][:, count:width].any()
    assert torch.equal(mask[others][:, others], attention_mask(exact.group_of, 5))
    assert mask.any(dim=1).all()  # nobody sees nothing, which has no softmax
    numbers = torch.arange(2 * (width + 5)).view(1, 2, -1, 1).float()
    outputs = Outputs(Predictions(numbers, numbers, None), ("",))
    matched, denoised = split_noised(outputs, filled)
    assert denoised.outputs.predictions.boxes.shape[2] == count
    assert torch.equal(matched.predictions.boxes, numbers[:, :, width:])


def test_without_noised_queries_nothing_is_joined() -> None:
    queries, outputs = Queries(torch.rand(1, 3, 8), torch.rand(1, 3, 4)), object()
    assert join_noised(queries) == (queries, None)
    assert split_noised(outputs, None) == (outputs, None)


def test_modes() -> None:
    assert build_denoising(tiny_cfg(DENOISING__MODE="off")) is None
    assert not quiet(DENOISING__MODE="boxes")(targets_of((1,))).with_masks
    assert quiet()(targets_of((1,))).with_masks
    with pytest.raises(ValueError, match="MODE is 'masks'; it must be"):
        build_denoising(tiny_cfg(DENOISING__MODE="masks"))
