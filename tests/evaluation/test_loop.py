"""Images are evaluated beside the network on a GPU, in order, in bounded memory, errors at once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from torch import nn

from maskdino.engine.evaluating import evaluate_model
from maskdino.evaluation.build import masks_as_read
from maskdino.evaluation.coco import instances_to_records
from maskdino.evaluation.loop import PENDING, evaluate_images
from maskdino.ops.host import pack_masks
from maskdino.postprocess import frame, instances
from maskdino.postprocess.instances import LateInstances
from tests import pretend_kernels
from tests.helpers import drawn_batch, tiny_cfg, tiny_model
from tests.pretend_device import PretendDevice, missing_api

pytestmark = [
    pytest.mark.skipif(bool(missing_api()), reason=missing_api()),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
]
IMAGES = [[{"file_name": f"{number}.png", "image_id": number}] for number in range(12)]


class Model(nn.Module):
    """Says which images it has seen, and may fail at one of them."""

    def __init__(self, put: Callable = lambda x: x, fails: int = -1, error: type = OSError) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen, self._fails, self._error = [], fails, error
        put(self)

    def forward(self, inputs: list[dict]) -> list[dict]:
        """Gives the ids back."""
        self.seen.append(inputs[0]["image_id"])
        if self.seen[-1] == self._fails:
            raise self._error("no network")
        return [{"id": x["image_id"]} for x in inputs]


class Evaluator(DatasetEvaluator):
    """Takes ids in, as a function of the test says."""

    def __init__(self, take_in: Callable[[int], None] = lambda _: None) -> None:
        self._take_in = take_in

    def reset(self) -> None:
        """Forgets all."""
        self.taken, self.threads, self.grad = [], set(), False

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes an id in."""
        assert inputs[0]["image_id"] == outputs[0]["id"]
        self._take_in(outputs[0]["id"])
        self.taken.append(outputs[0]["id"])
        self.threads.add(threading.current_thread().name)
        self.grad |= torch.is_grad_enabled()

    def evaluate(self) -> dict:
        """Says what was taken in."""
        return {"ids": list(self.taken)}


@pytest.fixture(params=["cpu", "cuda"])
def put(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Puts a model on a device; after the test no thread is left."""
    if request.param == "cpu":
        yield lambda x: x
    else:
        with PretendDevice() as device:
            yield device.put
    assert not [x for x in threading.enumerate() if x.name.startswith("evaluation")]


def test_results_are_taken_in_in_order_beside_the_network_of_a_gpu(
    put: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    model, evaluator = Model(put).train(), Evaluator(lambda _: time.sleep(0.001))
    with caplog.at_level("INFO"):
        assert evaluate_images(model, IMAGES, evaluator) == {"ids": list(range(12))}
    on_gpu = model.weight.is_cuda
    assert {x.startswith("evaluation") for x in evaluator.threads} == {on_gpu}
    assert model.training and not evaluator.grad and torch.is_grad_enabled()
    (times,) = (x for x in caplog.messages if "Milliseconds" in x)
    assert times.startswith("12 batches") and "without the first 5: waiting for images " in times
    for part in (", network ", ", results ", ", run lengths and evaluators "):
        assert part in times
    assert times.endswith("(beside the others).") == on_gpu


def test_what_waits_for_the_evaluator_is_bounded(put: Callable) -> None:
    ahead = []

    def slow(number: int) -> None:
        time.sleep(0.02)
        ahead.append(len(model.seen) - number)

    model = Model(put)
    evaluate_images(model, IMAGES, Evaluator(slow))
    assert max(ahead) == (PENDING + 1 if model.weight.is_cuda else 1)


def test_errors_of_the_evaluator_arrive_at_once(
    put: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(number: int) -> None:
        if number == 3:
            raise ValueError("no such class")

    model = Model(put)
    with pytest.raises(ValueError, match="no such class"):
        evaluate_images(model, IMAGES, Evaluator(failing))
    assert len(model.seen) <= 4 + PENDING
    assert "The evaluation ended at 3.png." in caplog.messages


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_errors_of_the_network_leave_no_thread(
    put: Callable, error: type, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = Evaluator(lambda _: time.sleep(0.02))
    with pytest.raises(error, match="no network"):
        evaluate_images(Model(put, 5, error), IMAGES, evaluator)
    assert evaluator.taken == list(range(len(evaluator.taken))) and len(evaluator.taken) <= 5
    assert ("The evaluation ended at 5.png." in caplog.messages) == (error is OSError)


@pytest.mark.parametrize(("number", "expected"), [(1, {"ids": list(range(12))}), (0, {})])
@pytest.mark.parametrize("empty", [list, type(None)])
def test_builders_of_evaluators_may_give_what_detectron2_takes(
    number: int, expected: dict, empty: type
) -> None:
    cfg = tiny_cfg()
    cfg.DATASETS.TEST = ("drawn",)
    found = evaluate_model(
        cfg,
        Model(),
        build_loader=lambda *_: IMAGES,
        build_evaluator=lambda *_: [Evaluator()] * number or empty(),
    )
    assert found == expected


class Records(Evaluator):
    """Turns objects into records."""

    reads_run_lengths = True

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes an image in."""
        self.taken += instances_to_records(outputs[0]["instances"], inputs[0]["image_id"])


@pytest.mark.parametrize("counted", [True, False])
def test_one_copy_of_each_image_that_the_main_thread_does_not_wait_for(
    counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large images, the host asks before which masks are wanted."""
    if counted:
        monkeypatch.setattr(instances, "UNCOUNTED_PIXELS", 0)
    batches = [drawn_batch([(40, 56)], [0]) for _ in range(3)]
    for number, batch in enumerate(batches):
        batch[0] |= {"image_id": number, "height": 61, "width": 83}
    options = {"TEST__MASK_SCORING": True, "TEST__SCORE_THRESHOLD": 0.004}
    model = tiny_model(**options, TEST__PRECISION="float32", TEST__CUDA_GRAPHS=False).eval()
    with PretendDevice() as device:
        model, expected = device.put(model), list[dict]()
        for number, batch in enumerate(batches):
            expected += instances_to_records(model(batch)[0]["instances"], number)
        device.clear()
        evaluator = Records()
        with masks_as_read(model, evaluator):
            found = evaluate_images(model, batches, evaluator)["ids"]
        place = ("copy to the host", "postprocess/results.py:postprocess")
        assert device.waits == ({place: 3} if counted else {})
        to_host = {key: n for key, n in device.copies.items() if key[0].endswith("to the host")}
        assert sum(to_host.values()) == 3 and {kind for kind, _ in to_host} == {
            "pinned to the host"
        }
    assert len(found) > 10 and found == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_evaluators_may_copy_what_is_on_its_way(copied: Callable) -> None:
    """And gather it from all processes, which are sent pickles."""
    model = tiny_model(TEST__PRECISION="float32", TEST__CUDA_GRAPHS=False).eval()
    with PretendDevice() as device, masks_as_read(device.put(model), Records()):
        found = model(drawn_batch([(40, 56)], [0]))[0]["instances"]
        assert isinstance(found, LateInstances)
        copy_of_it = copied(found)
        assert type(copy_of_it) is Instances and len(copy_of_it) > 10
        assert instances_to_records(copy_of_it, 1) == instances_to_records(found, 1)


def test_what_is_on_its_way_holds_no_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed masks of an image may be 128 MiB."""
    packed: list[weakref.ref] = []

    def pack(masks: torch.Tensor) -> torch.Tensor:
        bits = pack_masks(masks)
        packed.append(weakref.ref(bits))
        return bits

    for module in (frame, pretend_kernels):  # PyTorch's operations, or the compiled library
        monkeypatch.setattr(module, "pack_masks", pack)
    model = tiny_model(TEST__PRECISION="float32", TEST__CUDA_GRAPHS=False).eval()
    with PretendDevice() as device, masks_as_read(device.put(model), Records()):
        found = model(drawn_batch([(40, 56)], [0]))[0]["instances"]
        gc.collect()
        assert packed and not [bits for bits in packed if bits() is not None]
        assert len(instances_to_records(found, 1)) > 10
