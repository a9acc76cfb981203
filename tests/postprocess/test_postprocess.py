"""Results against the plain way: all masks, resized, then the published rules as loops."""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskdino.ops import host
from maskdino.postprocess import Frame, InferenceOptions, postprocess
from maskdino.postprocess import frame as frame_module
from maskdino.postprocess import instances as instances_module
from maskdino.postprocess.frame import output_boxes, output_masks
from maskdino.postprocess.panoptic import is_segment, segment_candidates
from maskdino.structures import Predictions
from tests.helpers import tiny_cfg

QUERIES, CLASSES, CHANNELS = 14, 4, 6
THINGS = torch.ones(CLASSES, dtype=torch.bool)
FRAMES = (
    Frame((32, 64), (32, 64), (32, 64)),
    Frame((32, 64), (27, 50), (41, 83)),
    Frame((64, 32), (20, 30), (9, 13)),
    Frame((32, 32), (1, 1), (3, 2)),
)


def drawn(frame: Frame) -> tuple[Tensor, Tensor]:
    """Mask embeddings (Q, C) and a smooth pixel embedding (C, H/4, W/4)."""
    coarse = torch.randn(1, CHANNELS, 3, 3)
    size = (frame.canvas[0] // 4, frame.canvas[1] // 4)
    pixels = F.interpolate(coarse, size, mode="bicubic")[0]
    return torch.randn(QUERIES, CHANNELS) * 3, pixels


def options(**changes: object) -> InferenceOptions:
    """How results are made: all queries, and all pairs that are there."""
    known = InferenceOptions.from_config(tiny_cfg())
    return replace(known, **({"max_detections": 20, "score_threshold": 0.0} | changes))


def logits_of(scores: Tensor, labels: Tensor) -> Tensor:
    """(Q, K + 1) logits whose softmax is the score at the class, and the rest at none."""
    probs = torch.zeros(len(scores), CLASSES + 1)
    probs[torch.arange(len(scores)), labels] = scores
    probs[:, -1] = 1 - scores
    return probs.log()


def plain_masks(embeddings: Tensor, pixels: Tensor, frame: Frame, *, output: bool = True) -> Tensor:
    """Mask logits of all queries in the frame of the output, or of the image."""
    maps = torch.einsum("qc,chw->qhw", embeddings, pixels)[None]
    maps = F.interpolate(maps, frame.canvas, mode="bilinear", align_corners=False)
    maps = maps[..., : frame.image[0], : frame.image[1]]
    if output:
        maps = F.interpolate(maps, frame.output, mode="bilinear", align_corners=False)
    return maps[0]


def within_boxes(masks: Tensor, boxes: Tensor, factor: float, frame: Frame) -> Tensor:
    """Mask logits that are none outside of the boxes, enlarged about their centers."""
    result = torch.full_like(masks, -torch.inf)
    for mask, limited, box in zip(masks, result, output_boxes(boxes, frame).tolist(), strict=True):
        center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        reach = (box[2] - box[0]) * factor / 2, (box[3] - box[1]) * factor / 2
        for y, x in itertools.product(*map(range, frame.output)):
            if abs(x + 0.5 - center[0]) <= reach[0] and abs(y + 0.5 - center[1]) <= reach[1]:
                limited[y, x] = mask[y, x]
    return result


@pytest.fixture(params=["one at a time", "all at once", "without the compiled library"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes masks one by one, or all together; or as on other devices than a CPU."""
    at_once = 1 if request.param == "one at a time" else 1 << 25
    monkeypatch.setattr(frame_module, "ELEMENTS_AT_ONCE", at_once)
    if request.param == "without the compiled library":
        monkeypatch.setattr(frame_module, "has_compiled", lambda *_: False)


def test_boxes_in_the_output_frame() -> None:
    frame = Frame((64, 128), (50, 100), (100, 50))
    found = output_boxes(torch.tensor([[0.5, 0.5, 0.25, 0.5]]), frame)
    # In the canvas: x 48..80, y 16..48; the output is half as wide and twice as high.
    torch.testing.assert_close(found, torch.tensor([[24.0, 32.0, 40.0, 96.0]]))


@pytest.mark.usefixtures("chunks")
def test_masks_are_not_rounded_to_the_type_of_the_network() -> None:
    embeddings, pixels = (x.bfloat16() for x in drawn(FRAMES[1]))
    exact = plain_masks(embeddings.float(), pixels.float(), FRAMES[1])
    found = torch.cat(list(output_masks(embeddings, pixels, FRAMES[1])))
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("mask_scoring", [True, False])
@pytest.mark.parametrize("mask_limit", [0, 1.3])
@pytest.mark.parametrize("frame", FRAMES)
def test_instances_are_those_of_the_plain_way(
    frame: Frame, mask_limit: float, mask_scoring: bool
) -> None:
    embeddings, pixels = drawn(frame)
    scores, boxes = torch.rand(QUERIES, CLASSES), torch.rand(QUERIES, 4)
    is_thing, threshold = torch.tensor([True, False, True, True]), 0.2
    pairs = [(scores[q, k].item(), q, k) for q in range(QUERIES) for k in range(CLASSES)]
    masks = plain_masks(embeddings, pixels, frame)
    if mask_limit:
        masks = within_boxes(masks, boxes, mask_limit, frame)
    expected = []
    for score, q, k in sorted(pairs, reverse=True)[:20]:
        foreground = masks[q] > 0
        quality = (masks[q].sigmoid() * foreground).sum() / (foreground.sum() + 1e-6)
        final = score * quality.item() if mask_scoring else score
        if is_thing[k] and final >= threshold:
            expected.append((final, q, k, foreground))
    predictions = Predictions(scores.logit(), boxes, embeddings)
    asked = options(
        score_threshold=threshold,
        mask_scoring=mask_scoring,
        mask_limit=mask_limit,
        panoptic_on=True,
    )
    make = partial(postprocess, predictions, pixels, frame, asked, is_thing, tasks=["instance"])
    found = make()["instance"]
    assert found.image_size == frame.output and len(found) == len(expected)
    assert found.pred_classes.tolist() == [k for _, _, k, _ in expected]
    torch.testing.assert_close(found.scores, torch.tensor([s for s, *_ in expected]))
    queries = [q for _, q, _, _ in expected]
    torch.testing.assert_close(found.pred_boxes.tensor, output_boxes(boxes[queries], frame))
    for mask, (*_, foreground) in zip(found.pred_masks, expected, strict=True):
        assert (mask != foreground).float().mean() < 0.01  # rounding at the borders
    assert found.pred_masks.dtype == torch.bool
    compact = make(compact=True)["instance"]
    assert torch.equal(compact.pred_boxes.tensor, found.pred_boxes.tensor)
    assert torch.equal(compact.scores, found.scores)
    assert torch.equal(compact.pred_classes, found.pred_classes)
    for rle, mask in zip(compact.pred_rles, found.pred_masks, strict=True):
        assert (mask_utils.decode(rle) == mask.numpy()).all()


def test_detections_without_masks_and_more_than_there_are() -> None:
    scores = torch.rand(3, 2)
    predictions = Predictions(scores.logit(), torch.rand(3, 4), None)
    found = postprocess(predictions, None, FRAMES[1], options(), THINGS)["instance"]
    assert len(found) == 6 and not found.has("pred_masks")
    expected = scores.flatten().sort(descending=True).values
    torch.testing.assert_close(found.scores, expected)
    for task in ("panoptic", "semantic"):
        with pytest.raises(ValueError, match="without masks gives boxes only"):
            postprocess(predictions, None, FRAMES[1], options(), THINGS, tasks=[task])


@pytest.mark.parametrize("compact", [True, False])
def test_nothing_above_the_threshold(compact: bool) -> None:
    embeddings, pixels = drawn(FRAMES[1])
    predictions = Predictions(torch.randn(QUERIES, CLASSES), torch.rand(QUERIES, 4), embeddings)
    nothing = options(score_threshold=1.5, mask_scoring=True)
    found = postprocess(predictions, pixels, FRAMES[1], nothing, THINGS, compact=compact)
    assert len(found["instance"]) == 0
    if compact:
        assert found["instance"].pred_rles == []
    else:
        assert found["instance"].pred_masks.shape == (0, 41, 83)


@pytest.mark.parametrize("mask_scoring", [True, False])
@pytest.mark.parametrize("compact", [True, False])
def test_scores_at_the_threshold_are_kept(compact: bool, mask_scoring: bool) -> None:
    """Logits 0 are scores of exactly 1/2; masks that are sure of every pixel have quality 1."""
    frame = Frame((32, 32), (32, 32), (32, 32))
    logits = torch.tensor([[0.0, -9.0], [-1e-3, -9.0]])
    predictions = Predictions(logits, torch.rand(2, 4), torch.full((2, 1), 99.0))
    asked = options(score_threshold=0.5, mask_scoring=mask_scoring)
    pixels = torch.ones(1, 8, 8)
    found = postprocess(predictions, pixels, frame, asked, THINGS[:2], compact=compact)["instance"]
    assert found.scores.tolist() == [0.5] and found.pred_classes.tolist() == [0]


@pytest.mark.parametrize("compact", [True, False])
def test_features_are_those_of_the_queries(compact: bool) -> None:
    embeddings, pixels = drawn(FRAMES[1])
    content = torch.arange(QUERIES)[:, None].repeat(1, 3).bfloat16()
    boxes = torch.rand(QUERIES, 4)
    predictions = Predictions(torch.randn(QUERIES, CLASSES), boxes, embeddings, content)
    arguments = (predictions, pixels, FRAMES[1], options(score_threshold=0.1), THINGS)
    objects = postprocess(*arguments, compact=compact, features=True)["instance"]
    assert len(objects) > 0 and objects.features.shape == (len(objects), 3)
    queries = objects.features[:, 0].long()
    torch.testing.assert_close(objects.pred_boxes.tensor, output_boxes(boxes[queries], FRAMES[1]))
    assert objects.features.dtype == torch.float32
    assert not postprocess(*arguments, compact=compact)["instance"].has("features")
    with pytest.raises(ValueError, match="gives no features"):
        postprocess(replace(predictions, content=None), *arguments[1:], features=True)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("in_output", [True, False])
@pytest.mark.parametrize("frame", FRAMES)
def test_semantic(frame: Frame, in_output: bool) -> None:
    embeddings, pixels = drawn(frame)
    logits = torch.randn(QUERIES, CLASSES + 1)
    probs = logits.softmax(-1)
    masks = plain_masks(embeddings, pixels, frame, output=in_output).sigmoid()
    expected = torch.zeros(CLASSES, *masks.shape[1:])
    for q in range(QUERIES):
        for k in range(CLASSES):
            expected[k] += probs[q, k] * masks[q]
    if not in_output:
        expected = F.interpolate(
            expected[None], frame.output, mode="bilinear", align_corners=False
        )[0]
    asked = options(cross_entropy=True, instance_on=in_output, semantic_on=True)
    predictions = Predictions(logits, torch.rand(QUERIES, 4), embeddings)
    make = partial(postprocess, predictions, pixels, frame, asked, THINGS, tasks=["semantic"])
    found = make()["semantic"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(make(compact=True)["semantic"], found.argmax(0).to(torch.uint8))


@pytest.mark.parametrize("number", [0, 3])
def test_semantic_maps_begin_with_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was in their memory before."""
    embeddings, pixels = drawn(FRAMES[1])
    predictions = Predictions(torch.randn(QUERIES, CLASSES), torch.rand(QUERIES, 4), embeddings)
    some, asked = predictions.map(lambda x: x[:number]), options(semantic_on=True)
    make = partial(postprocess, some, pixels, FRAMES[1], asked, THINGS, tasks=["semantic"])
    expected = make()["semantic"]
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.zeros(*a, **k).fill_(7))
    assert torch.equal(make()["semantic"], expected)
    assert bool(expected.any()) == bool(number)


def slow_panoptic(
    keep: Tensor, scores: Tensor, labels: Tensor, probs: Tensor, is_thing: Tensor
) -> tuple[Tensor, list[tuple[int, int, float]]]:
    """The published merge: ids (H, W), and (id, class, score) of each segment."""
    kept = [q for q in range(len(scores)) if keep[q]]
    height, width = probs.shape[1:]
    winner = torch.full((height, width), -1)
    for i in range(height):
        for j in range(width):
            values = [(scores[q] * probs[q, i, j]).item() for q in kept]
            winner[i, j] = kept[values.index(max(values))] if values else -1
    ids, segments, stuff = torch.zeros(height, width, dtype=torch.int32), [], {}
    for q in kept:
        won, own = winner == q, probs[q] >= 0.5
        visible = won & own
        if not (won.any() and own.any() and visible.any()):
            continue
        if won.sum().item() / own.sum().item() < 0.8:
            continue
        label = labels[q].item()
        if not is_thing[label] and label in stuff:
            ids[visible] = stuff[label]
            continue
        segments.append((len(segments) + 1, label, scores[q].item()))
        ids[visible] = len(segments)
        if not is_thing[label]:
            stuff[label] = len(segments)
    return ids, segments


def merged(
    scores: Tensor,
    labels: Tensor,
    embeddings: Tensor,
    pixels: Tensor,
    frame: Frame,
    is_thing: Tensor = THINGS,
    boxes: Tensor | None = None,
    **changes: float,
) -> tuple[Tensor, list[dict]]:
    """Panoptic results of queries whose scores and classes are given; compact ones are equal."""
    boxes = torch.rand(len(scores), 4) if boxes is None else boxes
    predictions = Predictions(logits_of(scores, labels), boxes, embeddings)
    known = {"panoptic_score_threshold": 0.0, "panoptic_overlap_threshold": 0.8}
    asked = options(cross_entropy=True, **(known | changes))
    make = partial(postprocess, predictions, pixels, frame, asked, is_thing, tasks=["panoptic"])
    ids, segments = make()["panoptic"]
    again, same = make(compact=True)["panoptic"]
    assert torch.equal(ids, again) and same == segments
    return ids, segments


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mask_limit", [0, 1.3])
@pytest.mark.parametrize("frame", FRAMES[1:3])
def test_panoptic_merge(frame: Frame, mask_limit: float, seed: int) -> None:
    torch.manual_seed(seed)
    embeddings, pixels = drawn(frame)
    # A few queries far above the others: what they win is most of their masks.
    scores, labels = torch.rand(QUERIES) ** 4, torch.randint(0, CLASSES, (QUERIES,))
    keep, is_thing = scores > 0.01, torch.tensor([True, False, False, True])
    boxes = torch.rand(QUERIES, 4)
    limits = {"panoptic_score_threshold": 0.01, "mask_limit": mask_limit}
    found, segments = merged(
        scores, labels, embeddings, pixels, frame, is_thing, boxes=boxes, **limits
    )
    masks = plain_masks(embeddings, pixels, frame)
    if mask_limit:  # of things alone
        limited = within_boxes(masks, boxes, mask_limit, frame)
        masks = torch.where(is_thing[labels][:, None, None], limited, masks)
    probs = masks.sigmoid()
    ids, expected = slow_panoptic(keep, scores, labels, probs, is_thing)
    assert found.dtype == torch.int32 and found.shape == frame.output
    assert (found != ids).float().mean() < 0.01  # rounding at the borders
    assert len(expected) > 0
    assert [(s["id"], s["category_id"]) for s in segments] == [(i, k) for i, k, _ in expected]
    for segment, (_, label, score) in zip(segments, expected, strict=True):
        assert segment["isthing"] == bool(is_thing[label])
        assert ("score" in segment) == segment["isthing"]
        assert segment.get("score", score) == pytest.approx(score)


def test_stuff_of_one_class_is_one_segment() -> None:
    """Two queries that share the image between them: merged if stuff, two segments if things."""
    pixels = torch.ones(1, 8, 8)
    pixels[:, :, 4:] = -1
    frame = Frame((32, 32), (32, 32), (32, 32))
    for thing in (True, False):
        ids, segments = merged(
            torch.tensor([0.9, 0.8]),
            torch.tensor([0, 0]),
            torch.tensor([[20.0], [-20.0]]),
            pixels,
            frame,
            torch.tensor([thing] * CLASSES),
        )
        assert len(segments) == (2 if thing else 1)
        assert ids[:, :15].unique().tolist() == [1]
        assert ids[:, 17:].unique().tolist() == [2 if thing else 1]


def test_covered_segments_are_dropped() -> None:
    """The weaker of two equal masks has nothing left."""
    frame = Frame((32, 32), (32, 32), (32, 32))
    scores, labels = torch.tensor([0.3, 0.9]), torch.tensor([0, 0])
    ids, segments = merged(scores, labels, torch.full((2, 1), 9.0), torch.ones(1, 8, 8), frame)
    assert [s["score"] for s in segments] == [pytest.approx(0.9)]
    assert (ids == 1).all()


@pytest.mark.parametrize(("threshold", "number"), [(0.5, 2), (0.51, 1)])
def test_half_of_a_segment_is_enough_for_a_threshold_of_half(threshold: float, number: int) -> None:
    """A sure mask of the left half covers that of the whole image."""
    pixels = torch.ones(2, 8, 8)
    pixels[1, :, 4:] = -1
    frame = Frame((32, 32), (32, 32), (32, 32))
    embeddings = torch.tensor([[99.0, 0.0], [0.0, 99.0]])
    logits = logits_of(torch.tensor([0.3, 0.9]), torch.tensor([0, 1]))
    predictions = Predictions(logits, torch.rand(2, 4), embeddings)
    asked = options(
        cross_entropy=True, panoptic_score_threshold=0.1, panoptic_overlap_threshold=threshold
    )
    found = postprocess(predictions, pixels, frame, asked, THINGS, tasks=["panoptic"])
    ids, segments = found["panoptic"]
    assert len(segments) == number
    assert ids[0].unique_consecutive().tolist() == ([2, 1] if number == 2 else [1, 0])


def test_segments_are_seen_and_keep_enough_of_their_masks() -> None:
    """The second wins pixels outside of its mask alone, the fourth too few."""
    own, won, left = torch.tensor([[0, 10, 10, 10], [5, 8, 9, 7], [0, 0, 8, 7]]).unbind()
    found = is_segment(own.double(), won, left, options(panoptic_overlap_threshold=0.8))
    assert found.tolist() == [False, False, True, False]


def test_candidates_are_chosen_by_class_scores_and_compared_by_probabilities() -> None:
    logits = torch.tensor([[2.0, -2.0], [-3.0, 0.0]])
    asked = options(panoptic_score_threshold=0.6, temperature=0.5)
    chosen, scores, labels = segment_candidates(logits, asked)
    assert chosen.tolist() == [True, False]  # 0.88 and 0.5
    assert labels.tolist() == [0, 1]
    for row, score in zip(logits.tolist(), scores.tolist(), strict=True):
        powers = [math.exp(2 / (1 + math.exp(-logit))) for logit in row]
        assert score == pytest.approx(max(powers) / sum(powers))


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
@pytest.mark.parametrize("resize", [False, True])
def test_models_of_several_tasks_sum_in_the_frame_of_the_output(task: str, resize: bool) -> None:
    switches = {f"{name}_on": name == task for name in ("instance", "panoptic", "semantic")}
    found = options(resize_before_sum=resize, **switches).sum_in_output_frame
    assert found == (resize or task != "semantic")


@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (256, torch.int32)])
def test_class_255_of_8_bits_would_be_ignored(classes: int, dtype: torch.dtype) -> None:
    logits = torch.full((1, classes), -9.0)
    logits[0, -1] = 9.0
    predictions = Predictions(logits, torch.rand(1, 4), torch.full((1, 1), 9.0))
    arguments = (predictions, torch.ones(1, 1, 1), Frame((4, 4), (4, 4), (4, 4)), options())
    things = torch.ones(classes, dtype=torch.bool)
    found = postprocess(*arguments, things, tasks=["semantic"], compact=True)["semantic"]
    assert found.dtype == dtype and (found == classes - 1).all()


def test_queries_at_the_score_threshold_take_no_part() -> None:
    """Logits 0 are scores of exactly 1/2."""
    frame = Frame((32, 32), (32, 32), (32, 32))
    predictions = Predictions(torch.zeros(1, 2), torch.rand(1, 4), torch.full((1, 1), 9.0))
    for threshold, number in ((0.5, 0), (0.49, 1)):
        asked = options(panoptic_score_threshold=threshold, panoptic_overlap_threshold=0.8)
        arguments = (predictions, torch.ones(1, 8, 8), frame, asked, THINGS[:2])
        assert len(postprocess(*arguments, tasks=["panoptic"])["panoptic"][1]) == number


def test_panoptic_of_no_queries() -> None:
    embeddings, pixels = drawn(FRAMES[1])
    scores, labels = torch.rand(QUERIES), torch.zeros(QUERIES, dtype=torch.int64)
    ids, segments = merged(
        scores, labels, embeddings, pixels, FRAMES[1], panoptic_score_threshold=1.0
    )
    assert segments == [] and ids.shape == (41, 83) and not ids.any()


@pytest.mark.parametrize("tasks", [["instance"], ["panoptic"], ["instance", "panoptic"]])
def test_the_host_asks_twice_whatever_the_tasks(tasks: list[str]) -> None:
    embeddings, pixels = drawn(FRAMES[1])
    predictions = Predictions(torch.randn(QUERIES, CLASSES), torch.rand(QUERIES, 4), embeddings)
    asked = options(score_threshold=0.2, panoptic_score_threshold=0.2)
    with mock.patch.object(host, "to_host", wraps=host.to_host) as copy:
        postprocess(predictions, pixels, FRAMES[1], asked, THINGS, tasks=tasks)
    assert sum(bool(call.args[0]) for call in copy.call_args_list) == 2


@pytest.mark.parametrize("index", [[], [0], [3, 4, 8], [1, 2, 3, 5, 6, 7, 8]])
@pytest.mark.parametrize("masks_at_once", [1, 2, 100])
def test_masks_that_are_left_move_up(
    index: list[int], masks_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_module, "ELEMENTS_AT_ONCE", masks_at_once * 20)
    masks, index = torch.rand(9, 4, 5) > 0.5, torch.tensor(index, dtype=torch.int64)
    expected = masks[index]
    found = instances_module._moved_up(masks, index)
    assert torch.equal(found, expected)
    assert found.untyped_storage().data_ptr() == masks.untyped_storage().data_ptr()


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations make, at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.known.add(id(storage))
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def test_run_lengths_of_packed_masks_keep_their_order() -> None:
    frame = Frame((8, 8), (8, 8), (5, 7))
    masks = torch.rand(4, 5, 7) > 0.5
    packed = [host.pack_masks(masks[:3]), host.pack_masks(masks[3:])]
    found = instances_module._unpacked(packed, frame)
    for mask, rle in zip(masks, found, strict=True):
        assert (torch.from_numpy(mask_utils.decode(rle)).bool() == mask).all()


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_masks_of_a_large_image_are_held_once(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, frame = 60, Frame((64, 64), (64, 64), (512, 768))
    pixels = 512 * 768
    monkeypatch.setattr(frame_module, "ELEMENTS_AT_ONCE", pixels)
    _, pixel_embedding = drawn(frame)
    embeddings = torch.randn(queries, CHANNELS) * 3
    scores = torch.rand(queries, 1) / 2 + 0.5
    predictions = Predictions(scores.logit(), torch.rand(queries, 4), embeddings)
    asked = options(max_detections=queries, score_threshold=threshold, mask_scoring=True)
    with Memory() as memory:
        found = postprocess(predictions, pixel_embedding, frame, asked, THINGS)["instance"]
    assert len(found) == queries if threshold == 0 else 20 < len(found) < queries
    # Beside all masks, a map in float32, its resized form and a product; a few single masks.
    assert len(found) * pixels <= memory.most < (queries + 3 * 4 + 4) * pixels


def test_run_lengths_of_a_large_image_need_no_memory_for_all_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries, frame = 150, Frame((64, 64), (64, 64), (512, 768))
    pixels = 512 * 768
    monkeypatch.setattr(frame_module, "ELEMENTS_AT_ONCE", pixels)
    _, pixel_embedding = drawn(frame)
    predictions = Predictions(
        torch.rand(queries, 1), torch.rand(queries, 4), torch.randn(queries, CHANNELS)
    )
    asked = options(max_detections=queries, mask_scoring=True, run_lengths=True)
    with Memory() as memory:
        found = postprocess(predictions, pixel_embedding, frame, asked, THINGS)["instance"]
    assert len(found.pred_rles) == queries and not found.has("pred_masks")
    # A map in float32, its resized form and a product; a single mask. Packed, all have 19 `pixels`.
    assert memory.most < (3 * 4 + 4) * pixels
