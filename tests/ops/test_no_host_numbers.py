"""No tensor of the training step or of inference is made of Python numbers on a device.

`tensor.new_tensor([...])` and `torch.tensor([...], device=...)` copy from pageable memory: the host
waits until the device has done all that was asked before. Multiply by a number, or use `new_full`,
`masked_fill`, `arange`, a cached constant, or a copy that does not block.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import maskdino

PACKAGE = Path(maskdino.__file__).parent
ON_THE_WAY = sorted(
    path
    for folder in ("ops", "losses", "modeling", "postprocess")
    for path in PACKAGE.joinpath(folder).rglob("*.py")
)


def waits(source: str) -> Iterator[str]:
    """Calls that copy numbers to a device and wait, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, on_device = node.func.attr, any(k.arg == "device" for k in node.keywords)
        if name == "new_tensor" or (name in ("tensor", "as_tensor", "asarray") and on_device):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", ON_THE_WAY, ids=lambda path: path.stem)
def test_no_tensor_is_made_of_numbers_on_a_device(path: Path) -> None:
    assert list(waits(path.read_text())) == []


@pytest.mark.parametrize(
    "call", ["x.new_tensor([1, 2])", "torch.tensor([1.0], device=x.device)", "f(a.new_tensor(3))"]
)
def test_waits_are_found(call: str) -> None:
    assert len(list(waits(call))) == 1


def test_copies_that_do_not_wait_are_allowed() -> None:
    assert not list(waits("torch.tensor([1]).to(device, non_blocking=True); x.new_full((2,), 1)"))
