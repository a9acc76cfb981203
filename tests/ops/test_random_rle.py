"""Run lengths, boxes of masks and packed masks of random masks, against loops over pixels."""

from __future__ import annotations

import json

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from maskdino.ops import rle
from maskdino.ops.boxes import iou, masks_to_boxes
from maskdino.structures import PackedMasks
from tests.random_inputs import depths, masks


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of runs of background and foreground in turn, column by column, pixel by pixel."""
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def box_of(mask: np.ndarray) -> list[int]:
    """x, y, width, height around the foreground; zeros without."""
    height, width = mask.shape
    places = [(x, y) for y in range(height) for x in range(width) if mask[y, x]]
    if not places:
        return [0, 0, 0, 0]
    xs, ys = zip(*places, strict=True)
    return [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]


@depths
def test_masks_come_back_from_every_form(depth: settings) -> None:
    @depth
    @given(masks())
    def holds(mask: np.ndarray) -> None:
        size = mask.shape
        compressed = rle.encode_mask(mask)
        text = json.loads(json.dumps(rle.to_json(compressed)))
        counts = {"size": [*size], "counts": runs_of(mask)}
        for form in (compressed, text, counts):
            assert (rle.decode_segmentation(form, size) == mask).all()
            box, area = rle.box_and_area(form, size)
            assert box == box_of(mask) and area == sum(mask.ravel().tolist())
        assert rle.counts_of_text(text["counts"]) == runs_of(mask)

    holds()


@depths
def test_any_run_lengths_are_a_mask(depth: settings) -> None:
    @depth
    @given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
    def holds(runs: list[int], height: int) -> None:
        runs = [*runs, -sum(runs) % height or height]  # whole columns
        size = height, sum(runs) // height
        pixels = [number % 2 for number, run in enumerate(runs) for _ in range(run)]
        mask = np.array(pixels, bool).reshape(size[::-1]).T
        form = {"size": [*size], "counts": runs}
        assert (rle.decode_segmentation(form, size) == mask).all()
        text = mask_utils.frPyObjects(form, *size)["counts"].decode()
        assert rle.counts_of_text(text) == runs

    holds()


@depths
def test_any_text_is_run_lengths_or_refused(depth: settings) -> None:
    characters = st.characters(min_codepoint=40, max_codepoint=115) | st.characters()

    @depth
    @given(st.text(characters, max_size=60))
    def holds(text: str) -> None:
        try:
            counts = rle.counts_of_text(text)
        except ValueError as error:
            assert str(error).startswith("run lengths ") and "\n" not in str(error)
        else:
            assert len(counts) <= len(text) and all(isinstance(x, int) for x in counts)

    holds()


@depths
def test_boxes_and_bits_of_masks(depth: settings) -> None:
    @depth
    @given(masks())
    def holds(mask: np.ndarray) -> None:
        x, y, width, height = box_of(mask)
        tensor = torch.from_numpy(mask)[None]
        assert masks_to_boxes(tensor, False).tolist() == [[x, y, x + width, y + height]]
        last = [1e8, 1e8, 0, 0] if not width else [x, y, x + width - 1, y + height - 1]
        assert masks_to_boxes(tensor, True).tolist() == [last]
        assert (PackedMasks.from_bool(tensor).to_bool() == tensor).all()

    holds()


@depths
def test_overlap_of_boxes_counts_pixels(depth: settings) -> None:
    corners = st.tuples(*[st.integers(0, 9)] * 4)

    @depth
    @given(corners, corners)
    def holds(first: tuple[int, ...], second: tuple[int, ...]) -> None:
        pixels = [
            {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
            for box in (first, second)
        ]
        if any(box[2] < box[0] or box[3] < box[1] for box in (first, second)):
            return
        union = len(pixels[0] | pixels[1])
        expected = len(pixels[0] & pixels[1]) / union if union else 0.0
        tensors = (torch.tensor(box, dtype=torch.float64) for box in (first, second))
        assert abs(float(iou(*tensors)) - expected) < 1e-12

    holds()
