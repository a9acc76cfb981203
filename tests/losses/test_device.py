"""What matching and losses owe to a GPU, shown without one."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from maskdino.losses import criterion as criterion_module
from maskdino.losses import matcher as matcher_module
from maskdino.losses.assignment import PendingMatches
from maskdino.losses.functional import mask_bce_cost, mask_dice_cost
from maskdino.losses.matcher import CostWeights, HybridMatcher
from maskdino.structures import Matches, PackedMasks, Predictions, Targets
from tests.losses.drawn import FixedPoints, drawn_predictions, drawn_targets
from tests.losses.test_criterion import criterion_with
from tests.losses.test_matcher import WEIGHTS

SECOND_GPU = torch.device("cuda", 1)


def test_costs_of_no_object_are_where_the_predictions_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the matches go as well, and losses elsewhere could not be indexed by them."""
    devices = []
    monkeypatch.setattr(
        matcher_module, "PendingMatches", lambda costs, *_: devices.append(costs.device)
    )
    predictions, pixels = drawn_predictions(1, 2, 3)
    matcher = HybridMatcher(weights=WEIGHTS, decouple_stuff_boxes=False, points=FixedPoints())
    predictions, targets = predictions.map(lambda x: x.to("meta")), drawn_targets((0, 0))
    there = {
        name: value.to("meta")
        for name, value in vars(targets).items()
        if isinstance(value, (Tensor, PackedMasks))
    }
    matcher.start(predictions, pixels.to("meta"), replace(targets, **there))
    assert devices == [torch.device("meta")]


def test_objects_are_counted_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sum on the device; the process's own number is never read back."""
    monkeypatch.setattr(criterion_module.comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(10))
    criterion = criterion_with(FixedPoints())
    for counts, expected in (((3, 1), 3.5), ((0, 0), 2.5)):
        mean = criterion._mean_objects(drawn_targets(counts))
        assert isinstance(mean, Tensor) and mean.tolist() == [expected]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total)
    assert criterion._mean_objects(drawn_targets((0, 0))).tolist() == [1]


class OnSecondGpu(Tensor):
    """Claims to be on another GPU than the current one."""

    is_cuda = True
    device = SECOND_GPU


class Recorder:
    """Stands in for CUDA's events, streams and the choice of a device; notes what happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded, self.waited, self.device = [], [], threading.local()
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **kw: empty(*size, **kw))  # noqa: ARG005
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
        monkeypatch.setattr(torch.cuda, "device", lambda device: Chosen(self, device))
        keep = lambda pairs, device: (pairs, device)  # noqa: E731
        monkeypatch.setattr(Matches, "from_numpy", staticmethod(keep))

    def record(self, stream: object = None) -> None:
        self.recorded.append(stream)

    def synchronize(self) -> None:
        self.waited.append((threading.current_thread(), getattr(self.device, "chosen", None)))


class Chosen:
    """`torch.cuda.device`, for one thread."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self.recorder, self.chosen = recorder, device

    def __enter__(self) -> None:
        self.recorder.device.chosen = self.chosen

    def __exit__(self, *_: object) -> None:
        self.recorder.device.chosen = None


def test_costs_of_another_gpu_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is of the stream that copies; the thread that waits chooses that GPU first."""
    recorder = Recorder(monkeypatch)
    costs = torch.rand(1, 4, 3).as_subclass(OnSecondGpu)
    pairs, device = PendingMatches(costs, drawn_targets((3,))).result()
    assert device == SECOND_GPU
    assert recorder.recorded == [("stream of", SECOND_GPU)]
    ((thread, chosen),) = recorder.waited
    assert thread is not threading.current_thread() and chosen == SECOND_GPU
    assert sorted(pairs[0][3].tolist()) == [0, 1, 2]


def circles(number: int, size: int) -> tuple[Tensor, Tensor]:
    """Masks (N, 4 size, 4 size) of circles, and maps (N, size, size) that are positive inside."""
    centers = torch.rand(number, 2, 1, 1) * 4 * size
    radius = 8 + torch.rand(number, 1, 1) * size / 8
    fine, coarse = torch.arange(4 * size) + 0.5, torch.arange(size) * 4 + 2.0

    def inside(place: Tensor) -> Tensor:
        distance = ((place[:, None] - centers[:, 0]) ** 2 + (place - centers[:, 1]) ** 2).sqrt()
        return radius - distance

    return inside(fine) > 0, (2 * inside(coarse)).clamp(-16, 16)


@pytest.fixture
def circle_queries() -> tuple[Predictions, Tensor, Targets]:
    """Query k predicts circle k nearly right."""
    number, channels, size = 12, 16, 256
    masks, maps = circles(number, size)
    pixels = torch.zeros(1, channels, size, size)
    pixels[0, :number] = maps
    embeddings = 0.003 * torch.randn(1, 1, number, channels)
    embeddings[0, 0, range(number), range(number)] += 1 + 0.02 * torch.randn(number)
    boxes = torch.rand(number, 4) * 0.1 + 0.4
    predictions = Predictions(torch.zeros(1, 1, number, 3), boxes[None, None] + 0.01, embeddings)
    yes = torch.ones(number, dtype=torch.bool)
    labels = torch.zeros(number, dtype=torch.int64)
    targets = Targets(labels, boxes, yes, yes, PackedMasks.from_bool(masks), (number,), ("drawn",))
    return predictions, pixels, targets


def costs_of(
    predictions: Predictions, pixels: Tensor, targets: Targets, points: FixedPoints
) -> np.ndarray:
    weights = CostWeights(4.0, 0.0, 0.0, 5.0, 5.0)
    matcher = HybridMatcher(weights=weights, decouple_stuff_boxes=False, points=points)
    pending = matcher.start(predictions, pixels, targets)
    pending.result()
    return pending._costs[0].numpy()


def test_costs_in_bfloat16_are_close(
    circle_queries: tuple[Predictions, Tensor, Targets],
) -> None:
    """Points are not rounded, and sums over points are those of float32."""
    predictions, pixels, targets = circle_queries
    points = FixedPoints(6000)
    exact = costs_of(predictions, pixels, targets, points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = predictions.map(lambda x: x.bfloat16())
        found = costs_of(half, pixels.bfloat16(), targets, points)
    error = np.abs(found - exact)
    assert error.diagonal().mean() < 0.02
    assert error.mean() < 0.02


@pytest.mark.parametrize("cost", [mask_bce_cost, mask_dice_cost])
def test_sums_over_points_do_not_follow_autocast(cost: type[mask_bce_cost]) -> None:
    logits, labels = torch.randn(5, 4000), (torch.rand(3, 4000) < 0.1).float()
    expected = cost(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cost(logits, labels), expected)
