"""What travels between host and device: rounds of questions, one copy each, packed masks."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from torch import Tensor

from maskdino.ops import host
from maskdino.ops.host import Steps, pack_masks, run_steps, to_device, to_host, true_first
from maskdino.ops.rle import encode_packed

SIZES = ((1, 1), (8, 8), (1, 9), (9, 1), (13, 21))


def counted(rounds: int, first: int) -> Steps[list[int]]:
    """Asks in some rounds for one more number each time."""
    seen = []
    for number in range(rounds):
        answers = yield [torch.tensor(first + i) for i in range(number + 1)]
        seen.append([int(answer) for answer in answers])
    return seen


def test_what_is_asked_for_in_one_round_is_one_copy() -> None:
    with mock.patch.object(host, "to_host", wraps=to_host) as copy:
        results = run_steps([counted(3, 0), counted(0, 10), counted(2, 20)])
    assert results == [[[0], [0, 1], [0, 1, 2]], [], [[20], [20, 21]]]
    assert [len(call.args[0]) for call in copy.call_args_list[:3]] == [2, 4, 3]
    assert run_steps([]) == []


def test_who_asks_for_nothing_lets_others_begin_and_goes_on_before_anything_is_copied() -> None:
    order: list[object] = []

    def early() -> Steps[int]:
        order.append("early")
        order.append((yield ()))
        (answer,) = yield (torch.tensor(1),)
        return int(answer)

    def late() -> Steps[int]:
        order.append("late")
        (answer,) = yield (torch.tensor(2),)
        return int(answer)

    with mock.patch.object(host, "to_host", wraps=to_host) as copy:
        assert run_steps([early(), late()]) == [1, 2]
    assert order == ["early", "late", []]
    assert [len(call.args[0]) for call in copy.call_args_list if call.args[0]] == [2]


def test_errors_of_a_computation_are_not_swallowed() -> None:
    def failing() -> Steps[None]:
        yield (torch.zeros(1),)
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        run_steps([counted(2, 0), failing()])


def test_tensors_of_any_types_and_shapes_travel_as_one() -> None:
    tensors = [
        torch.rand(3, 5) > 0.5,
        torch.randn(7, 3),
        torch.tensor(-5),
        torch.randint(0, 256, (11,), dtype=torch.uint8),
        torch.randn(4, 6).t(),
        torch.zeros(0, 4),
        torch.randn(3, dtype=torch.bfloat16),
        torch.arange(-3, 3, dtype=torch.int32),
    ]
    for found in (to_host(tensors), host._in_one_copy(tensors)):
        for expected, tensor in zip(tensors, found, strict=True):
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_numbers_to_the_device() -> None:
    found = to_device([3, 0, -1], torch.int32, torch.device("cpu"))
    assert found.dtype == torch.int32 and found.tolist() == [3, 0, -1]


def test_true_first() -> None:
    flags = torch.tensor([False, True, False, True, True])
    assert true_first(flags).tolist() == [1, 3, 4, 0, 2]
    assert true_first(flags[:0]).tolist() == []
    many = torch.rand(1000) > 0.5
    expected = [*many.nonzero()[:, 0].tolist(), *(~many).nonzero()[:, 0].tolist()]
    assert true_first(many).tolist() == expected


@pytest.mark.parametrize("at_once", [1, 1 << 26])
@pytest.mark.parametrize("size", SIZES)
def test_packed_masks_are_what_coco_encodes(
    size: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "PIXELS_AT_ONCE", at_once)
    masks = torch.rand(6, *size) > torch.linspace(0, 1, 6).view(-1, 1, 1)
    before = masks.clone()
    for part in (masks, masks[1:3], masks[:0], masks.transpose(1, 2).contiguous().transpose(1, 2)):
        bits = pack_masks(part)
        assert bits.dtype == torch.uint8 and bits.shape == (len(part), -(-size[0] * size[1] // 8))
        assert encode_packed(bits.numpy(), size) == [encoded(mask) for mask in part]
    assert torch.equal(masks, before)


def encoded(mask: Tensor) -> dict:
    return mask_util.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
