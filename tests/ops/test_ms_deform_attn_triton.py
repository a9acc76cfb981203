"""The Triton form against one obvious loop: by Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ops import triton_checks as checks
from tests.ops.deform_attn_cases import Case
from tests.ops.triton_checks import TEXTBOOK, Form

BASE = Case(shapes=((4, 6), (3, 2), (1, 1)), channels=8, heads=2)
# Several tiles of queries; padded points and channels; many points; hardly any channel.
CASES = [
    Case(shapes=((6, 9), (2, 3)), channels=32, heads=1, images=1, queries=19),
    Case(shapes=((4, 5), (1, 3), (3, 1), (1, 1)), points=3, channels=30, heads=2, images=1),
    Case(shapes=((3, 4), (2, 2)), points=8, channels=64, heads=1, images=1),
    Case(shapes=((3, 4), (1, 2)), points=1, channels=71, heads=1, images=1),
    Case(shapes=((2, 3),), points=5, channels=1, heads=3, queries=3),
]
MOST_LEVELS = Case(
    shapes=tuple((1 + i % 3, 1 + i // 5) for i in range(16)), points=1, heads=1, images=1
)
FORMS = [TEXTBOOK, None, 2, 4]
DTYPES = list(checks.TOLERANCE)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton's kernels are interpreted, one operation of NumPy after another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            pool.submit(int).result()  # starts the process, which keeps the environment
        yield pool


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a check: in the interpreter's process, or here on a GPU."""
    if request.param == "cuda":
        return lambda check, *arguments: check(*arguments, "cuda")
    pool = request.getfixturevalue("interpreter")
    return lambda check, *arguments: pool.submit(check, *arguments, "cpu").result()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, form: Form, run: Callable[..., Any]) -> None:
    run(checks.check_form, BASE, dtype, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_size(case: Case, form: Form, run: Callable[..., Any]) -> None:
    run(checks.check_form, case, torch.float32, form)


@pytest.mark.parametrize("form", [TEXTBOOK, 2])
def test_sixteen_levels(form: Form, run: Callable[..., Any]) -> None:
    run(checks.check_form, MOST_LEVELS, torch.float32, form)


def test_borders(run: Callable[..., Any]) -> None:
    run(checks.check_borders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -3e9])
def test_locations_without_meaning(bad: float, dtype: torch.dtype, run: Callable[..., Any]) -> None:
    run(checks.check_locations_without_meaning, bad, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_any_number_in_fused_forms(bad: float, run: Callable[..., Any]) -> None:
    run(checks.check_any_number_in_fused_forms, bad)


def test_nan_pixels(run: Callable[..., Any]) -> None:
    run(checks.check_nan_pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [TEXTBOOK, None])
def test_fixed_point_sums(form: Form, dtype: torch.dtype, run: Callable[..., Any]) -> None:
    run(checks.check_fixed_point_sums, form, dtype)


@pytest.mark.parametrize("name", ["images", "queries", "heads", "channels"])
def test_empty(name: str, run: Callable[..., Any]) -> None:
    run(checks.check_empty, name)


def test_strides(run: Callable[..., Any]) -> None:
    run(checks.check_strides)


@pytest.mark.parametrize("form", FORMS)
def test_registration(form: Form, run: Callable[..., Any]) -> None:
    run(checks.check_registration, form)


def test_whole_graph(run: Callable[..., Any]) -> None:
    run(checks.check_whole_graph)
