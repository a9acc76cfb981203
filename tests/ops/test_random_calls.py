"""The operators of csrc/ under random calls: with sanitizers, and beside PyTorch's form.

``pytest -m campaign tests/ops/test_random_calls.py`` builds the sources with a sanitizer and makes
10,000 calls under AddressSanitizer and UndefinedBehaviorSanitizer, 2,000 under ThreadSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from maskdino.ops import ms_deform_attn as module
from maskdino.ops.points import sample_packed_masks
from maskdino.structures import PackedMasks
from tests.ops.random_calls import Draw, make

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
ADDRESS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
SETTINGS = {
    # Of leaks, Python itself has some; tensors of absurd sizes must be refused, not end all.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def build(sources: Path, library: Path, flags: tuple[str, ...], emulated: bool = False) -> None:
    """Compiles csrc/, or the CUDA part of it for the CPU, with a sanitizer."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or compiler is None or not torch.compiled_with_cxx11_abi():
        pytest.skip("needs Linux, g++ with its sanitizers, and a PyTorch with the new C++ ABI")
    here = Path(__file__).parent
    files = [sources / "ms_deform_attn.cpp", *(sources / "cpu").glob("*.cpp")]
    folders = [sources, *map(Path, cpp_extension.include_paths())]
    if emulated:
        files, folders = [here / "emulated_cuda/emulated.cpp"], [here / "emulated_cuda", *folders]
    if flags == THREAD:
        folders.insert(0, here / "threads")
    command = [compiler, "-shared", "-fPIC", "-O1", "-g1", "-std=c++20", "-fno-omit-frame-pointer"]
    command += [*flags, *(["-fopenmp"] if flags == ADDRESS else []), *map(str, files)]
    command += [*(f"-I{folder}" for folder in folders), f"-L{cpp_extension.TORCH_LIB_PATH}"]
    result = run([*command, "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(library)])
    assert result.returncode == 0, result.stderr


def calls(library: Path, flags: tuple[str, ...], *arguments: str, kernels: str = "avx512") -> str:
    """Makes the calls in a process of its own; returns what it said, its findings at the end."""
    names = ("libasan.so" if flags == ADDRESS else "libtsan.so", "libstdc++.so")
    found = [run(["g++", f"-print-file-name={name}"]).stdout.strip() for name in names]
    command = [sys.executable, "-m", "tests.ops.random_calls", str(library), *arguments]
    if flags == THREAD:  # its maps of memory need addresses as they were before they were random
        command = ["setarch", "-R", *command, "--one-thread"]
    settings = {**SETTINGS, "LD_PRELOAD": " ".join(found), "MASKDINO_CPU_CAPABILITY": kernels}
    result = run(command, settings)
    numbers = [line for line in result.stdout.splitlines() if line.startswith("call")]
    said = result.stdout.replace("\n".join(numbers), "")
    return f"{said}\nlast {numbers[-1:]}, status {result.returncode}\n{result.stderr[-6000:]}"


@pytest.fixture(scope="session")
def csrc(repository: Path) -> Path:
    return repository / "csrc"


@pytest.fixture(scope="session")
def with_address(csrc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("address") / "operators.so"
    build(csrc, library, ADDRESS)
    return library


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("kernels", "first", "number"),
    [("avx512", 0, 3500), ("avx2", 3500, 2500), ("plain", 6000, 3000)],
)
def test_no_byte_outside_and_nothing_undefined(
    with_address: Path, kernels: str, first: int, number: int
) -> None:
    arguments = ("--first", str(first), "--calls", str(number))
    said = calls(with_address, ADDRESS, *arguments, kernels=kernels)
    sys.stdout.write(said)  # shown with -rP
    assert "status 0" in said, said


@pytest.mark.campaign
def test_no_byte_outside_in_the_cuda_kernels(csrc: Path, tmp_path: Path) -> None:
    library = tmp_path / "emulated.so"
    build(csrc, library, ADDRESS, emulated=True)
    said = calls(library, ADDRESS, "--emulated", "--first", "9000", "--calls", "1000")
    sys.stdout.write(said)  # shown with -rP
    assert "status 0" in said, said


@pytest.mark.campaign
def test_no_race(csrc: Path, tmp_path: Path) -> None:
    library = tmp_path / "operators.so"
    build(csrc, library, THREAD)
    said = calls(library, THREAD, "--calls", "2000")
    sys.stdout.write(said)  # shown with -rP
    assert "status 0" in said, said


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("flags", "file", "before", "after", "finding"),
    [
        (ADDRESS, "packed_masks.h", "(x >> 3)]", "(x >> 3) + 1]", "heap-buffer-overflow"),
        (ADDRESS, "packed_masks.h", "line < in.height && ", "", "SUMMARY: AddressSanitizer"),
        (
            THREAD,
            "cpu/ms_deform_attn_cpu.cpp",
            "(i * parts + part) * (z.tokens + 1)",
            "(i * parts) * (z.tokens + 1)",
            "data race",
        ),
    ],
)
def test_sanitizers_find_what_is_planted(
    csrc: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    file: str,
    before: str,
    after: str,
    finding: str,
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(csrc, sources)
    text = (sources / file).read_text()
    assert text.count(before) == 1
    (sources / file).write_text(text.replace(before, after))
    build(sources, tmp_path / "planted.so", flags)
    assert finding in calls(tmp_path / "planted.so", flags, "--calls", "300")


def reference(operator: str, arguments: list) -> tuple[Tensor, ...]:
    """What an operator returns, in PyTorch's form; gradients by autograd."""
    if operator == "sample_packed_masks":
        bits, width, index, points = arguments
        masks = PackedMasks(bits, (bits.shape[1], width))
        return (sample_packed_masks(masks, index, points.double()).float(),)
    fused, backward = "_fused" in operator, operator.endswith("_backward")
    grad, arguments = (arguments[0], arguments[1:]) if backward else (None, arguments)
    if fused and backward:
        arguments = arguments[:-1]
    shapes = list(zip(arguments[1][::2], arguments[1][1::2], strict=True))
    function = module.ms_deform_attn_fused_reference if fused else module.ms_deform_attn_reference
    inputs = [argument for argument in arguments if isinstance(argument, Tensor)]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    places = iter(leaves)
    again = [next(places) if isinstance(argument, Tensor) else argument for argument in arguments]
    output = function(again[0], shapes, *again[2:])
    if not backward:
        return (output.detach(),)
    output.backward(grad)
    return tuple(leaf.grad for leaf in leaves)


@pytest.mark.usefixtures("compiled")
def test_random_calls_compute_what_pytorch_does() -> None:
    compared = 0
    for number in range(100):
        draw = Draw(number, wild=False)
        call = draw.call()
        held = sum(x.numel() for x in call.arguments if isinstance(x, Tensor))
        assert held < 500_000, f"call {number}: {held} numbers, and a hundred times as many within"
        found = getattr(torch.ops.maskdino, call.operator)(*call.arguments)
        found = list(found) if isinstance(found, tuple) else [found]
        if draw.dtype != torch.float64:
            del found[1:]  # gradients of places jump where a rounded place lies on a line
        expected = reference(call.operator, call.arguments)
        for ours, theirs in zip(found, expected, strict=False):
            if ours.numel() == 0:  # a gradient that nobody wants
                continue
            unit = theirs.double().abs().amax().clamp(min=1.0)
            torch.testing.assert_close(
                ours.double() / unit,
                theirs.double() / unit,
                rtol=0,
                atol=max(TOLERANCE[draw.dtype], TOLERANCE[ours.dtype]),
                msg=lambda message, at=number: f"call {at}: {message}",
            )
            compared += 1
    assert compared > 100


@pytest.mark.usefixtures("compiled")
def test_random_calls_never_crash() -> None:
    """Calls with odd numbers and strides, and a quarter of them wrong: computed or refused."""
    outcomes = {make(Draw(number).call(), torch.ops.maskdino) for number in range(100)}
    assert outcomes == {"computed", "empty", "refused"}
