"""What is drawn of the decoder is what the decoder did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from maskdino.inference.attention_maps import follow_queries
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.ops.ms_deform_attn import ms_deform_attn
from tests.helpers import tiny_cfg

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def predictor() -> MaskDINOPredictor:
    torch.manual_seed(0)
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT = 64, 64, "RGB"
    model = MaskDINO(cfg)
    for layer in model.decoder.layers:  # offsets and weights that depend on the query
        torch.nn.init.normal_(layer.cross_attn.sampling_offsets.weight, std=0.1)
        torch.nn.init.normal_(layer.cross_attn.attention_weights.weight, std=0.5)
    return MaskDINOPredictor.from_model(model, cfg, confidence_threshold=0.0)


@torch.inference_mode()
def test_points_and_weights_give_what_the_attention_read(predictor: MaskDINOPredictor) -> None:
    model = predictor.network.model
    attention = model.decoder.layers[1].cross_attn
    seen = []
    handle = attention.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    followed = follow_queries(predictor, IMAGE, [3, 0])
    handle.remove()
    (_, tokens, shapes, _), read = seen[0]
    value = attention.value_proj(tokens).unflatten(-1, (attention.num_heads, -1))
    order = (1, 2, attention.num_heads, len(shapes), attention.num_points)
    points = np.stack([views[2].points for _, views in followed])
    weights = np.stack([views[2].weights for _, views in followed])
    # The picture fills the canvas of 64 pixels.
    locations = torch.from_numpy(points / 64).view(*order, 2)
    out = ms_deform_attn(value, shapes, locations, torch.from_numpy(weights).view(order))
    torch.testing.assert_close(attention.output_proj(out)[0], read[0, [3, 0]], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_last_layer_is_the_prediction(predictor: MaskDINOPredictor) -> None:
    followed = follow_queries(predictor, IMAGE, 2)
    layers = len(predictor.network.model.decoder.layers)
    assert [[view.layer for view in views] for _, views in followed] == [[*range(layers + 1)]] * 2
    tensor = torch.from_numpy(IMAGE).permute(2, 0, 1)
    predictions, _, _ = predictor.network([tensor])
    for query, views in followed:
        last = views[-1]
        scores = predictions.class_logits[0, query].sigmoid()
        assert last.score == pytest.approx(float(scores.max()), abs=1e-5)
        cx, cy, w, h = (64 * predictions.boxes[0, query]).tolist()
        expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        np.testing.assert_allclose(last.box, expected, atol=1e-3)
        assert len(views[0].points) == 0
        np.testing.assert_allclose(last.weights.sum(), 8, rtol=1e-4)  # 1 for each head
    assert followed[0][1][-1].score >= followed[1][1][-1].score


@pytest.mark.parametrize(
    ("tasks", "limited"),
    [(("instance",), (True, True)), (("panoptic",), (True, False)), (("semantic",), (False,) * 2)],
)
def test_masks_end_where_those_of_results_do(
    predictor: MaskDINOPredictor,
    tasks: tuple[str, ...],
    limited: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the box of their layer, enlarged by TEST.MASK_LIMIT; stuff of panoptic maps has none."""
    model = predictor.network.model
    switches = {f"{task}_on": task in tasks for task in ("instance", "panoptic", "semantic")}
    queries = range(12)
    without = dict(follow_queries(predictor, IMAGE, queries))
    options = replace(model.inference, mask_limit=0.5, **switches)
    monkeypatch.setattr(model, "inference", options)
    thing = torch.tensor([label % 2 == 0 for label in range(len(model.is_thing))])
    monkeypatch.setitem(model._buffers, "is_thing", thing)
    cut = 0
    for query, views in follow_queries(predictor, IMAGE, queries):
        for view, whole in zip(views, without[query], strict=True):
            mask, before = (mask_utils.decode(x.rle).astype(bool) for x in (view, whole))
            if limited[0 if thing[view.label] else 1]:
                x0, y0, x1, y1 = view.box
                center, half = np.array([x0 + x1, y0 + y1]) / 2, np.array([x1 - x0, y1 - y0]) / 4
                x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
                inside = np.stack([abs(x - center[0]) <= half[0], abs(y - center[1]) <= half[1]])
                before &= inside.all(0)
            np.testing.assert_array_equal(mask, before)
            cut += mask.sum() < mask_utils.area(whole.rle)
    assert (cut > 0) == any(limited)


def test_drawing_shows_points_and_leaves_the_picture(predictor: MaskDINOPredictor) -> None:
    ((_, views),) = follow_queries(predictor, IMAGE, 1)
    before = IMAGE.copy()
    drawn = views[1].draw(IMAGE, scale=2)
    assert drawn.shape == (128, 128, 3)
    assert (drawn == np.array((40, 90, 255))).all(2).any()
    np.testing.assert_array_equal(IMAGE, before)


def test_unknown_query(predictor: MaskDINOPredictor) -> None:
    with pytest.raises(ValueError, match="no query 99: the model has 12"):
        follow_queries(predictor, IMAGE, [99])
