"""Tests of maskdino.engine.train_step."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from maskdino.config import load_config
from maskdino.engine.launch import launch
from maskdino.engine.solver import build_gradient_clipper
from maskdino.engine.train_step import MAX_LEFT_OUT, TrainStep


class Quadratic(nn.Module):
    """Losses that are means over the images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        inputs = torch.stack([image["image"] for image in batch])
        return {
            "loss_square": (inputs @ self.weight).square().mean(),
            "loss_linear": (inputs @ self.weight).mean() * 0.1,
        }


IMAGES = [
    {"image": torch.tensor(values), "file_name": f"{index}.png"}
    for index, values in enumerate([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [1.0, 1.0]])
]
NAN_IMAGE = {"image": torch.tensor([float("nan"), 0.0]), "file_name": "broken.png"}


def step(accumulation_steps: int = 1, model: nn.Module | None = None) -> TrainStep:
    model = model or Quadratic()
    clip = ["CLIP_TYPE", "full_model", "CLIP_VALUE", "0.7", "ENABLED", "True"]
    names = [f"SOLVER.CLIP_GRADIENTS.{w}" if i % 2 == 0 else w for i, w in enumerate(clip)]
    return TrainStep(
        model,
        SGD(model.parameters(), lr=0.1),
        build_gradient_clipper(load_config(None, names)),
        accumulation_steps=accumulation_steps,
        mixed_precision=True,
    )


def test_step_is_a_clipped_gradient_step() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    inputs = torch.stack([image["image"] for image in IMAGES])
    loss = (inputs @ weight).square().mean() + (inputs @ weight).mean() * 0.1
    loss.backward()
    expected = weight - 0.1 * weight.grad * 0.7 / weight.grad.norm()
    trained = step()
    scalars = trained.run(iter([IMAGES]))
    torch.testing.assert_close(trained.model.weight, expected)
    assert scalars["total_loss"] == pytest.approx(loss.item())
    assert scalars["total_loss"] == pytest.approx(scalars["loss_square"] + scalars["loss_linear"])
    assert scalars["data_time"] >= 0


def test_what_no_loss_reaches_in_a_step_stays_as_it_is() -> None:
    class Branches(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.tensor(5.0))

        def forward(self, batch: list[dict]) -> dict[str, Tensor]:
            losses = super().forward(batch)
            return losses | ({"loss_other": self.other.square()} if len(batch) > 1 else {})

    model = Branches()
    trained = step(model=model)
    trained.optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    trained.run(iter([IMAGES]))
    assert model.other != 5
    before = model.other.item()
    trained.run(iter([IMAGES[:1]]))  # not even by the decay of weights
    assert model.other.item() == before


def test_accumulation_equals_the_whole_batch() -> None:
    whole, parts = step(), step(accumulation_steps=2)
    for _ in range(3):
        expected = whole.run(iter([IMAGES]))
        found = parts.run(iter([IMAGES[:2], IMAGES[2:]]))
        assert found["total_loss"] == pytest.approx(expected["total_loss"])
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"])
    assert found["gradient_norm"] > 0.7  # before clipping, which would hide another factor
    torch.testing.assert_close(parts.model.weight, whole.model.weight)


def test_scaled_losses_are_clipped_after_unscaling() -> None:
    plain, scaled = step(), step()
    scaled.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        plain.run(iter([IMAGES]))
        scaled.run(iter([IMAGES]))
    torch.testing.assert_close(scaled.model.weight, plain.model.weight)


def test_scaler_leaves_overflow_out() -> None:
    model = Quadratic()
    trained = step(model=model)
    trained.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = model.weight.detach().clone()
    handle = model.weight.register_hook(lambda gradient: gradient * float("inf"))
    trained.run(iter([IMAGES]))
    trained.check_gradient()
    assert torch.equal(model.weight, before)
    handle.remove()
    trained.run(iter([IMAGES]))
    assert not torch.equal(model.weight, before)


class Overflowing(Quadratic):
    """A model whose loss is infinite on the image of overflow.png, but its gradient is not."""

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        losses = super().forward(batch)
        if any(image["file_name"] == "overflow.png" for image in batch):
            losses["loss_square"] = losses["loss_square"] + float("inf")
        return losses


OVERFLOW_IMAGE = {"image": torch.tensor([1.0, 0.5]), "file_name": "overflow.png"}


def step_in_float16(accumulation_steps: int = 1, model: nn.Module | None = None) -> TrainStep:
    """A step with the scaler that float16 has on a GPU."""
    trained = step(accumulation_steps, model or Overflowing())
    trained.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return trained


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_float16_leaves_out_a_step_with_an_infinite_loss(
    accumulation_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    trained = step_in_float16(accumulation_steps)
    before = trained.model.weight.detach().clone()
    bad = [[OVERFLOW_IMAGE, IMAGES[2]], IMAGES[:2]][:accumulation_steps]
    with caplog.at_level(logging.WARNING, "maskdino"):
        scalars = trained.run(iter(bad))
    assert torch.equal(trained.model.weight, before)
    assert trained.grad_scaler.get_scale() == 2.0**9
    assert "loss_square': inf" in caplog.text and "overflow.png" in caplog.text
    assert set(scalars) == {"data_time", "gradient_norm"}  # the log has no infinite losses
    trained.check_gradient()  # a checkpoint may be written: the weights are sound
    good = [IMAGES[:2], IMAGES[2:]][:accumulation_steps]
    expected = step(accumulation_steps)
    expected.run(iter(good))
    assert "total_loss" in trained.run(iter(good))
    torch.testing.assert_close(trained.model.weight, expected.model.weight)


def test_float16_gives_up_after_many_overflows_in_a_row() -> None:
    trained = step_in_float16()
    trained.run(iter([[OVERFLOW_IMAGE]]))
    trained.run(iter([IMAGES]))  # in between: the count begins anew
    for _ in range(MAX_LEFT_OUT):
        trained.run(iter([[OVERFLOW_IMAGE]]))
    message = rf"overflowed in {MAX_LEFT_OUT} steps in a row.*loss_square.*inf.*overflow\.png"
    with pytest.raises(FloatingPointError, match=message):
        trained.run(iter([IMAGES]))


def test_float16_gives_up_on_gradients_that_always_overflow() -> None:
    model = Quadratic()
    trained = step_in_float16(model=model)
    model.weight.register_hook(lambda gradient: gradient * float("inf"))
    for _ in range(MAX_LEFT_OUT):
        trained.run(iter([IMAGES[:1]]))
    with pytest.raises(FloatingPointError, match=r"finite losses, but not gradients, .*0\.png"):
        trained.run(iter([IMAGES[:1]]))


def overflow_on_the_second(folder: Path) -> None:
    """Three steps of two processes; the second one's loss is infinite in the second step."""
    rank = comm.get_rank()
    trained = step_in_float16(model=DistributedDataParallel(Overflowing()))
    weights = []
    for number in range(3):
        bad = rank == 1 and number == 1
        trained.run(iter([[OVERFLOW_IMAGE] if bad else IMAGES[rank::2]]))
        weights.append(trained.model.module.weight.tolist())
    result = {"weights": weights, "scale": trained.grad_scaler.get_scale()}
    (folder / f"{rank}.json").write_text(json.dumps(result))


@pytest.mark.usefixtures("forked")
def test_all_processes_leave_the_step_out(tmp_path: Path) -> None:
    launch(overflow_on_the_second, tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    weights = first["weights"]
    assert weights[0] == weights[1] != weights[2]
    assert first["scale"] == 2.0**9


def accumulate(folder: Path) -> None:
    """Two steps of two processes, each of two micro-batches of one image."""
    rank = comm.get_rank()
    trained = step(2, DistributedDataParallel(Quadratic()))
    for _ in range(2):
        trained.run(iter([[IMAGES[rank]], [IMAGES[2 + rank]]]))
    (folder / f"{rank}.json").write_text(json.dumps(trained.model.module.weight.tolist()))


@pytest.mark.usefixtures("forked")
def test_processes_and_micro_batches_are_averaged_together(tmp_path: Path) -> None:
    launch(accumulate, tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    whole = step()
    for _ in range(2):
        whole.run(iter([IMAGES]))
    assert first == second == pytest.approx(whole.model.weight.tolist(), rel=1e-5)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_bad_loss_names_itself_and_the_images(accumulation_steps: int) -> None:
    trained = step(accumulation_steps)
    before = trained.model.weight.detach().clone()
    batches = [IMAGES[:2], [IMAGES[2], NAN_IMAGE]][-accumulation_steps:]
    with pytest.raises(FloatingPointError, match=r"loss_linear.*nan.*loss_square.*broken\.png"):
        trained.run(iter(batches))
    assert torch.equal(trained.model.weight, before)


def check(trained: TrainStep) -> None:
    trained.check_gradient()


def run_again(trained: TrainStep) -> None:
    trained.run(iter([IMAGES[:1]]))


@pytest.mark.parametrize("notice", [check, run_again])
def test_bad_gradient_of_finite_losses_is_noticed(notice: Callable[[TrainStep], None]) -> None:
    model = Quadratic()
    trained = step(model=model)
    model.weight.register_hook(lambda gradient: gradient * float("nan"))
    trained.run(iter([IMAGES]))
    # Broken weights may break the next losses, too: either message is right then.
    with pytest.raises(FloatingPointError, match="norm of the gradient was nan|not finite"):
        notice(trained)


def test_bad_gradient_names_the_images_of_its_step() -> None:
    model = Quadratic()
    trained = step(model=model)
    handle = model.weight.register_hook(lambda gradient: gradient * float("inf"))
    trained.run(iter([IMAGES[:2]]))
    handle.remove()
    with pytest.raises(FloatingPointError, match=r"was inf on the images \['0\.png', '1\.png'\],"):
        trained.run(iter([IMAGES[2:]]))


def test_accumulation_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="ACCUMULATION_STEPS is 0"):
        step(0)
