"""What a GPU would refuse or wait for, found without one (see `tests.pretend_device`)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image
from torch import Tensor

from maskdino.engine.train_step import LossReader
from maskdino.evaluation.coco import instances_to_records
from maskdino.evaluation.panoptic import PanopticEvaluator
from maskdino.evaluation.semantic import SemanticEvaluator
from maskdino.inference.predictor import MaskDINOPredictor
from maskdino.model import MaskDINO
from maskdino.ops import _library
from maskdino.postprocess import Frame, instances, postprocess
from maskdino.postprocess import frame as frame_module
from maskdino.structures import PackedMasks, Predictions, Targets
from tests.helpers import NUM_CLASSES, drawn_batch, tiny_cfg
from tests.losses.drawn import FixedPoints
from tests.losses.test_device import circle_queries, costs_of  # noqa: F401 - a fixture
from tests.pretend_device import CUDA, DeviceMix, OnDevice, PretendDevice, missing_api

pytestmark = [
    pytest.mark.skipif(bool(missing_api()), reason=missing_api()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
]

SIZES = ((64, 64), (48, 80))  # of pictures
OUTPUT = (60, 100)  # at which results of the second are asked for
OBJECTS = ((0, 0), (0, 1), (5, 3))
TYPES = (torch.float32, torch.bfloat16)
TASKS: dict[str, dict[str, object]] = {
    "instance": {},
    "panoptic": {"TEST__PANOPTIC_ON": True, "TEST__SEMANTIC_ON": True},
    "semantic": {
        "QUERY_SELECTION__ENABLED": False,
        "QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "none",
        "MATCHER__DECOUPLE_STUFF_BOXES": False,
        "LOSS__DECOUPLE_STUFF_BOXES": False,
        "LOSS__CLASSIFICATION": "cross_entropy",
        "TEST__INSTANCE_ON": False,
        "TEST__SEMANTIC_ON": True,
    },
    "detection": {"MASK_ON": False, "QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "none"},
    "bitmask": {
        "QUERY_SELECTION__MASK_ENHANCED_ANCHORS": "bitmask",
        "QUERY_SELECTION__EMPTY_MASKS": "corner",
        "DENOISING__MODE": "boxes",
    },
}
TRAINED = TASKS | {  # all that training is tested with
    "stable matching": {"LOSS__POSITION_SUPERVISED": True, "MATCHER__POSITION_MODULATED": True},
}
# What the host may wait for, by cause and place, and how often. A GPU stands idle while it does, so
# nothing may be added lightly.
COPY = "copy to the host"
# Training: for one copy, when the backward pass is enqueued; that of the matching costs is waited
# for in a thread.
TRAINING = {("event", "engine/train_step.py:read"): 1}
TO_HOST = {
    ("pinned to the host", "losses/assignment.py:__init__"): 1,
    ("pinned to the host", "engine/train_step.py:__init__"): 1,
}
# Inference and post-processing of one image: all that is found, or its number; of panoptic
# segmentation before that how many queries take part, and for nothing else.
POSTPROCESSING = (COPY, "postprocess/results.py:postprocess")
TAKE_PART = ("event", "postprocess/panoptic.py:panoptic_steps")
INFERENCE = {
    "instance": {POSTPROCESSING: 1},
    "panoptic": {TAKE_PART: 1, POSTPROCESSING: 1},
    "semantic": {},
    "detection": {POSTPROCESSING: 1},
    "bitmask": {POSTPROCESSING: 1},
}
# Where run lengths are asked for: whoever looks at objects waits for their copy, and nobody else.
OBJECTS_LATE = ("event", "postprocess/instances.py:_fields")
LATE = {
    "instance": {OBJECTS_LATE: 1},
    "panoptic": {TAKE_PART: 1, POSTPROCESSING: 1, OBJECTS_LATE: 1},
    "detection": {OBJECTS_LATE: 1},
}
# The predictor brings the map of classes to the host as well.
PREDICTOR = INFERENCE | {"semantic": {POSTPROCESSING: 1}}
# Evaluators, for one image, where results are not on the host.
EVALUATION = {
    "instances": {(COPY, "evaluation/coco.py:instances_to_records"): 1},
    "panoptic_seg": {(COPY, "evaluation/panoptic.py:process"): 1},
    "sem_seg": {(COPY, "evaluation/semantic.py:process"): 1},
}
# Launches of training on two images, and of inference of one: the most that were counted, and a few
# percent.
LAUNCHES = {
    "instance": (705, 265),
    "panoptic": (705, 305),
    "semantic": (630, 205),
    "detection": (495, 220),
    "bitmask": (655, 262),
    "stable matching": (815, 265),
}


@contextlib.contextmanager
def entered() -> Iterator[PretendDevice]:
    """The device, with the compiled operator where that is built, else PyTorch's form."""
    compiled = _library.is_loaded()
    with pytest.MonkeyPatch.context() as patch, PretendDevice() as device:
        patch.setattr(_library, "serves", lambda *_: compiled)
        patch.setenv("MASKDINO_OP", "compiled" if compiled else "reference")
        yield device


@pytest.fixture(scope="module", autouse=True)
def _cached() -> None:
    """Constants by shape are computed and kept, whichever test comes first."""
    with entered() as device:
        for task in TASKS:
            _, model = on_device(device, task)
            for number in (1, 2):
                model(drawn_batch(SIZES[-number:], (0,) * number))


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with entered() as device:
        yield device


def on_device(
    device: PretendDevice, task: str, precision: str = "float32", **overrides: object
) -> tuple[CfgNode, MaskDINO]:
    """A narrow model, not training, whose last two classes are stuff."""
    overrides |= TRAINED[task] | {"TEST__PRECISION": precision, "TEST__CUDA_GRAPHS": False}
    cfg = tiny_cfg(**overrides)
    model = MaskDINO(cfg).eval()
    # Some objects, not all: scores like those of a trained model.
    torch.nn.init.normal_(model.heads.class_head.weight, std=0.5)
    torch.nn.init.constant_(model.heads.class_head.bias, -1.0)
    model.is_thing = torch.arange(NUM_CLASSES) < NUM_CLASSES - 2
    return cfg, device.put(model)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)


def train(device: PretendDevice, model: MaskDINO, objects: tuple[int, int]) -> dict[str, float]:
    """Losses of a second step as the log gets them; the device has recorded nothing else."""
    batch = drawn_batch(SIZES, objects)
    model.train()
    model(batch)  # makes what frozen norms keep
    device.clear()
    return LossReader(model(batch), device.put(torch.zeros(()))).read()[0]


def copies(device: PretendDevice, end: str) -> dict[tuple[str, str], int]:
    return {key: number for key, number in device.copies.items() if key[0].endswith(end)}


def infer(device: PretendDevice, model: MaskDINO, least: float = 0.1) -> tuple[dict, dict]:
    """An image and its results, of scores from `least`; the device has recorded nothing else."""
    thresholds = {"score_threshold": least, "panoptic_score_threshold": least}
    thresholds["panoptic_overlap_threshold"] = 0.02
    model.inference = replace(model.inference, **thresholds)
    image = drawn_batch(SIZES[1:], (0,))[0] | {"height": OUTPUT[0], "width": OUTPUT[1]}
    model([image])  # prepares the network
    device.clear()
    (result,) = model([image])
    return image, result


def check_waits(
    device: PretendDevice, allowed: dict[tuple[str, str], int], *, all_of_them: bool
) -> None:
    assert device.waits <= Counter(allowed), (device.waits - Counter(allowed), device.lines)
    if all_of_them:
        assert device.waits == allowed, "fewer than the table says: lower it"


def check_launches(device: PretendDevice, bound: int) -> None:
    """Where the operator is not compiled, its PyTorch form needs more."""
    if _library.has("add_norm_train"):
        assert device.launches.total() <= bound, device.launches.most_common(12)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("objects", OBJECTS, ids=str)
@pytest.mark.parametrize("task", TRAINED)
def test_training(
    device: PretendDevice, task: str, objects: tuple[int, int], dtype: torch.dtype
) -> None:
    _, model = on_device(device, task)
    with autocast(dtype):
        losses = train(device, model, objects)
    assert np.isfinite(list(losses.values())).all()
    check_waits(device, TRAINING, all_of_them=True)
    assert copies(device, "to the host") == TO_HOST
    assert not copies(device, "pageable to the device")
    check_launches(device, LAUNCHES[task][0])


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
@pytest.mark.parametrize("objects", OBJECTS, ids=str)
def test_training_of_two_processes(
    device: PretendDevice, task: str, objects: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced: list[Tensor] = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    _, model = on_device(device, task)
    train(device, model, objects)
    check_waits(device, TRAINING, all_of_them=True)
    assert copies(device, "to the host") == TO_HOST
    assert len(reduced) == 3  # objects of both steps, losses of the second
    assert all(isinstance(x, OnDevice) for x in reduced)


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    """One image, whose label map is all of the first class."""
    Image.fromarray(np.zeros(OUTPUT, np.uint8)).save(tmp_path / "labels.png")
    record = {"file_name": "drawn_0.png", "sem_seg_file_name": str(tmp_path / "labels.png")}
    classes = {label: label for label in range(NUM_CLASSES)}
    DatasetCatalog.register("pretended", lambda: [record])
    MetadataCatalog.get("pretended").set(
        stuff_classes=[f"class {label}" for label in classes],
        thing_dataset_id_to_contiguous_id=classes,
        stuff_dataset_id_to_contiguous_id={},
    )
    yield "pretended"
    DatasetCatalog.remove("pretended")
    MetadataCatalog.remove("pretended")


def evaluate(dataset: str, image: dict, result: dict, key: str) -> None:
    """What an evaluator does with the result of an image."""
    if key == "instances":
        assert len(instances_to_records(result[key], 1)) == len(result[key])
        return
    evaluator = {"panoptic_seg": PanopticEvaluator, "sem_seg": SemanticEvaluator}[key](
        dataset, None
    )
    evaluator.reset()
    evaluator.process([image], [result])


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", TASKS)
def test_inference_and_evaluation(
    device: PretendDevice, dataset: str, task: str, precision: str, found: bool
) -> None:
    _, model = on_device(device, task, precision)
    image, result = infer(device, model, 0.1 if found else 1.1)
    # Where nothing is found, there may be less to wait for.
    check_waits(device, INFERENCE[task], all_of_them=found)
    check_launches(device, LAUNCHES[task][1])
    assert bool(len(result.get("instances", [0] * found))) == found
    assert bool(result.get("panoptic_seg", (None, found))[1]) == found
    for key in result:
        device.clear()
        evaluate(dataset, image | {"image_id": 1}, result, key)
        check_waits(device, EVALUATION[key], all_of_them=found)


@pytest.mark.parametrize(("task", "orders"), [("instance", 1), ("panoptic", 2)])
def test_the_device_has_work_while_the_host_waits(
    device: PretendDevice, task: str, orders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects and queries that take part are put in order before the first wait."""
    _, model = on_device(device, task)
    before: list[Counter[str]] = []
    wait = device.wait
    monkeypatch.setattr(device, "wait", lambda kind: (before.append(+device.launches), wait(kind)))
    infer(device, model)
    before = before[-device.waits.total() :]  # of the second call
    assert before[0]["sort"] == orders
    after = device.launches - before[-1]
    # Masks of objects where some are left out, and ids of segments.
    assert after <= Counter({"index": 1, "index_select": task == "panoptic"})


@pytest.mark.parametrize("task", LATE)
def test_an_evaluator_of_run_lengths_waits_for_nothing_more(
    device: PretendDevice, dataset: str, task: str
) -> None:
    _, model = on_device(device, task)
    model.inference = replace(model.inference, run_lengths=True, semantic_on=False)
    image, result = infer(device, model)
    assert OBJECTS_LATE not in device.waits
    assert len(result["instances"]) > 0
    for key in result:
        evaluate(dataset, image | {"image_id": 1}, result, key)
    check_waits(device, LATE[task], all_of_them=True)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("tasks", [("instance",), ("panoptic",)])
@pytest.mark.parametrize("compact", [True, False])
def test_results_are_those_of_the_cpu(
    device: PretendDevice,
    tasks: tuple[str],
    compact: bool,
    counted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where an image is so large that objects are counted before their masks are made."""
    _, model = on_device(device, "panoptic")
    model.inference = replace(model.inference, score_threshold=0.2, panoptic_score_threshold=0.2)
    image = drawn_batch(SIZES[1:], (0,))[0]
    with torch.no_grad():
        predictions, pixels = model.predict(model.preprocess([image]).tensor)
    if counted:
        monkeypatch.setattr(instances, "UNCOUNTED_PIXELS", 0)
    # A CPU has an operator whose rounding differs.
    monkeypatch.setattr(frame_module, "_in_one_pass", lambda _: False)
    found = []
    for place in (lambda x: x, lambda x: x.numbers):
        frame = Frame((64, 96), SIZES[1], OUTPUT)
        made = postprocess(
            predictions.of_image(0).map(place),
            place(pixels[0]),
            frame,
            model.inference,
            place(model.is_thing),
            tasks=tasks,
            compact=compact,
        )
        found.append(made[tasks[0]])
    if tasks == ("panoptic",):
        (ids, segments), (expected, expected_segments) = found
        assert segments == expected_segments and len(segments) > 0
        assert torch.equal(getattr(ids, "numbers", ids), expected)
        return
    fields, expected = (x.get_fields() for x in found)
    assert fields.keys() == expected.keys() and len(found[0]) == len(found[1]) > 0
    assert fields.pop("pred_rles", None) == expected.pop("pred_rles", None)
    for name in fields:
        some, others = (getattr(x[name], "tensor", x[name]) for x in (fields, expected))
        assert torch.equal(getattr(some, "numbers", some), others), name
    if not compact and not counted:  # what is left out is not held
        masks = fields["pred_masks"].numbers
        assert masks.untyped_storage().nbytes() == masks.numel() * masks.element_size()


@pytest.mark.parametrize("least", [0.1, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_predictor(
    device: PretendDevice, task: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors like these cannot be made in inference mode.
    method = torch.no_grad()(MaskDINOPredictor._predict.__wrapped__)
    monkeypatch.setattr(MaskDINOPredictor, "_predict", method)
    cfg, model = on_device(device, task, "auto")
    predictor = MaskDINOPredictor.from_model(model, cfg, confidence_threshold=least)
    picture = np.zeros((*OUTPUT, 3), np.uint8)
    predictor(picture)
    device.clear()
    predictor(picture)
    check_waits(device, PREDICTOR[task], all_of_them=least < 1)


def test_matching_costs_in_bfloat16(
    device: PretendDevice,
    circle_queries: tuple[Predictions, Tensor, Targets],  # noqa: F811 - the fixture
) -> None:
    """Under CUDA's rules of autocast: points are not rounded, sums over points are float32."""
    predictions, pixels, targets = circle_queries
    points = FixedPoints(6000)
    exact = costs_of(predictions, pixels, targets, points)
    half = predictions.map(lambda x: device.put(x.bfloat16()))
    masks = PackedMasks(device.put(targets.masks.bits), targets.masks.size)
    moved = {name: device.put(getattr(targets, name)) for name in ("labels", "boxes", "is_thing")}
    targets = replace(targets, **moved, has_mask=device.put(targets.has_mask), masks=masks)
    points.points = device.put(points.points)
    with autocast(torch.bfloat16):
        found = costs_of(half, device.put(pixels.bfloat16()), targets, points)
    assert np.abs(found - exact).diagonal().mean() < 0.02
    assert np.abs(found - exact).mean() < 0.02


def test_losses_are_those_of_the_cpu(device: PretendDevice) -> None:
    """The device computes: an error in it would hide those that it is to find."""
    torch.manual_seed(1)
    plain = MaskDINO(tiny_cfg()).train()
    torch.manual_seed(1)
    model = device.put(MaskDINO(tiny_cfg())).train()
    batch = drawn_batch(SIZES, (5, 3))
    torch.manual_seed(2)
    found = {name: loss.numbers.item() for name, loss in model(batch).items()}
    torch.manual_seed(2)
    assert found == pytest.approx({k: v.item() for k, v in plain(batch).items()}, rel=1e-4)
    assert sum(found.values()) > 1


WAITING: list[tuple[str, Callable[[Tensor], object]]] = [
    ("bincount", lambda x: x.long().bincount()),
    ("copy to the device", lambda x: x.new_tensor([1.0, 2.0])),
    ("copy to the device", lambda x: torch.tensor([1.0], device=x.device)),
    ("copy to the device", lambda x: torch.ones(5).to(x.device)),
    ("copy to the device", lambda x: torch.where(x > 0, x, torch.tensor(1.0))),
    ("copy to the device", lambda x: x.__setitem__(x.long(), 1)),  # of the 1
    ("copy to the host", lambda x: x.cpu()),
    ("copy to the host", lambda x: torch.zeros(5).copy_(x, non_blocking=True)),  # not pinned
    ("event", lambda x: _record(x).synchronize()),
    ("index on the host", lambda x: x[torch.tensor([0, 1])]),
    ("index with a mask", lambda x: x[x > 0]),
    ("nonzero", lambda x: (x > 0).nonzero()),
    ("stream", lambda x: torch.cuda.current_stream(x.device).synchronize()),
    ("synchronize", lambda _: torch.cuda.synchronize()),
    ("tolist", lambda x: x.tolist()),
    ("unique", lambda x: x.unique()),
    ("value on the host", lambda x: bool(x.sum() > 0)),
    ("value on the host", lambda x: x.masked_fill(x > 0, x.sum())),
]


def _record(x: Tensor) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    return event


@pytest.mark.parametrize(("kind", "wait"), WAITING)
def test_waits_are_found(
    device: PretendDevice, kind: str, wait: Callable[[Tensor], object]
) -> None:
    x = device.put(torch.rand(5) + 1)
    assert not device.waits
    wait(x)
    assert device.waits == {(kind, "the test"): 1}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.cat([x, torch.zeros(0)]),
        lambda x: x + torch.ones(5),
        lambda x: torch.zeros(5)[x.long()],
        lambda x: x.index_add(0, torch.tensor([0]), x[:1]),
        lambda x: x + torch.ones(5, device="cuda"),  # the current device, which is another
        lambda _: torch.cuda.Event().record(),
    ],
)
def test_mixes_are_found(device: PretendDevice, wrong: Callable[[Tensor], object]) -> None:
    with pytest.raises(DeviceMix):
        wrong(device.put(torch.rand(5)))


def test_what_waits_for_nothing(device: PretendDevice) -> None:
    """Copies that block nothing are told from each other; scalars of the host are arguments."""
    x = device.put(torch.rand(2, 3))
    assert (x.is_cuda, x.device, x.is_pinned()) == (True, CUDA, False)
    torch.zeros(2).to(CUDA, non_blocking=True)
    torch.zeros(2).pin_memory().to(CUDA, non_blocking=True)
    torch.empty(2, 3, pin_memory=True).copy_(x, non_blocking=True)
    host = x.to("cpu", non_blocking=True)
    assert not isinstance(host, OnDevice) and host.is_pinned() and torch.equal(host, x.numbers)
    assert {kind: n for (kind, _), n in device.copies.items()} == {
        "pageable to the device": 1,
        "pinned to the device": 1,
        "pinned to the host": 2,
    }
    device.clear()
    x.t().view(-1, 2)[1:].add_(torch.tensor(1.0)).clamp(min=0)
    assert device.launches == {"add_": 1, "clamp": 1}
    torch.where(x > 0, x, 0).masked_fill(x > 0, 1.0)
    x[x < 0], x[:, :1] = 2, 3
    assert not (device.waits or device.copies)
    assert torch.equal(x.numbers[:, 1:], host[:, 1:] + 1)


def test_autocast_is_that_of_cuda(device: PretendDevice) -> None:
    """On the CPU layer norms stay in bfloat16; on CUDA they are computed in float32."""
    x = device.put(torch.rand(2, 8, dtype=torch.bfloat16))
    with autocast(torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (8,)).dtype is torch.float32
        assert torch.mm(x.float(), x.float().t()).dtype is torch.bfloat16
