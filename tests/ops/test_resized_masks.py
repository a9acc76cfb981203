"""Masks in the frame of the output in one pass, on a CPU and a GPU, against two resizes in turn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops import _library
from maskdino.ops.host import pack_masks

SIZES = (  # map, canvas, image, output
    ((8, 24), (32, 96), (32, 96), (32, 96)),
    ((8, 24), (32, 96), (27, 70), (41, 183)),
    ((16, 8), (64, 32), (20, 30), (9, 13)),
    ((1, 2), (4, 8), (1, 1), (3, 2)),
    ((5, 7), (5, 7), (5, 6), (2, 1)),
    ((50, 68), (200, 272), (200, 267), (120, 160)),
)


@pytest.fixture
def compiled() -> object:
    if not _library.has("resized_masks"):
        pytest.skip("the compiled library is not built, or it was built before this operator")
    return torch.ops.maskdino


def resized(maps: Tensor, canvas: tuple, image: tuple, output: tuple) -> Tensor:
    maps = F.interpolate(maps[None], canvas, mode="bilinear", align_corners=False)
    maps = maps[..., : image[0], : image[1]]
    return F.interpolate(maps, output, mode="bilinear", align_corners=False)[0]


def check_resizes(operators: object, device: str = "cpu") -> None:
    """Logits, masks, and their quality are those of two resizes."""
    for size, *sizes in SIZES:
        maps = torch.randn(3, *size[::-1]).mT * 5  # not dense
        expected, maps = resized(maps, *sizes), maps.to(device)
        logits, nothing = operators.resized_masks(maps, *sizes, False, False)
        torch.testing.assert_close(logits.cpu(), expected, atol=2e-5, rtol=1e-5)
        assert nothing.numel() == 0
        masks, quality = operators.resized_masks(maps, *sizes, True, True)
        assert torch.equal(masks, logits > 0)
        probs = (logits.double().sigmoid() * masks).sum((1, 2))
        torch.testing.assert_close(quality.double(), probs / (masks.sum((1, 2)) + 1e-6))
        masks_alone, nothing = operators.resized_masks(maps, *sizes, True, False)
        assert torch.equal(masks_alone, masks) and nothing.numel() == 0


def check_large_numbers_and_none(operators: object, device: str = "cpu") -> None:
    maps = torch.full((5, 4, 4), -1.0)
    maps[0, 1, 2], maps[1], maps[2, 0, 0], maps[3, 3, 3] = torch.nan, 1e30, 300.0, -1e30
    sizes = (16, 16), (15, 14), (9, 9)
    masks, quality = operators.resized_masks(maps.to(device), *sizes, True, True)
    assert quality[0].isnan() and masks[1].all() and quality[1] == 1 and masks[2].any()
    assert 0.99 < quality[2] <= 1 and quality[4] == 0 and not masks[4].any()


def check_no_masks_and_wrong_arguments(operators: object, device: str = "cpu") -> None:
    sizes = (16, 16), (15, 14), (9, 9)
    none = torch.zeros(0, 4, 4, device=device)
    masks, quality = operators.resized_masks(none, *sizes, True, True)
    assert masks.shape == (0, 9, 9) and quality.shape == (0,)
    with pytest.raises(TypeError, match="float32"):
        operators.resized_masks(none.double(), *sizes, True, True)
    one = torch.zeros(1, 4, 4, device=device)
    for wrong in (
        (one[0], *sizes),
        (one[:, :0], *sizes),
        (one.new_zeros(1, 4, 17), *sizes),
        (one, (16, 16), (17, 14), (9, 9)),
        (one, (16, 16), (15, 14), (9, 0)),
        (one, (16, 16, 1), (15, 14), (9, 9)),
    ):
        with pytest.raises(ValueError, match=r"maps must|sizes must"):
            operators.resized_masks(*wrong, True, False)


def check_packed(operators: object, device: str = "cpu") -> None:
    """Bits of a GPU are those of the masks, whatever the size; so is their quality."""
    sizes = [*SIZES, ((30, 20), (120, 80), (100, 75), (300, 65)), ((2, 2), (8, 8), (8, 8), (7, 33))]
    for number, (size, *frame) in enumerate(sizes):
        maps = torch.randn(2 + number % 2, *size, device=device)
        masks, quality = operators.resized_masks(maps, *frame, True, True)
        bits, packed_quality = operators.resized_packed_masks(maps, *frame, True)
        assert torch.equal(bits.cpu(), pack_masks(masks.cpu()))
        assert torch.equal(packed_quality, quality)
        bits_alone, nothing = operators.resized_packed_masks(maps, *frame, False)
        assert torch.equal(bits_alone, bits) and nothing.numel() == 0
    none, quality = operators.resized_packed_masks(maps[:0], *frame, True)
    assert none.shape == (0, bits.shape[1]) and quality.shape == (0,)
    with pytest.raises(ValueError, match="lines"):
        operators.resized_packed_masks(maps, *frame[:2], (12001, 1), True)


CHECKS = [check_resizes, check_large_numbers_and_none, check_no_masks_and_wrong_arguments]
OF_A_GPU = [*CHECKS, check_packed]


@pytest.mark.parametrize("check", CHECKS)
def test_cpu(compiled: object, check: object) -> None:
    check(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("check", OF_A_GPU)
def test_emulated_kernels(emulated: object, check: object) -> None:
    check(emulated)


@pytest.mark.gpu
@pytest.mark.parametrize("check", OF_A_GPU)
def test_gpu(compiled: object, check: object) -> None:
    if not _library.has("resized_packed_masks"):
        pytest.skip("the compiled library was built before this operator")
    check(compiled, "cuda")
