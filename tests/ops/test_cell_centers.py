"""Centers of the cells of feature maps."""

from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode

from maskdino.ops.ms_deform_attn import cell_centers

CPU = torch.device("cpu")


def test_cell_centers() -> None:
    expected = [((j + 0.5) / 3, (i + 0.5) / 2) for i in range(2) for j in range(3)]
    expected += [(0.25, 0.5), (0.75, 0.5)]
    torch.testing.assert_close(cell_centers([(2, 3), (1, 2)], CPU), torch.tensor(expected))


class DividingAsCUDA(TorchFunctionMode):
    """Numbers are divided by through their reciprocals, as PyTorch does on a GPU."""

    def __torch_function__(
        self, function: Callable, _types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function in (torch.Tensor.div, torch.div) and isinstance(args[1], int | float):
            return args[0] * torch.tensor(args[1], dtype=args[0].dtype).reciprocal()
        return function(*args, **(kwargs or {}))


def test_cells_at_the_border_are_the_same_on_a_gpu() -> None:
    """Row 49 of 50 lies at 0.99, the bound of valid proposals: an image of 800 pixels has it."""
    expected = cell_centers([(50, 68)], CPU)
    with DividingAsCUDA():
        assert torch.tensor(49.5) / 50 < 0.99  # what a GPU would make of it
        found = cell_centers([(50, 68)], CPU)
    assert torch.equal(found, expected)
    assert (found.view(50, 68, 2)[:, 0, 1] < 0.99).sum() == 49


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(50, 68), (68, 50), (250, 333), (100, 136)])
def test_cells_on_a_gpu(size: tuple[int, int]) -> None:
    assert torch.equal(cell_centers([size], torch.device("cuda")).cpu(), cell_centers([size], CPU))
