"""Query selection: which tokens, which proposals, which anchors."""

import math

import pytest
import torch
from torch import Tensor

from maskdino.modeling import query_selection
from maskdino.modeling.heads import PredictionHeads
from maskdino.modeling.query_selection import (
    LearnedQueries,
    UnifiedQuerySelection,
    build_query_selection,
    proposal_logits,
)
from maskdino.structures import Memory
from tests.helpers import CHANNELS, tiny_cfg
from tests.ops.test_boxes import slow_box

SHAPES = ((6, 8), (3, 4))
CPU = torch.device("cpu")


@pytest.mark.parametrize("coarsest_largest", [True, False])
def test_proposals(coarsest_largest: bool) -> None:
    shapes = ((6, 8), (3, 4), (1, 60), (1, 30))
    found = proposal_logits(shapes, coarsest_largest, CPU)
    expected = []
    for level, (rows, columns) in enumerate(shapes):
        side = 0.05 * 2 ** (level if coarsest_largest else 3 - level)
        for i in range(rows):
            for j in range(columns):
                box = ((j + 0.5) / columns, (i + 0.5) / rows, side, side)
                valid = all(0.01 < v < 0.99 for v in box)
                expected.append([math.log(v / (1 - v)) if valid else math.inf for v in box])
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found.isinf().all(1).sum() == 2  # first and last of the 60 cells in a row


@pytest.mark.parametrize("towards", [0.0, 1.0])
def test_rounding_makes_no_proposal_at_the_border_valid(
    towards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and last of 50 rows lie at the border: an image of 800 pixels has them."""
    centers = query_selection.cell_centers

    def rounded(*args: object) -> Tensor:
        found = centers(*args)
        return found.nextafter(torch.full_like(found, towards))

    compute = proposal_logits.__wrapped__  # not kept
    expected = compute(((50, 68),), True, CPU).isfinite().all(-1).view(50, 68)
    assert expected.any(1).tolist() == [False, *[True] * 48, False]
    monkeypatch.setattr(query_selection, "cell_centers", rounded)
    found = compute(((50, 68),), True, CPU).isfinite().all(-1).view(50, 68)
    assert torch.equal(found, expected)


def test_proposals_larger_than_the_canvas_are_invalid() -> None:
    shapes = tuple((2, 2) for _ in range(6))  # the last has sides of 1.6
    found = proposal_logits(shapes, True, CPU)
    assert found[:20].isfinite().all() and found[20:].isinf().all()


def selection_of(
    **overrides: object,
) -> tuple[UnifiedQuerySelection, PredictionHeads, Memory, Tensor]:
    """A selection with its heads, and drawn memory and pixel embedding."""
    cfg = tiny_cfg(**overrides)
    selection, heads = build_query_selection(cfg), PredictionHeads(cfg)
    torch.nn.init.normal_(heads.box_head.layers[-1].weight, std=0.3)
    tokens = torch.randn(2, 60, CHANNELS)
    return selection, heads, Memory(tokens, SHAPES), torch.randn(2, CHANNELS, 12, 16)


@pytest.mark.parametrize(("shapes", "number"), [(SHAPES, 12), (((1, 60),), 60)])
def test_best_class_scores_are_selected(shapes: tuple, number: int) -> None:
    """In a row of 60 tokens, the outermost two are invalid; all are selected."""
    selection, heads, memory, pixels = selection_of(QUERY_SELECTION__NUM_QUERIES=number)
    memory = Memory(memory.tokens, shapes)
    queries, predictions = selection(memory, pixels, heads)
    proposals = proposal_logits(shapes, True, CPU)
    for image in range(2):
        ranked = []
        for token in range(60):
            x = memory.tokens[image, token]
            if proposals[token].isinf().any():
                x = torch.zeros_like(x)
            content = selection.output_norm(selection.output(x))
            ranked.append((heads.class_head(content).max().item(), token, content))
        ranked = sorted(ranked, key=lambda entry: -entry[0])[:number]
        for i, (_, token, content) in enumerate(ranked):
            torch.testing.assert_close(
                queries.content[image, i], content.detach(), atol=1e-5, rtol=1e-5
            )
            normed = heads.norm(content)
            torch.testing.assert_close(
                predictions.class_logits[image, i], heads.class_head(normed), atol=1e-5, rtol=1e-5
            )
            box = (heads.box_head(content) + proposals[token]).sigmoid()
            torch.testing.assert_close(predictions.boxes[image, i], box, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                predictions.mask_embeddings[image, i], heads.mask_head(normed), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("kind", ["mask2box", "none"])
def test_queries_carry_no_gradient_but_predictions_do(kind: str) -> None:
    selection, heads, memory, pixels = selection_of(QUERY_SELECTION__MASK_ENHANCED_ANCHORS=kind)
    queries, predictions = selection(memory, pixels, heads)
    assert not queries.content.requires_grad and not queries.anchor_logits.requires_grad
    total = predictions.class_logits.sum() + predictions.boxes.sum()
    (total + predictions.mask_embeddings.sum()).backward()
    for parameter in (*selection.parameters(), *heads.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mask2box", "bitmask", "none"])
def test_anchors(kind: str) -> None:
    selection, heads, memory, pixels = selection_of(QUERY_SELECTION__MASK_ENHANCED_ANCHORS=kind)
    pixels = pixels - pixels.mean() - 0.8 * torch.rand(2, 1, 1, 1)  # some masks become empty
    queries, predictions = selection(memory, pixels, heads)
    masks = torch.einsum("bqc,bchw->bqhw", predictions.mask_embeddings, pixels) > 0
    for image in range(2):
        for i in range(12):
            if kind == "none" or not masks[image, i].any():
                box = predictions.boxes[image, i].tolist()
            else:
                x0, y0, x1, y1 = slow_box(masks[image, i], inclusive=kind == "mask2box")
                box = [(x0 + x1) / 32, (y0 + y1) / 24, (x1 - x0) / 16, (y1 - y0) / 12]
            box = [min(max(v, 0.0), 1.0) for v in box]
            expected = [math.log(max(v, 1e-5) / max(1 - v, 1e-5)) for v in box]
            torch.testing.assert_close(
                queries.anchor_logits[image, i], torch.tensor(expected), atol=1e-3, rtol=1e-3
            )


@pytest.mark.parametrize("kind", ["mask2box", "bitmask"])
def test_empty_masks_leave_the_predicted_boxes(kind: str) -> None:
    selection, heads, memory, _ = selection_of(QUERY_SELECTION__MASK_ENHANCED_ANCHORS=kind)
    queries, predictions = selection(memory, torch.zeros(2, CHANNELS, 4, 4), heads)
    assert torch.equal(queries.anchor_logits.sigmoid(), predictions.boxes.detach())


@pytest.mark.parametrize("kind", ["mask2box", "bitmask"])
def test_masks_of_one_row_are_not_empty(kind: str) -> None:
    selection, *_ = selection_of(QUERY_SELECTION__MASK_ENHANCED_ANCHORS=kind)
    pixels = torch.full((1, 1, 8, 16), -0.1)
    pixels[0, 0, 2, 4:13] = 0.1
    found = selection._mask_anchors(torch.ones(1, 1, 1), pixels, torch.full((1, 1, 4), 9.0))
    x0, y0, x1, y1 = (4, 2, 12, 2) if kind == "mask2box" else (4, 2, 13, 3)
    expected = torch.tensor([(x0 + x1) / 32, (y0 + y1) / 16, (x1 - x0) / 16, (y1 - y0) / 8])
    torch.testing.assert_close(found.sigmoid()[0, 0], expected, atol=2e-5, rtol=0)


def test_empty_masks_give_the_released_anchors() -> None:
    for kind, box in (("mask2box", (1, 1, 0, 0)), ("bitmask", (0, 0, 0, 0))):
        options = {"MASK_ENHANCED_ANCHORS": kind, "EMPTY_MASKS": "corner"}
        keys = {f"QUERY_SELECTION__{key}": value for key, value in options.items()}
        selection, heads, memory, _ = selection_of(**keys)
        pixels = torch.zeros(2, CHANNELS, 4, 4)  # all logits are 0: not above 0
        queries, _ = selection(memory, pixels, heads)
        expected = torch.tensor(box).expand(2, 12, 4).float()
        torch.testing.assert_close(queries.anchor_logits.sigmoid(), expected, atol=2e-5, rtol=0)


def test_more_queries_than_tokens() -> None:
    selection, heads, memory, pixels = selection_of(QUERY_SELECTION__NUM_QUERIES=100)
    queries, predictions = selection(memory, pixels, heads)
    assert queries.content.shape == (2, 60, CHANNELS) and predictions.boxes.shape == (2, 60, 4)


def test_without_masks_anchors_are_boxes() -> None:
    selection, heads, memory, _ = selection_of(MASK_ON=False)
    queries, predictions = selection(memory, None, heads)
    assert predictions.mask_embeddings is None
    # Exactly: the logits themselves, not those of rounded or clamped boxes.
    assert torch.equal(queries.anchor_logits.sigmoid(), predictions.boxes.detach())


def test_tokens_at_the_border_give_whole_boxes() -> None:
    """With more queries than valid tokens, invalid ones are taken; their logits are infinite."""
    selection, heads, memory, _ = selection_of(MASK_ON=False, QUERY_SELECTION__NUM_QUERIES=100)
    with torch.no_grad():
        proposals = torch.full((60, 4), 0.3)
        proposals[7] = float("inf")
    selection_logits = "maskdino.modeling.query_selection.proposal_logits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_logits, lambda *_: proposals)
        queries, predictions = selection(memory, None, heads)
    assert int((queries.anchor_logits == float("inf")).all(-1).sum()) == 2  # one of each image
    assert int((predictions.boxes == 1).all(-1).sum()) == 2


def test_learned_queries_are_equal_for_all_images_and_learn() -> None:
    selection, heads, memory, pixels = selection_of(QUERY_SELECTION__ENABLED=False)
    assert isinstance(selection, LearnedQueries)
    queries, predictions = selection(memory, pixels, heads)
    assert predictions is None and queries.content.shape == (2, 12, CHANNELS)
    assert torch.equal(queries.content[0], queries.content[1])
    (queries.content.sum() + queries.anchor_logits.sum()).backward()
    assert torch.equal(selection.content.grad, torch.full((12, CHANNELS), 2.0))
    assert torch.equal(selection.anchor_logits.grad, torch.full((12, 4), 2.0))


@pytest.mark.parametrize("key", ["MASK_ENHANCED_ANCHORS", "EMPTY_MASKS", "LARGEST_PROPOSALS"])
def test_unknown_choices_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is 'largest'; it must be one of"):
        build_query_selection(tiny_cfg(**{f"QUERY_SELECTION__{key}": "largest"}))
