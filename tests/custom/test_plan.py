"""Tests of maskdino.custom.plan."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from functools import partial
from multiprocessing import spawn
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskdino.config import load_config
from maskdino.custom import plan
from maskdino.custom.annotations import Annotations, Summary, summarize
from maskdino.custom.measure import Memory, Pace, StopWatch, measure_memory, measure_pace
from maskdino.custom.plan import Machine
from maskdino.custom.prepare import prepare_data, register_prepared
from maskdino.custom.request import Request
from maskdino.data import DataError
from tests.custom.drawn import write_drawn
from tests.helpers import tiny_cfg

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "custom" / "maskdino_R50.yaml")
CPU = Machine("cpu", 8000.0, 1)
GPU = Machine("cuda", 40000.0, 1)
SMALL = Memory(1000.0, 500.0)
FAST = Pace(step=0.1, evaluation=0.0)


def summary(images: int = 100, **values: object) -> Summary:
    known = {"counts": {"a": 50, "b": 9}, "has_masks": True, "longest_side": 640}
    known |= {"images": images, "most_objects": 7, "many_objects": 7}
    return Summary(**known | values)


def asked(**values: object) -> Request:
    return Request(train_json=Path(), train_images=Path(), output=Path(), **values)


def planned(
    data: Summary,
    machine: Machine = GPU,
    request: Request | None = None,
    memory: Memory | None = SMALL,
    pace: Pace | None = FAST,
) -> tuple[object, int]:
    cfg = load_config(CONFIG)
    request = request or asked()
    plan.apply_data(cfg, data, machine, request)
    plan.enlarge_small_objects(cfg, data, request)
    plan.apply_batch(cfg, data, machine, request, memory)
    return cfg, plan.apply_schedule(cfg, data, machine, request, pace)


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


@pytest.mark.parametrize(
    ("share", "zoom"),
    [(0.0, 1.0), (20 / 512, 1.0), (19 / 512, 25 / 19), (10 / 512, 2.5), (1 / 512, 4.0)],
)
def test_small_objects_are_enlarged(share: float, zoom: float) -> None:
    """From less than 20 pixels to 25, four times at most; slices as the images of training."""
    data = summary(longest_side=2000, object_side=share)
    whole = planned(data, CPU, asked(image_size=512))[0]
    cfg = planned(data, CPU)[0]
    assert cfg.INPUT.LSJ.SIZE == whole.INPUT.LSJ.SIZE == [512, 512]
    assert zoom * whole.INPUT.LSJ.MIN_SCALE == pytest.approx(cfg.INPUT.LSJ.MIN_SCALE)
    assert zoom * whole.INPUT.LSJ.MAX_SCALE == pytest.approx(cfg.INPUT.LSJ.MAX_SCALE)
    assert cfg.INPUT.MIN_SIZE_TEST == 512
    assert (0, 2000 / zoom if zoom > 1 else 0) == (whole.TEST.SLICES.SIZE, cfg.TEST.SLICES.SIZE)


def test_size_of_objects_is_a_share_of_their_images() -> None:
    data = Annotations(
        json_file=Path(),
        image_root=Path(),
        images=[{"id": 1, "width": 100, "height": 50}, {"id": 2, "width": 10, "height": 20}],
        annotations=[
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 9]},  # 0.06 of 100
            {"image_id": 2, "category_id": 1, "bbox": [0, 0, 2, 2]},  # 0.1 of 20
            {"image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9]},
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1},
        ],
        categories=[{"id": 1, "name": "a"}],
    )
    assert summarize(data).object_side == pytest.approx(0.1)


def test_crowded_images_get_more_queries_and_detections() -> None:
    few, many = (planned(summary(most_objects=n, many_objects=n))[0] for n in (7, 420))
    assert few.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES == 300
    assert few.TEST.DETECTIONS_PER_IMAGE == 100
    assert many.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES == 850
    assert many.TEST.DETECTIONS_PER_IMAGE == 450


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 100),
        (["INPUT.COPY_PASTE.PROBABILITY", "0.5"], 200),
        (["INPUT.COPY_PASTE.PROBABILITY", "0.5", "INPUT.COPY_PASTE.MAX_OBJECTS", "30"], 130),
        (["INPUT.COPY_PASTE.PROBABILITY", "0.02"], 100),
        (["INPUT.MOSAIC.PROBABILITY", "1.0", "INPUT.MOSAIC.MAX_SCALE", "1.6"], 100),
        (["INPUT.MOSAIC.PROBABILITY", "1.0", "INPUT.MOSAIC.MAX_SCALE", "0.5"], 400),
        (["INPUT.MOSAIC.PROBABILITY", "1.0"], 205),
        (["INPUT.MOSAIC.PROBABILITY", "1.0", "INPUT.COPY_PASTE.PROBABILITY", "0.1"], 305),
    ],
)
def test_queries_follow_the_objects_of_mixed_images(overrides: list[str], expected: int) -> None:
    cfg = load_config(CONFIG, overrides)
    assert plan.mixed_objects(cfg, 100) == expected
    plan.apply_data(cfg, summary(many_objects=100), GPU, asked())
    queries = cfg.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES
    assert queries == max(300, math.ceil(2 * expected / 50) * 50)


def test_one_full_image_among_many_does_not_decide_the_queries() -> None:
    numbers = [400, *range(100), 0]  # the fullest, others, and one without objects
    data = Annotations(
        json_file=Path(),
        image_root=Path(),
        images=[{"id": i, "width": 9, "height": 9} for i in range(len(numbers))],
        annotations=[
            {"image_id": i, "category_id": 1} for i, n in enumerate(numbers) for _ in range(n)
        ],
        categories=[{"id": 1, "name": "a"}],
    )
    found = summarize(data)
    assert (found.most_objects, found.many_objects) == (400, 95)
    cfg = planned(found, CPU, pace=FAST)[0]
    assert cfg.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES == 300
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 400


@pytest.mark.parametrize(
    ("images", "machine", "memory", "expected"),
    [
        (10_000, GPU, SMALL, 16),  # the configuration's own
        (10_000, GPU, Memory(1000.0, 7000.0), 4),  # of 31,000 MB
        (10_000, Machine("cuda", 40000.0, 4), Memory(1000.0, 20000.0), 4),
        (15, GPU, SMALL, 2),  # few images: more steps
        (1, GPU, SMALL, 2),
    ],
)
def test_batch_size(images: int, machine: Machine, memory: Memory, expected: int) -> None:
    cfg, _ = planned(summary(images), machine, memory=memory)
    assert expected == cfg.SOLVER.IMS_PER_BATCH
    assert pytest.approx(1e-4 * math.sqrt(expected / 16), rel=0.01) == cfg.SOLVER.BASE_LR


@pytest.mark.parametrize(
    ("images", "machine", "pace", "minutes", "expected"),
    [
        (15, GPU, FAST, None, 300),
        (240, GPU, FAST, None, 100),
        (118_000, GPU, FAST, None, 12),
        (240, CPU, Pace(12.0, 0.0), None, 10),  # 3600 s / (12 s x 240 / 8)
        (240, CPU, Pace(12.0, 360.0), None, 5),  # as much time again for evaluations
        (100_000, CPU, Pace(24.0, 0.0), None, 1),
        (240, CPU, FAST, None, 100),  # there is more time than need be
        (240, CPU, FAST, 10, 200),
        (240, CPU, Pace(0.1, 3.0), 10, 180),  # 20 evaluations take a minute of the ten
        (240, GPU, Pace(24.0, 0.0), 60, 10),
    ],
)
def test_epochs(
    images: int, machine: Machine, pace: Pace, minutes: int | None, expected: int
) -> None:
    cfg, epochs = planned(summary(images), machine, asked(minutes=minutes), pace=pace)
    per_epoch = math.ceil(images / cfg.SOLVER.IMS_PER_BATCH)
    assert epochs == expected
    assert expected * per_epoch == cfg.SOLVER.MAX_ITER
    assert cfg.TEST.EVAL_PERIOD % per_epoch == 0
    assert cfg.SOLVER.MAX_ITER / cfg.TEST.EVAL_PERIOD <= 20
    assert cfg.TEST.EVAL_PERIOD == cfg.SOLVER.CHECKPOINT_PERIOD
    assert all(0 < step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS)


def test_what_was_asked_for_needs_no_measurement() -> None:
    cfg, epochs = planned(
        summary(15), request=asked(epochs=1, batch_size=15), memory=None, pace=None
    )
    assert (epochs, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (1, 1, ())


def test_images_shrink_until_a_step_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(CONFIG)
    plan.apply_data(cfg, summary(longest_side=1000), GPU, asked())
    sizes = []

    def cost(cfg: object, objects: int) -> Memory | None:
        assert objects == 70
        sizes.append(cfg.INPUT.LSJ.SIZE[0])
        return None if sizes[-1] > 700 else Memory(1000.0, 0.09 * sizes[-1] ** 2)

    monkeypatch.setattr(plan, "measure_memory", cost)
    fullest = summary(most_objects=70)
    fitting = plan.fit_memory(cfg, fullest, GPU, asked())
    assert sizes == [1024, 768, 576]
    assert fitting.image_mb == pytest.approx(0.09 * 576**2)
    with pytest.raises(DataError, match="does not fit.*--image-size"):
        plan.fit_memory(cfg, fullest, Machine("cuda", 100.0, 1), asked())


class Ticking:
    """A clock on which steps take given times, in seconds."""

    def __init__(self, *steps: float) -> None:
        self.now, self.steps = 0.0, list(steps)

    def __call__(self) -> float:
        now = self.now
        self.now += self.steps.pop(0) if self.steps else 0.0
        return now


@pytest.mark.parametrize(
    ("steps", "counted", "pace"),
    [
        ([9.0, 5.0, *[0.1] * 50], 42, 0.1),  # at most 40, after the first two
        ([9.0, 5.0, *[4.0, 1.0] * 9], 10, 2.5),  # after 20 seconds
        ([9.0, 5.0, *[30.0] * 9], 8, 30.0),  # but six at least
    ],
)
def test_steps_are_timed_once_they_are_at_pace(
    steps: list[float], counted: int, pace: float
) -> None:
    watch = StopWatch(Ticking(*steps))
    watch.trainer = SimpleNamespace(stopped=False)
    watch.before_train()
    number = 0
    while not watch.trainer.stopped:
        watch.after_step()
        number += 1
    assert number == counted
    assert watch.step() == pytest.approx(pace)


@pytest.fixture
def _warm(warm_python: str) -> Iterator[None]:
    """Processes that are spawned begin with PyTorch imported."""
    before = spawn.get_executable()
    multiprocessing.set_executable(warm_python)
    yield
    multiprocessing.set_executable(before)


@pytest.mark.usefixtures("_warm")
@pytest.mark.slow
def test_measured_cost_is_plausible(tmp_path: Path) -> None:
    cfg = tiny_cfg(NUM_CLASSES=2)
    plan.apply_data(cfg, summary(), CPU, asked(image_size=64))
    memory = measure_memory(cfg, 3)
    assert 100 < memory.fixed_mb < 4000  # PyTorch and detectron2 alone take some hundred
    assert 0 < memory.image_mb < 1000
    assert plan.find_machine(1).memory_mb > 100
    drawn = write_drawn(tmp_path / "drawn")
    request = Request(train_json=drawn.json_file, train_images=drawn.images, output=tmp_path)
    data = prepare_data(request)
    plan.apply_data(cfg, data.train, CPU, asked(image_size=64))
    cfg.SOLVER.IMS_PER_BATCH = 2
    pace = measure_pace(cfg, partial(register_prepared, tmp_path), 3)
    assert 0 < pace.step < 60
    assert 0 <= pace.evaluation < 60
