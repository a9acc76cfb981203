"""Masks in the frame of the output, in one pass, against two resizes one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskdino.ops import _library

SIZES = (  # map, canvas, image, output
    ((8, 24), (32, 96), (32, 96), (32, 96)),
    ((8, 24), (32, 96), (27, 70), (41, 183)),
    ((16, 8), (64, 32), (20, 30), (9, 13)),
    ((1, 2), (4, 8), (1, 1), (3, 2)),
    ((5, 7), (5, 7), (5, 6), (2, 1)),
    ((50, 68), (200, 272), (200, 267), (120, 160)),
)


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if not _library.has("resized_masks"):
        pytest.skip("the compiled library is not built, or it was built before this operator")


def resized(maps: Tensor, canvas: tuple, image: tuple, output: tuple) -> Tensor:
    maps = F.interpolate(maps[None], canvas, mode="bilinear", align_corners=False)
    maps = maps[..., : image[0], : image[1]]
    return F.interpolate(maps, output, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize(("size", "canvas", "image", "output"), SIZES)
def test_it_is_two_resizes(size: tuple, canvas: tuple, image: tuple, output: tuple) -> None:
    maps = torch.randn(3, *size[::-1]).mT * 5  # not dense
    expected = resized(maps, canvas, image, output)
    logits, nothing = torch.ops.maskdino.resized_masks(maps, canvas, image, output, False, False)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert nothing.numel() == 0
    masks, quality = torch.ops.maskdino.resized_masks(maps, canvas, image, output, True, True)
    assert torch.equal(masks, logits > 0)
    probs = (logits.double().sigmoid() * masks).sum((1, 2))
    torch.testing.assert_close(quality.double(), probs / (masks.sum((1, 2)) + 1e-6))
    masks_alone, nothing = torch.ops.maskdino.resized_masks(
        maps, canvas, image, output, True, False
    )
    assert torch.equal(masks_alone, masks) and nothing.numel() == 0


def test_large_numbers_and_none() -> None:
    maps = torch.full((5, 4, 4), -1.0)
    maps[0, 1, 2], maps[1], maps[2, 0, 0], maps[3, 3, 3] = torch.nan, 1e30, 300.0, -1e30
    sizes = (16, 16), (15, 14), (9, 9)
    masks, quality = torch.ops.maskdino.resized_masks(maps, *sizes, True, True)
    assert quality[0].isnan() and masks[1].all() and quality[1] == 1 and masks[2].any()
    assert 0.99 < quality[2] <= 1 and quality[4] == 0 and not masks[4].any()


def test_no_masks_and_wrong_arguments() -> None:
    sizes = (16, 16), (15, 14), (9, 9)
    masks, quality = torch.ops.maskdino.resized_masks(torch.zeros(0, 4, 4), *sizes, True, True)
    assert masks.shape == (0, 9, 9) and quality.shape == (0,)
    with pytest.raises(TypeError, match="float32"):
        torch.ops.maskdino.resized_masks(torch.zeros(1, 4, 4).double(), *sizes, True, True)
    for wrong in (
        (torch.zeros(4, 4), *sizes),
        (torch.zeros(1, 0, 4), *sizes),
        (torch.zeros(1, 4, 17), *sizes),
        (torch.zeros(1, 4, 4), (16, 16), (17, 14), (9, 9)),
        (torch.zeros(1, 4, 4), (16, 16), (15, 14), (9, 0)),
        (torch.zeros(1, 4, 4), (16, 16, 1), (15, 14), (9, 9)),
    ):
        with pytest.raises(ValueError, match=r"maps must|sizes must"):
            torch.ops.maskdino.resized_masks(*wrong, True, False)
