"""Sampling at points against loops, and mask logits at points against maps that are kept."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskdino.ops import points as points_module
from maskdino.ops.points import (
    PointSampler,
    mask_logits,
    mask_logits_at_points,
    sample_maps,
    sample_packed_masks,
)
from maskdino.structures import PackedMasks
from tests.memory import NewTensors
from tests.sampling import bilinear


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_mask_logits_are_equation_1() -> None:
    embeddings, pixels = torch.randn(2, 3, 4), torch.randn(2, 4, 5, 6)
    logits = mask_logits(embeddings, pixels)
    assert logits.shape == (2, 3, 5, 6)
    for image, mask, row, column in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        expected = sum(
            embeddings[image, mask, channel] * pixels[image, channel, row, column]
            for channel in range(4)
        )
        torch.testing.assert_close(logits[image, mask, row, column], expected)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def border_points(number: int) -> Tensor:
    """Points in [0, 1], among them the corners and the center."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    return torch.cat([corners, torch.rand(number - 5, 2)])


def test_sample_maps() -> None:
    maps = torch.randn(2, 3, 5, 9, dtype=torch.float64)
    points = torch.stack([border_points(12), border_points(12)])
    found = sample_maps(maps, points.double())
    for b in range(2):
        for c in range(3):
            for p in range(12):
                expected = bilinear(maps[b, c], *points[b, p].tolist()).item()
                assert found[b, c, p].item() == pytest.approx(expected, abs=1e-9)


def test_points_are_not_rounded_to_the_type_of_the_maps() -> None:
    maps, points = torch.randn(2, 3, 40, 70).bfloat16(), torch.rand(2, 50, 2)
    found = sample_maps(maps, points)
    assert found.dtype == torch.float32
    assert torch.equal(found, sample_maps(maps.float(), points))


@pytest.mark.parametrize("form", ["auto", "reference"])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (7, 13), (3, 17)])
def test_packed_masks_are_sampled_as_float_masks(
    size: tuple[int, int], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKDINO_OP", form)
    masks = torch.rand(4, *size) < 0.5
    index = torch.tensor([2, 0, 0, 3, 1])
    points = torch.stack([border_points(20) for _ in index])
    found = sample_packed_masks(PackedMasks.from_bool(masks), index, points)
    assert found.dtype == torch.float32 and found.shape == (5, 20)
    for m, mask in enumerate(masks[index]):
        for p, point in enumerate(points[m].tolist()):
            assert found[m, p].item() == pytest.approx(bilinear(mask, *point).item(), abs=1e-5)
    plain = sample_maps(masks[index].float().unsqueeze(1), points).squeeze(1)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


def test_packed_masks_share_points_or_are_none() -> None:
    masks = torch.rand(3, 6, 10) < 0.5
    packed, points = PackedMasks.from_bool(masks), torch.rand(1, 7, 2)
    index = torch.arange(3)
    shared = sample_packed_masks(packed, index, points)
    torch.testing.assert_close(shared, sample_packed_masks(packed, index, points.expand(3, -1, -1)))
    assert sample_packed_masks(packed, index[:0], points[:0]).shape == (0, 7)
    empty = PackedMasks.empty(0, (6, 10))
    assert sample_packed_masks(empty, index[:0], points[:0]).shape == (0, 7)


@pytest.mark.parametrize("shared", [False, True])
def test_packed_masks_are_sampled_a_few_at_a_time(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKDINO_OP", "reference")
    masks = PackedMasks.from_bool(torch.rand(3, 6, 10) < 0.5)
    index, points = torch.tensor([2, 0, 1, 1, 2]), torch.rand(1 if shared else 5, 7, 2)
    at_once = sample_packed_masks(masks, index, points)
    monkeypatch.setattr(points_module, "LABELS_AT_ONCE", 15)
    assert torch.equal(sample_packed_masks(masks, index, points), at_once)


class CyclingPoints:
    """Hands out given points (M, P, 2), in order, whatever the maps."""

    def __init__(self, points: Tensor) -> None:
        self.points, self.given, self.sizes = points, 0, []

    def __call__(self, maps: Tensor) -> Tensor:
        self.sizes.append(len(maps))
        self.given += len(maps)
        return self.points[self.given - len(maps) : self.given]


def plain_logits(embeddings: Tensor, pixels: Tensor, points: Tensor) -> Tensor:
    """The plain way: whole maps, then samples of each."""
    maps = torch.einsum("mc,chw->mhw", embeddings, pixels)
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, 0]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_mask_logits_at_points(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of the plain way, however many maps exist at a time."""
    monkeypatch.setattr(points_module, "MAP_ELEMENTS_AT_ONCE", at_once * 6 * 7)
    embeddings = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    pixels = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)
    points = torch.rand(5, 11, 2, dtype=torch.float64)
    choose = CyclingPoints(points)
    found, used = mask_logits_at_points(embeddings, pixels, choose)
    assert max(choose.sizes) <= at_once and sum(choose.sizes) == 5
    assert torch.equal(used, points)
    expected = plain_logits(embeddings, pixels, points)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    inputs = (embeddings, pixels)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_mask_logits_at_points_gradcheck() -> None:
    points = torch.rand(3, 5, 2, dtype=torch.float64)
    embeddings = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    pixels = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    function = lambda e, f: mask_logits_at_points(e, f, CyclingPoints(points))[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (embeddings, pixels))


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_gradients_are_the_same(number: int) -> None:
    """Without the kernel that PyTorch forbids then on a GPU."""
    size, points = torch.Size((5, 9)), torch.stack([border_points(30) for _ in range(4)])[:number]
    values = torch.randn(number, 30)
    with Operations() as operations:
        found = points_module._spread(values, points, size)
    assert "index_put" in operations.names
    assert not any("grid_sampler" in name for name in operations.names)
    torch.use_deterministic_algorithms(False)
    with Operations() as operations:
        expected = points_module._spread(values, points, size)
    assert "grid_sampler_2d_backward" in operations.names
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_gradcheck() -> None:
    test_mask_logits_at_points_gradcheck()


def test_mask_logits_of_no_mask_give_zero_gradients() -> None:
    embeddings = torch.randn(0, 4, requires_grad=True)
    pixels = torch.randn(4, 6, 7, requires_grad=True)
    sample = PointSampler(9, 3, 0.5).sample_uncertain
    logits, points = mask_logits_at_points(embeddings, pixels, sample)
    assert logits.shape == (0, 9) and points.shape == (0, 9, 2)
    logits.sum().backward()
    assert torch.equal(pixels.grad, torch.zeros_like(pixels))


def test_mask_logits_under_autocast_keep_the_dtypes_of_gradients() -> None:
    embeddings = torch.randn(3, 8, requires_grad=True)
    pixels = torch.randn(8, 5, 5).bfloat16().requires_grad_()
    points = torch.rand(3, 6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = mask_logits_at_points(embeddings, pixels, CyclingPoints(points))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert embeddings.grad.dtype == torch.float32 and pixels.grad.dtype == torch.bfloat16
    expected = plain_logits(embeddings, pixels.float(), points)
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.05)


def test_uncertain_points_prefer_small_logits() -> None:
    """On a map that is certain on its left half, the chosen points lie on the right half."""
    maps = torch.full((2, 8, 8), 10.0)
    maps[:, :, 4:] = 0.0
    sampler = PointSampler(100, 3.0, 0.75)
    points = sampler.sample_uncertain(maps)
    assert points.shape == (2, 100, 2) and (points >= 0).all() and (points <= 1).all()
    right = (points[..., 0] > 0.5).sum(1)
    assert (right >= 75).all()  # all uncertain ones, and about half of the 25 uniform ones
    assert (right < 100).all()
    certain_first = points[:, :75, 0]
    assert (certain_first > 0.5).all()


def test_sampler_draws_anew_and_refuses_impossible_shares() -> None:
    sampler = PointSampler(10, 3.0, 0.75)
    first, second = (sampler.sample_uniform(1, torch.device("cpu")) for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="5 candidates are fewer than the 10"):
        PointSampler(10, 0.5, 1.0)


def test_uncertain_points_lie_where_logits_change_their_sign() -> None:
    """Logits -10 to 10 from left to right: 30 of 120 candidates are nearest to the middle."""
    ramp = torch.linspace(-10, 10, 64).expand(5, 16, 64)
    points = PointSampler(40, 3.0, 0.75).sample_uncertain(ramp)
    assert points.shape == (5, 40, 2)
    distance = (points[..., 0] - 0.5).abs()
    assert distance[:, :30].max() < 0.25 < distance[:, 30:].max()


def test_points_of_many_masks_are_chosen_with_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is larger than the points themselves, and they are those of one large draw."""
    maps, sampler = torch.randn(1000, 6, 8), PointSampler(200, 3.0, 0.75)
    torch.manual_seed(0)
    with NewTensors() as tensors:
        points = sampler.sample_uncertain(maps)
    assert tensors.largest == points.nbytes == 1000 * 200 * 2 * 4
    monkeypatch.setattr(points_module, "CPU_NUMBERS_AT_ONCE", 1 << 30)
    torch.manual_seed(0)
    with NewTensors() as tensors:
        assert torch.equal(sampler.sample_uncertain(maps), points)
    assert tensors.largest > 2 * points.nbytes


def test_gradients_of_many_masks_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, maps of gradients are made few at a time, as many as fit its cache."""
    embeddings = torch.randn(4000, 4, requires_grad=True)
    pixels, points = torch.randn(4, 32, 32, requires_grad=True), torch.rand(4000, 5, 2)
    found, _ = mask_logits_at_points(embeddings, pixels, CyclingPoints(points))
    whole = 4000 * 32 * 32 * 4
    with NewTensors() as tensors:
        grads = torch.autograd.grad(found.sum(), (embeddings, pixels), retain_graph=True)
    assert tensors.largest < whole / 3
    monkeypatch.setattr(points_module, "CPU_NUMBERS_AT_ONCE", 1 << 30)
    with NewTensors() as tensors:
        expected = torch.autograd.grad(found.sum(), (embeddings, pixels))
    assert tensors.largest >= whole
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
