"""Tests of maskdino.custom.plan."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from maskdino.config import load_config
from maskdino.custom import plan
from maskdino.custom.annotations import Summary
from maskdino.custom.plan import Cost, Machine
from maskdino.custom.request import Request
from maskdino.data import DataError
from tests.helpers import tiny_cfg

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "custom" / "maskdino_R50.yaml")
CPU = Machine("cpu", 8000.0, 1)
GPU = Machine("cuda", 40000.0, 1)
CHEAP = Cost(1000.0, 500.0, 0.1)


def summary(images: int = 100, **values: object) -> Summary:
    known = {"counts": {"a": 50, "b": 9}, "has_masks": True, "longest_side": 640}
    return Summary(**{"images": images, "most_objects": 7, **known, **values})


def asked(**values: object) -> Request:
    return Request(train_json=Path(), train_images=Path(), output=Path(), **values)


def planned(
    data: Summary,
    machine: Machine = GPU,
    request: Request | None = None,
    cost: Cost | None = CHEAP,
) -> tuple[object, int]:
    cfg = load_config(CONFIG)
    request = request or asked()
    plan.apply_data(cfg, data, machine, request)
    return cfg, plan.apply_schedule(cfg, data, machine, request, cost)


def test_classes_and_masks_follow_from_the_data() -> None:
    cfg, _ = planned(summary())
    node = cfg.MODEL.MASK_DINO
    assert (node.NUM_CLASSES, node.MASK_ON, node.DENOISING.MODE) == (2, True, "boxes_and_masks")
    for data, request in ((summary(has_masks=False), None), (summary(), asked(boxes_only=True))):
        node = planned(data, request=request)[0].MODEL.MASK_DINO
        assert (node.MASK_ON, node.DENOISING.MODE) == (False, "boxes")
        assert node.QUERY_SELECTION.MASK_ENHANCED_ANCHORS == "none"


@pytest.mark.parametrize(
    ("side", "machine", "wanted", "expected"),
    [
        (640, GPU, None, 640),
        (641, GPU, None, 672),
        (4000, GPU, None, 1024),
        (4000, CPU, None, 512),
        (40, CPU, None, 256),
        (4000, CPU, 1333, 1344),
    ],
)
def test_image_size(side: int, machine: Machine, wanted: int | None, expected: int) -> None:
    cfg, _ = planned(summary(longest_side=side), machine, asked(image_size=wanted))
    assert [expected, expected] == cfg.INPUT.LSJ.SIZE
    assert cfg.INPUT.MAX_SIZE_TEST == cfg.INPUT.MIN_SIZE_TEST == expected


def test_crowded_images_get_more_queries_and_detections() -> None:
    few, many = (planned(summary(most_objects=n))[0] for n in (7, 420))
    assert few.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES == 300
    assert few.TEST.DETECTIONS_PER_IMAGE == 100
    assert many.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES == 850
    assert many.TEST.DETECTIONS_PER_IMAGE == 450


@pytest.mark.parametrize(
    ("images", "machine", "cost", "expected"),
    [
        (10_000, GPU, CHEAP, 16),  # the configuration's own
        (10_000, GPU, Cost(1000.0, 7000.0, 0.1), 4),  # of 31,000 MB
        (10_000, Machine("cuda", 40000.0, 4), Cost(1000.0, 20000.0, 0.1), 4),
        (15, GPU, CHEAP, 2),  # few images: more steps
        (1, GPU, CHEAP, 2),
    ],
)
def test_batch_size(images: int, machine: Machine, cost: Cost, expected: int) -> None:
    cfg, _ = planned(summary(images), machine, cost=cost)
    assert expected == cfg.SOLVER.IMS_PER_BATCH
    assert pytest.approx(1e-4 * math.sqrt(expected / 16), rel=0.01) == cfg.SOLVER.BASE_LR


@pytest.mark.parametrize(
    ("images", "machine", "seconds", "expected"),
    [
        (15, GPU, 0.1, 300),
        (240, GPU, 0.1, 100),
        (118_000, GPU, 0.1, 12),
        (240, CPU, 1.5, 10),  # 3600 s / (1.5 s x 240)
        (100_000, CPU, 1.5, 1),
    ],
)
def test_epochs(images: int, machine: Machine, seconds: float, expected: int) -> None:
    cfg, epochs = planned(summary(images), machine, cost=Cost(1000.0, 500.0, seconds))
    per_epoch = math.ceil(images / cfg.SOLVER.IMS_PER_BATCH)
    assert epochs == expected
    assert expected * per_epoch == cfg.SOLVER.MAX_ITER
    assert cfg.TEST.EVAL_PERIOD % per_epoch == 0
    assert cfg.SOLVER.MAX_ITER / cfg.TEST.EVAL_PERIOD <= 20
    assert cfg.TEST.EVAL_PERIOD == cfg.SOLVER.CHECKPOINT_PERIOD
    assert all(0 < step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS)


def test_what_was_asked_for_needs_no_measurement() -> None:
    cfg, epochs = planned(summary(15), request=asked(epochs=1, batch_size=15), cost=None)
    assert (epochs, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (1, 1, ())


def test_images_shrink_until_a_step_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(CONFIG)
    plan.apply_data(cfg, summary(longest_side=1000), GPU, asked())
    sizes = []

    def cost(cfg: object, _objects: int) -> Cost | None:
        sizes.append(cfg.INPUT.LSJ.SIZE[0])
        return None if sizes[-1] > 700 else Cost(1000.0, 0.09 * sizes[-1] ** 2, 1.0)

    monkeypatch.setattr(plan, "measure", cost)
    fitting = plan.fit_memory(cfg, summary(), GPU, asked())
    assert sizes == [1024, 768, 576]
    assert fitting.image_mb == pytest.approx(0.09 * 576**2)
    with pytest.raises(DataError, match="does not fit.*--image-size"):
        plan.fit_memory(cfg, summary(), Machine("cuda", 100.0, 1), asked())


@pytest.mark.slow
def test_measured_cost_is_plausible() -> None:
    cfg = tiny_cfg(NUM_CLASSES=2)
    plan.apply_data(cfg, summary(), CPU, asked(image_size=64))
    cost = plan.measure(cfg, 3)
    assert 100 < cost.fixed_mb < 4000  # PyTorch and detectron2 alone take some hundred
    assert 0 < cost.image_mb < 1000
    assert 0 < cost.image_seconds < 60
    assert plan.find_machine(1).memory_mb > 100
