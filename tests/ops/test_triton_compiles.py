"""The Triton kernels compile for the GPUs they are meant for; no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from maskdino.ops import triton_kernels as kernels  # noqa: E402
from maskdino.ops.triton_backward import backward_kernel  # noqa: E402

FORMS = {
    "tokens": kernels.TOKENS,
    "points": kernels.POINTS,
    "boxes": kernels.BOXES,
    "textbook": kernels.TEXTBOOK,
}
LEVELS = 4


def sources(form: int, dtype: str, channels: int, fixed: bool) -> list[ASTSource]:
    """Forward and backward kernel as the operators start them, 8 heads, 4 points."""
    block_d = triton.next_power_of_2(channels)
    constants = dict(FORM=form, HEADS=8, CHANNELS=channels, LEVELS=LEVELS, NUM_POINTS=4)
    constants |= dict(TILE_H=1, TILE_W=256 // block_d, BLOCK_P=4, BLOCK_D=block_d)
    wanted = form in (kernels.POINTS, kernels.BOXES)
    more = dict(BLOCK_L=4, REFERENCE_GRADIENT=wanted, DETERMINISTIC=fixed)
    raw = "*fp32" if form == kernels.TEXTBOOK else f"*{dtype}"
    types = {"points": raw, "scores": raw, "grad_points": raw, "grad_scores": raw}
    types |= {name: f"*{dtype}" for name in ("value", "output", "grad_output")}
    types |= {"reference": "*fp32", "grad_reference": "*fp32"}
    types |= {"grad_value": "*i64", "scale": "*fp64"} if fixed else {}
    types |= {"tokens": "i32", "queries": "i32"}
    types |= {f"s{i}": "i64" if i < LEVELS else "i32" for i in range(kernels.MAX_LEVELS)}

    def source(kernel: Any, values: dict[str, int]) -> ASTSource:
        names = kernel.arg_names
        signature = {
            name: "constexpr" if name in values else types.get(name, "*fp32") for name in names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        }
        return ASTSource(kernel, signature=signature, constexprs=values, attrs=aligned)

    return [source(kernels.forward_kernel, constants), source(backward_kernel, constants | more)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dtype", "channels", "capability", "fixed"),
    [
        ("tokens", "bf16", 32, 90, False),
        ("boxes", "fp32", 32, 90, False),
        ("points", "fp16", 30, 80, False),
        ("textbook", "fp16", 71, 75, False),
        ("tokens", "bf16", 16, 90, True),
        ("boxes", "bf16", 32, 100, False),
    ],
)
def test_kernels_compile(
    form: str,
    dtype: str,
    channels: int,
    capability: int,
    fixed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not isinstance(backward_kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip(f"Triton {triton.__version__} describes kernels in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or a compiled one might be found
    target = GPUTarget("cuda", capability, 32)
    forward, backward = (
        triton.compile(source, target=target, options={"num_warps": 4}).asm
        for source in sources(FORMS[form], dtype, channels, fixed)
    )
    assert forward["cubin"] and backward["cubin"]
    atomics = set(re.findall(r"\batom[.\w]*", backward["ptx"]))
    assert len(atomics) == 1
    if fixed:
        assert atomics.pop().endswith(".add.u64")
    elif channels == 32:  # four channels at a time, from what is read in one piece
        assert atomics.pop().endswith(".add.v4.f32")
        assert "ld.global.v4.b32" in forward["ptx"]
