"""Packed masks against boolean tensors; small structures."""

import numpy as np
import pytest
import torch

from maskdino.structures import Matches, Outputs, PackedMasks, Predictions


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (5, 8), (3, 9), (2, 31)])
def test_packing_and_unpacking(size: tuple[int, int]) -> None:
    masks = torch.rand(3, *size) < 0.5
    packed = PackedMasks.from_bool(masks)
    assert packed.size == size and len(packed) == 3
    assert packed.bits.shape == (3, size[0], (size[1] + 7) // 8)
    assert torch.equal(packed.to_bool(), masks)
    assert torch.equal(PackedMasks.from_bool(masks.numpy()).bits, packed.bits)
    assert torch.equal(PackedMasks.from_bool(masks.float() * 255).bits, packed.bits)


def test_bits_are_in_reading_order() -> None:
    mask = torch.zeros(1, 1, 10)
    mask[0, 0, [0, 7, 9]] = 1
    assert PackedMasks.from_bool(mask).bits.tolist() == [[[0b10000001, 0b01000000]]]


@pytest.mark.parametrize("canvas", [(5, 7), (5, 8), (9, 33)])
def test_joined_masks_lie_in_the_corner(canvas: tuple[int, int]) -> None:
    parts = [torch.rand(2, 5, 7) < 0.5, torch.rand(0, 5, 7) < 0.5, torch.rand(3, 4, 1) < 0.5]
    expected = torch.zeros(5, *canvas, dtype=torch.bool)
    expected[:2, :5, :7], expected[2:, :4, :1] = parts[0], parts[2]
    packed = [PackedMasks.from_bool(part) for part in parts]
    joined = PackedMasks.join(packed, canvas, torch.device("cpu"))
    assert joined.size == canvas and torch.equal(joined.to_bool(), expected)
    joined.bits.zero_()
    assert torch.equal(packed[0].to_bool(), parts[0])  # unchanged


def test_masks_are_indexed_like_tensors() -> None:
    masks = torch.rand(4, 3, 10) < 0.5
    packed = PackedMasks.from_bool(masks)
    keep = torch.tensor([True, False, True, False])
    for index in (slice(1, 3), torch.tensor([3, 0]), keep, slice(0, 0)):
        assert torch.equal(packed[index].to_bool(), masks[index])
    assert torch.equal(packed[2].to_bool(), masks[2:3])
    assert torch.equal(packed[-1].to_bool(), masks[-1:])
    with pytest.raises(IndexError):
        packed[4]
    assert "number=4" in repr(packed) and packed.to("cpu").device.type == "cpu"


def test_no_masks() -> None:
    empty = PackedMasks.empty(0, (4, 9))
    assert empty.to_bool().shape == (0, 4, 9)
    assert len(PackedMasks.join([empty], (8, 16), torch.device("cpu"))) == 0
    assert not PackedMasks.empty(2, (4, 9)).to_bool().any()
    assert len(PackedMasks.from_bool(torch.zeros(0, 4, 9))) == 0


def test_wrong_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need bits \(N, 4, 2\) uint8, not \(1, 4, 9\)"):
        PackedMasks(torch.zeros(1, 4, 9, dtype=torch.uint8), (4, 9))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        PackedMasks(torch.zeros(1, 4, 2), (4, 9))


def test_predictions_without_masks() -> None:
    part = Predictions(torch.rand(2, 1, 3, 5), torch.rand(2, 1, 3, 4), None)
    both = Predictions.cat([part, part.map(lambda x: 2 * x)])
    assert both.mask_embeddings is None
    assert torch.equal(both.class_logits[2:], 2 * part.class_logits)
    assert torch.equal(both.boxes[:2], part.boxes)


def test_matches_remember_their_images() -> None:
    pairs = [np.array([[0, 1], [0, 0], [4, 5], [0, 1]]), np.zeros((4, 0), np.int64)]
    matches = Matches.from_numpy(pairs, torch.device("cpu"))
    assert matches.pairs_per_image == (2, 0)
    assert matches.query.tolist() == [4, 5] and matches.output.dtype == torch.int64


@pytest.mark.parametrize("masks", [True, False])
def test_outputs_are_added_and_left_out(masks: bool) -> None:
    def predictions(*lead: int) -> Predictions:
        embeddings = torch.rand(*lead, 5) if masks else None
        return Predictions(torch.rand(*lead, 3), torch.rand(*lead, 4), embeddings)

    decoded, proposals = predictions(2, 1, 6), predictions(1, 6)
    outputs = Outputs(decoded, ("_initial", ""))
    more = outputs.plus(proposals, "_proposal")
    assert more.names == ("_initial", "", "_proposal")
    assert torch.equal(more.predictions.boxes[:2], decoded.boxes)
    assert torch.equal(more.predictions.class_logits[2], proposals.class_logits)
    assert (more.predictions.mask_embeddings is not None) == masks
    fewer = more.without("_initial")
    assert fewer.names == ("", "_proposal")
    assert torch.equal(fewer.predictions.boxes, more.predictions.boxes[1:])
    assert fewer.without("_initial") is fewer
    with pytest.raises(ValueError, match="'_proposal' is not the first"):
        fewer.without("_proposal")
    assert fewer.map(lambda x: x[:, :, 2:]).predictions.boxes.shape == (2, 1, 4, 4)


def test_an_output_is_added_at_the_end_and_left_out_at_the_beginning() -> None:
    first, last = torch.zeros(2, 1, 3, 4), torch.ones(1, 3, 4)
    outputs = Outputs(Predictions(first, first, None), ("_initial", "")).plus(
        Predictions(last, last, None), "_proposal"
    )
    assert outputs.names == ("_initial", "", "_proposal")
    assert outputs.predictions.boxes.mean((1, 2, 3)).tolist() == [0, 0, 1]
    shorter = outputs.without("_initial")
    assert shorter.names == ("", "_proposal")
    assert shorter.predictions.boxes.mean((1, 2, 3)).tolist() == [0, 1]
    assert outputs.without("_layer9") is outputs
    with pytest.raises(ValueError, match="not the first"):
        outputs.without("_proposal")
