"""Deformable attention, compiled and in PyTorch, against one obvious loop."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from maskdino.ops import _library
from maskdino.ops import ms_deform_attn as module
from maskdino.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from tests.ops.deform_attn_cases import Case, slow_locations, slow_ms_deform_attn

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
CASES = [
    Case(shapes=((5, 7),), points=1, channels=2),
    Case(shapes=((4, 6), (3, 2), (1, 1)), points=4, channels=32),
    Case(shapes=((4, 5), (1, 3), (3, 1), (1, 1)), points=4, channels=30),
    Case(shapes=((4, 5), (2, 3), (2, 2), (1, 1), (1, 1)), points=8, channels=64, images=1),
    Case(shapes=((6, 3), (2, 2), (1, 1)), points=3, channels=71, images=3),
    Case(shapes=((3, 4), (2, 2), (1, 2), (1, 1)), points=1, channels=4, heads=1),
]


@pytest.fixture(params=["reference", "compiled"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both forms; the compiled one is skipped where it is not built."""
    if request.param == "compiled" and not module.compiled_op_available("cpu"):
        pytest.skip(_library.why_not("cpu"))
    return request.param


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with the largest expected number as unit."""
    assert actual.dtype == dtype
    unit = expected.abs().max().clamp(min=1.0)
    torch.testing.assert_close(
        actual.double() / unit, expected / unit, rtol=0, atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_textbook_form_is_the_loop(case: Case, dtype: torch.dtype, backend: str) -> None:
    location_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    value = case.value(dtype)
    locations, weights = case.locations(location_dtype), case.weights(location_dtype)
    output = ms_deform_attn(value, case.shapes, locations, weights, backend)
    assert output.is_contiguous()
    assert_close(output, slow_ms_deform_attn(value, case.shapes, locations, weights), dtype)


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fused_form_is_the_loop(
    case: Case, dtype: torch.dtype, size: int | None, backend: str
) -> None:
    value = case.value(dtype)
    raw = case.offsets_and_logits(dtype, per_token=size is None)
    reference = None if size is None else case.reference(size, torch.float32)
    output = ms_deform_attn_fused(value, case.shapes, raw, reference, case.points, backend)
    locations, weights = slow_locations(case, raw, reference)
    expected = slow_ms_deform_attn(value, case.shapes, locations, weights)
    # With float32 locations, 1e-5 of a pixel times the difference of two neighbors.
    assert_close(output, expected, dtype)


@pytest.mark.parametrize("case", [Case(channels=3, points=2), Case(channels=17)], ids=str)
def test_gradients_of_textbook_form(case: Case, backend: str) -> None:
    inputs = [t.requires_grad_() for t in (case.value(), case.locations(), case.weights())]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: ms_deform_attn(
            value, case.shapes, locations, weights, backend
        ),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize("case", [Case(channels=3, points=2), Case(channels=17)], ids=str)
def test_gradients_of_fused_form(case: Case, size: int | None, backend: str) -> None:
    inputs = [case.value(), case.offsets_and_logits(per_token=size is None)]
    if size is not None:
        inputs.append(case.reference(size))
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda value, raw, reference=None: ms_deform_attn_fused(
            value, case.shapes, raw, reference, case.points, backend
        ),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("compiled")
def test_gradients_agree_in_lower_precision(dtype: torch.dtype, size: int | None) -> None:
    case = Case(channels=32)
    gradients = []
    inputs = [case.value(dtype), case.offsets_and_logits(dtype, per_token=size is None)]
    reference = None if size is None else case.reference(size, torch.float32)
    grad_output = torch.randn(case.images, inputs[1].shape[1], case.heads * case.channels)
    for backend, of_dtype in (("compiled", dtype), ("reference", torch.float64)):
        leaves = [t.to(of_dtype, copy=True).requires_grad_() for t in inputs]
        if reference is not None:
            leaves.append(reference.clone().requires_grad_())
        output = ms_deform_attn_fused(
            leaves[0], case.shapes, leaves[1], leaves[2] if size else None, case.points, backend
        )
        output.backward(grad_output.to(of_dtype))
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual.to(dtype), expected.double(), dtype)


@pytest.mark.parametrize("name", ["images", "queries", "heads", "channels"])
def test_empty(name: str, backend: str) -> None:
    case = Case(**{name: 0})
    inputs = [t.requires_grad_() for t in (case.value(), case.locations(), case.weights())]
    output = ms_deform_attn(inputs[0], case.shapes, *inputs[1:], backend=backend)
    assert output.shape == (case.images, case.queries, case.heads * case.channels)
    output.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in inputs)
    raw, reference = case.offsets_and_logits().requires_grad_(), case.reference(4).requires_grad_()
    output = ms_deform_attn_fused(case.value(), case.shapes, raw, reference, case.points, backend)
    output.sum().backward()
    assert output.shape == (case.images, case.queries, case.heads * case.channels)
    assert not raw.grad.any() and not reference.grad.any()


def test_strides_do_not_matter(backend: str) -> None:
    case = Case(channels=32)
    plain = [case.value(), case.locations(), case.weights()]
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain]
    wide = [torch.stack((t, t), dim=-1)[..., 0] for t in plain]
    results = []
    for inputs in (plain, views, wide):
        leaves = [t.detach().requires_grad_() for t in inputs]
        output = ms_deform_attn(leaves[0], case.shapes, *leaves[1:], backend=backend)
        output.backward(torch.ones(1, dtype=torch.float64).expand_as(output))
        results.append((output, *(leaf.grad for leaf in leaves)))
    assert not views[0].is_contiguous() and not wide[0].is_contiguous()
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_borders(backend: str) -> None:
    """Exactly on pixel centers, edges and corners, and just outside on every side."""
    case = Case(shapes=((3, 4),), images=1, heads=1, points=1, queries=1)
    steps = [-1.0, -0.5, -0.125, 0.0, 0.125, 0.5, 0.875, 1.0, 1.125, 1.5, 2.0]
    grid = torch.cartesian_prod(torch.tensor(steps), torch.tensor(steps)).double()
    locations = grid.view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1], dtype=torch.float64)
    value = case.value()
    output = ms_deform_attn(value, case.shapes, locations, weights, backend)
    assert_close(output, slow_ms_deform_attn(value, case.shapes, locations, weights), value.dtype)
    outside = (grid <= -0.5).any(dim=1) | (grid >= 1.5).any(dim=1)
    assert outside.any() and not output[0, outside].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -3e9])
def test_locations_without_meaning_read_nothing(
    bad: float, dtype: torch.dtype, backend: str
) -> None:
    case = Case(channels=32)
    location_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    locations, weights = case.locations(location_dtype), case.weights(location_dtype)
    locations[:, ::2, :, :, 1, 0] = bad
    locations[:, 1, :, 1] = bad
    value = case.value(dtype).requires_grad_()
    locations.requires_grad_()
    output = ms_deform_attn(value, case.shapes, locations, weights, backend)
    expected = slow_ms_deform_attn(value.detach(), case.shapes, locations.detach(), weights)
    assert_close(output, expected, dtype)
    output.sum().backward()
    assert value.grad.isfinite().all() and locations.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_fused_form_survives_any_number(bad: float, backend: str) -> None:
    case = Case(channels=32)
    for at in (0, case.heads * len(case.shapes) * case.points * 2):  # an offset, a logit
        value = case.value(torch.float32).requires_grad_()
        raw = case.offsets_and_logits(torch.float32)
        raw[0, 1, at] = bad
        reference = case.reference(4, torch.float32)
        reference[1, 2] = bad
        output = ms_deform_attn_fused(
            value, case.shapes, raw.requires_grad_(), reference, case.points, backend
        )
        assert output.shape == (case.images, case.queries, case.heads * case.channels)
        untouched = output[0, 3:]  # other queries do not suffer
        assert untouched.isfinite().all()
        output.sum().backward()


@pytest.mark.usefixtures("compiled")
def test_half_offsets_keep_float32_references() -> None:
    """A reference that half precision cannot tell from its neighbor reads the right pixel."""
    width = 4096
    value = torch.arange(width, dtype=torch.float32).view(1, width, 1, 1).half() / width
    value = value.expand(1, width, 1, 8)
    column = 4001
    reference = torch.tensor([[[(column + 0.5) / width, 0.5]]])
    raw = torch.zeros(1, 1, 3, dtype=torch.float16)
    for backend in ("compiled", "reference"):
        output = ms_deform_attn_fused(value, [(1, width)], raw, reference, 1, backend)
        assert output.dtype == torch.float16
        assert (output == value[0, column, 0, 0]).all()
    assert abs(reference.half()[0, 0, 0].item() * width - (column + 0.5)) > 0.4


def test_half_precision_locations_are_refused(backend: str) -> None:
    case = Case()
    with pytest.raises(TypeError, match="sampling_locations must be torch.float32.*torch.float16"):
        ms_deform_attn(
            case.value(torch.float16),
            case.shapes,
            case.locations(torch.float16),
            case.weights(torch.float16),
            backend,
        )


def test_wrong_inputs_are_named(backend: str) -> None:
    case = Case()
    value, locations, weights = case.value(), case.locations(), case.weights()
    raw, boxes = case.offsets_and_logits(), case.reference(4)
    shapes, points = case.shapes, case.points

    def fails(error: type[Exception], match: str, *inputs: object, fused: bool = False) -> None:
        with pytest.raises(error, match=match):
            (ms_deform_attn_fused if fused else ms_deform_attn)(*inputs, backend=backend)

    fails(ValueError, "value must be.*31, 24", value.flatten(2), shapes, locations, weights)
    fails(ValueError, "hold 24 tokens.*31", value, shapes[:1], locations, weights)
    fails(ValueError, "positive integers.*0", value, [(0, 5)], locations, weights)
    fails(ValueError, "L=3.*2, 5, 3, 2, 4, 2", value, shapes, locations[:, :, :, :2], weights)
    fails(ValueError, "2, 5, 3, 3, 3", value, shapes, locations, weights[..., :3])
    fails(TypeError, "torch.int64", value, shapes, locations.long(), weights)
    fails(TypeError, "torch.float64.*got torch.float32", value, shapes, locations.float(), weights)
    fails(ValueError, "last size of 108.*107", value, shapes, raw[..., 1:], boxes, 4, fused=True)
    fails(ValueError, "31, got 5", value, shapes, raw, None, points, fused=True)
    fails(ValueError, "2 or 4.*2, 5, 3", value, shapes, raw, boxes[..., :3], points, fused=True)
    fails(ValueError, "at least 1, got 0", value, shapes, raw, boxes, 0, fused=True)
    fails(TypeError, "float16", value, shapes, raw, boxes.half(), points, fused=True)
    fails(ValueError, "cpu.*meta", value, shapes, raw.to("meta"), boxes, points, fused=True)


@pytest.mark.usefixtures("compiled")
def test_library_checks_its_own_inputs() -> None:
    case = Case()
    operator = torch.ops.maskdino.ms_deform_attn
    value, locations, weights = case.value(), case.locations(), case.weights()
    with pytest.raises(ValueError, match="hold 24 tokens, value has 31"):
        operator(value, [4, 6], locations, weights)
    with pytest.raises(ValueError, match="must hold H and W"):
        operator(value, [4], locations, weights)
    with pytest.raises(ValueError, match=r"\[2, 5, 3, 3, 3\]"):
        operator(value, case.flat_shapes, locations, weights[..., :3])
    with pytest.raises(TypeError, match="attention_weights must be Double"):
        operator(value, case.flat_shapes, locations, weights.float())
    with pytest.raises(ValueError, match="below 2.31"):
        operator(value, [1 << 40, 1 << 40], locations, weights)
    with pytest.raises(ValueError, match="grad_output must have shape"):
        torch.ops.maskdino.ms_deform_attn_backward(
            weights, value, case.flat_shapes, locations, weights
        )


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.usefixtures("compiled")
def test_operators_are_registered_properly(size: int | None) -> None:
    case = Case(channels=4, queries=31)
    value, raw = case.value().requires_grad_(), case.offsets_and_logits().requires_grad_()
    reference = None if size is None else case.reference(size).requires_grad_()
    fused = (value, case.flat_shapes, raw, reference, case.points)
    torch.library.opcheck(torch.ops.maskdino.ms_deform_attn_fused.default, fused)
    textbook = (value, case.flat_shapes, case.locations(), case.weights())
    torch.library.opcheck(torch.ops.maskdino.ms_deform_attn.default, textbook)
    grad_output = torch.randn(case.images, case.queries, case.heads * case.channels).double()
    detached = (t.detach() if isinstance(t, Tensor) else t for t in fused)
    torch.library.opcheck(
        torch.ops.maskdino.ms_deform_attn_fused_backward.default,
        (grad_output, *detached, size is not None),
    )
    torch.library.opcheck(
        torch.ops.maskdino.ms_deform_attn_backward.default,
        (grad_output, value.detach(), *textbook[1:]),
    )


@pytest.mark.usefixtures("compiled")
def test_export_and_whole_graphs() -> None:
    case = Case(channels=4)

    class Module(torch.nn.Module):
        def forward(self, value: Tensor, raw: Tensor, reference: Tensor) -> Tensor:
            return 2 * ms_deform_attn_fused(value, case.shapes, raw, reference, case.points)

    inputs = (case.value(), case.offsets_and_logits(), case.reference(4))
    expected = Module()(*inputs)
    program = torch.export.export(Module(), inputs)
    assert any("maskdino" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), expected)
    compiled_module = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in inputs]
    output = compiled_module(*leaves)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.usefixtures("compiled")
def test_same_bits_every_time_and_for_every_number_of_threads() -> None:
    case = Case(shapes=((20, 30), (10, 15)), channels=32, queries=300)
    inputs = (case.value(torch.float32), case.offsets_and_logits(torch.float32))
    reference = case.reference(2, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 7):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in inputs]
            output = ms_deform_attn_fused(
                leaves[0], case.shapes, leaves[1], reference, case.points, "compiled"
            )
            output.square().sum().backward()
            results.append((count, output.detach(), *(leaf.grad for leaf in leaves)))
    finally:
        torch.set_num_threads(threads)
    for _, *tensors in results[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0][1:], strict=True))
    for actual, expected in zip(results[3][1:], results[0][1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_backend_is_chosen_explicitly_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_logged_choices", set())
    monkeypatch.delenv("MASKDINO_OP", raising=False)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        choices = [module.choose_backend("cpu", "reference") for _ in range(3)]
    assert choices == ["reference"] * 3
    assert len(caplog.records) == 1 and "reference" in caplog.text
    monkeypatch.setenv("MASKDINO_OP", "reference")
    assert module.choose_backend("cpu", "auto") == "reference"
    monkeypatch.setenv("MASKDINO_OP", "fast")
    with pytest.raises(ValueError, match="MASKDINO_OP must be one of.*'fast'"):
        module.choose_backend("cpu", "auto")
    with pytest.raises(ValueError, match="backend must be one of.*'fast'"):
        module.choose_backend("cpu", "fast")
    monkeypatch.setattr(_library, "serves", lambda *_: False)
    monkeypatch.setattr(_library, "_load", lambda: "no library here")
    monkeypatch.delenv("MASKDINO_OP")
    assert module.choose_backend("cpu", "auto") == "reference"
    with pytest.raises(RuntimeError, match="backend asks for the compiled.*no library here"):
        module.choose_backend("cpu", "compiled")


def test_autocast_takes_half_inputs_and_float32_references(backend: str) -> None:
    case = Case(channels=32)
    value, raw = case.value(torch.bfloat16), case.offsets_and_logits(torch.bfloat16)
    reference = case.reference(4, torch.float32)
    expected = ms_deform_attn_fused(value, case.shapes, raw, reference, case.points, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ms_deform_attn_fused(value, case.shapes, raw, reference, case.points, backend)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    mixed = ms_deform_attn_fused(value, case.shapes, raw.float(), reference, case.points, backend)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-2)
