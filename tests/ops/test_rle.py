"""Every form of a mask is the same mask."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from maskdino.ops import rle

SIZE = (20, 30)


def drawn() -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[3:17, 5:25] = True
    return mask


def run_lengths(mask: np.ndarray) -> list[int]:
    """Counts of pixels, column by column, of background and foreground in turn."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


@pytest.mark.parametrize("form", ["polygons", "counts", "text", "bytes"])
def test_all_forms_decode_to_the_same_mask(form: str) -> None:
    mask = drawn()
    compressed = rle.encode_mask(mask)
    segmentation = {
        "polygons": [[5, 3, 25, 3, 25, 17, 5, 17]],
        "counts": {"size": list(SIZE), "counts": run_lengths(mask)},
        "text": json.loads(json.dumps(rle.to_json(compressed))),
        "bytes": compressed,
    }[form]
    before = str(segmentation)
    assert (rle.decode_segmentation(segmentation, SIZE) == mask).all()
    found = rle.encode_segmentation(segmentation, SIZE)
    assert isinstance(found["counts"], bytes) and list(found["size"]) == list(SIZE)
    assert str(segmentation) == before


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_masks_of_any_type_and_order(dtype: type, order: str) -> None:
    found = rle.encode_mask(np.array(drawn(), dtype, order=order))
    assert (mask_utils.decode(found) == drawn()).all()


def test_text_stands_for_the_run_lengths() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        mask = generator.random((31, 47)) < generator.random()
        text = rle.to_json(rle.encode_mask(mask))["counts"]
        assert rle.counts_of_text(text) == run_lengths(mask)


def blobs(size: tuple[int, int], density: float, number: int) -> np.ndarray:
    """Masks (number, H, W) bool with some noise, the second without foreground, the third full."""
    generator = np.random.default_rng(0)
    masks = generator.random((number, *size)) < density
    masks[:, : size[0] // 2, : size[1] // 3] = True
    masks[1], masks[2] = False, True
    return masks


@pytest.mark.parametrize("density", [0.0, 0.002, 0.5])
@pytest.mark.parametrize("size", [(5, 7), (1, 9), (9, 1), (64, 66), (61, 83), (0, 4), (4, 0)])
def test_masks_of_any_layout_are_what_coco_encodes(size: tuple[int, int], density: float) -> None:
    masks = blobs(size, density, 5)
    masks.flags.writeable = False
    expected = [mask_utils.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
    layouts = (np.asfortranarray, lambda mask: mask[::-1].copy()[::-1], lambda mask: mask)
    for layout in layouts:
        assert [rle.encode_mask(layout(mask)) for mask in masks] == expected


@pytest.mark.parametrize("at_once", [1, 1 << 24])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.5])
@pytest.mark.parametrize("size", [(5, 7), (1, 9), (8, 8), (64, 66), (61, 83), (0, 4)])
def test_packed_masks_are_what_coco_encodes(
    size: tuple[int, int], density: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rle, "BYTES_AT_ONCE", at_once)
    masks = blobs(size, density, 5)
    expected = [mask_utils.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
    bits = [np.packbits(mask.ravel(order="F"), bitorder="little") for mask in masks]
    assert rle.encode_packed(np.stack(bits), size) == expected
    assert rle.encode_packed(np.stack(bits)[:0], size) == []
