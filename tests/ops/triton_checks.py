"""What the Triton form must do, on any device: a GPU, or a CPU with Triton's interpreter.

Every function takes the device last. The interpreter has to be chosen before Triton is imported, so
these run in a process of their own there; see ``test_ms_deform_attn_triton.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskdino.ops.ms_deform_attn import (
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)
from tests.ops.deform_attn_cases import Case, slow_locations, slow_ms_deform_attn

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
TEXTBOOK = "textbook"
Form = str | int | None  # TEXTBOOK, or the size of a reference (None: tokens)


def operators() -> object:
    """The operators, registered by importing their module."""
    from maskdino.ops import ms_deform_attn_triton

    return getattr(torch.ops, ms_deform_attn_triton.NAMESPACE)


def inputs_of(case: Case, dtype: torch.dtype, form: Form) -> list[Tensor]:
    """Random tensor arguments, in their order."""
    if form == TEXTBOOK:
        return [case.value(dtype), case.locations(torch.float32), case.weights(torch.float32)]
    raw = case.offsets_and_logits(dtype, per_token=form is None)
    reference = [] if form is None else [case.reference(form, torch.float32)]
    return [case.value(dtype), raw, *reference]


def call(case: Case, form: Form, tensors: list[Tensor]) -> Tensor:
    """The operator of a form."""
    if form == TEXTBOOK:
        return operators().ms_deform_attn(tensors[0], case.flat_shapes, *tensors[1:])
    reference = None if form is None else tensors[2]
    return operators().ms_deform_attn_fused(
        tensors[0], case.flat_shapes, tensors[1], reference, case.points
    )


def expected_output(case: Case, form: Form, tensors: list[Tensor]) -> Tensor:
    """The loop over single samples."""
    if form == TEXTBOOK:
        return slow_ms_deform_attn(tensors[0], case.shapes, *tensors[1:])
    where = slow_locations(case, tensors[1], None if form is None else tensors[2])
    return slow_ms_deform_attn(tensors[0], case.shapes, *where)


def expected_gradients(
    case: Case, form: Form, tensors: list[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """Those of the PyTorch form in float64."""
    leaves = [t.double().requires_grad_() for t in tensors]
    if form == TEXTBOOK:
        output = ms_deform_attn_reference(leaves[0], case.shapes, *leaves[1:])
    else:
        reference = None if form is None else leaves[2]
        output = ms_deform_attn_fused_reference(
            leaves[0], case.shapes, leaves[1], reference, case.points
        )
    return torch.autograd.grad(output, leaves, grad.double())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with the largest expected number as unit."""
    unit = expected.abs().amax().clamp(min=1.0)
    torch.testing.assert_close(
        actual.cpu().double() / unit, expected.double() / unit, rtol=0, atol=tolerance
    )


def check_form(case: Case, dtype: torch.dtype, form: Form, device: str) -> None:
    """Output against the loop, gradients against those of the PyTorch form."""
    torch.manual_seed(0)
    tensors = inputs_of(case, dtype, form)
    leaves = [t.to(device, copy=True).requires_grad_() for t in tensors]
    output = call(case, form, leaves)
    assert output.dtype == dtype and output.is_contiguous()
    assert_close(output.detach(), expected_output(case, form, tensors), TOLERANCE[dtype])
    grad = torch.randn(output.shape).to(dtype)
    grads = torch.autograd.grad(output, leaves, grad.to(device))
    expected = expected_gradients(case, form, tensors, grad)
    for actual, wanted, tensor in zip(grads, expected, tensors, strict=True):
        assert actual.dtype == tensor.dtype
        assert_close(actual, wanted, TOLERANCE[dtype])


def check_borders(device: str) -> None:
    """Exactly on pixel centers, edges and corners, and just outside on every side."""
    case = Case(shapes=((3, 4),), images=1, heads=1, points=1, queries=1)
    steps = torch.tensor([-1.0, -0.5, -0.125, 0.0, 0.125, 0.5, 0.875, 1.0, 1.125, 1.5, 2.0])
    grid = torch.cartesian_prod(steps, steps)
    tensors = [case.value(torch.float32), grid.view(1, -1, 1, 1, 1, 2), torch.ones(1, 121, 1, 1, 1)]
    output = call(case, TEXTBOOK, [t.to(device) for t in tensors])
    assert_close(output, expected_output(case, TEXTBOOK, tensors), 2e-5)
    outside = (grid <= -0.5).any(dim=1) | (grid >= 1.5).any(dim=1)
    assert outside.any() and not output.cpu()[0, outside].any()


def check_locations_without_meaning(bad: float, dtype: torch.dtype, device: str) -> None:
    """They read zero and have no gradient, nor has anything else because of them."""
    case = Case(shapes=((4, 6), (1, 1)), channels=16, heads=2, images=1)
    tensors = inputs_of(case, dtype, TEXTBOOK)
    tensors[1][:, ::2, :, :, 1, 0] = bad
    tensors[1][:, 1, :, 1] = bad
    leaves = [t.to(device).requires_grad_() for t in tensors]
    output = call(case, TEXTBOOK, leaves)
    assert_close(output.detach(), expected_output(case, TEXTBOOK, tensors), TOLERANCE[dtype])
    output.sum().backward(retain_graph=True)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[1].grad[:, 1, :, 1].any() and leaves[1].grad.any()
    infinite = torch.full_like(output, float("inf"))
    grad = torch.autograd.grad(output, leaves[1], infinite)[0]
    assert not grad[:, 1, :, 1].any() and not grad[:, 1, :, 0].isfinite().all()


def check_any_number_in_fused_forms(bad: float, device: str) -> None:
    """Bad offsets, logits and references: other queries do not suffer, and nothing crashes."""
    case = Case(shapes=((4, 6), (1, 1)), channels=16, heads=2)
    for form, at in ((2, 0), (4, 0), (4, 2 * case.heads * 2 * case.points)):  # the last: a logit
        tensors = inputs_of(case, torch.float32, form)
        good = call(case, form, [t.to(device) for t in tensors]).cpu()
        tensors[1][0, 1, at] = bad
        tensors[2][1, 2] = bad
        leaves = [t.to(device).requires_grad_() for t in tensors]
        output = call(case, form, leaves)
        untouched = torch.ones(case.images, case.queries, dtype=torch.bool)
        untouched[0, 1] = untouched[1, 2] = False
        assert torch.equal(output.detach().cpu()[untouched], good[untouched])
        output.sum().backward()
        raw_gradient = leaves[1].grad.cpu()
        assert raw_gradient[untouched].isfinite().all() and raw_gradient[untouched].any()
        if at == 0:  # a sample without a meaning has no gradient
            assert not raw_gradient[0, 1, at].any() and not raw_gradient[1, 2, :8].any()
            assert leaves[2].grad.isfinite().all() and not leaves[2].grad[1, 2].any()


def check_nan_pixels(device: str) -> None:
    """A pixel that is NaN spoils only the samples that touch it."""
    case = Case(shapes=((3, 4), (2, 1)), channels=8, heads=1, queries=40, points=1, images=1)
    tensors = inputs_of(case, torch.float32, TEXTBOOK)
    tensors[0][:, [0, 6, 11, 12]] = float("nan")
    tensors[1] = 2 * tensors[1] - 0.5
    leaves = [t.to(device).requires_grad_() for t in tensors]
    output = call(case, TEXTBOOK, leaves)
    expected = expected_output(case, TEXTBOOK, tensors)
    assert 0.1 < expected.isnan().float().mean() < 0.9
    assert torch.equal(output.isnan().cpu(), expected.isnan())
    output.sum().backward()
    assert leaves[1].grad.isnan().any() and not leaves[0].grad.isnan().any()


def check_fixed_point_sums(form: Form, dtype: torch.dtype, device: str) -> None:
    """With deterministic algorithms the same numbers come out, and the same bits every time."""
    case = Case(shapes=((4, 6), (2, 2)), channels=16, heads=1, images=1, queries=20)
    torch.manual_seed(0)
    tensors = inputs_of(case, dtype, form)
    grad = 1e3 * torch.randn(1, tensors[1].shape[1], case.heads * case.channels)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            leaves = [t.to(device).requires_grad_() for t in tensors]
            output = call(case, form, leaves)
            results.append(torch.autograd.grad(output, leaves, grad.to(device, dtype)))
    finally:
        torch.use_deterministic_algorithms(False)
    expected = expected_gradients(case, form, tensors, grad.to(dtype))
    for first, second, wanted in zip(*results, expected, strict=True):
        assert torch.equal(first, second)
        assert_close(first, wanted, TOLERANCE[dtype])


def check_empty(name: str, device: str) -> None:
    """Without images, queries, heads or channels: empty outputs, gradients of zeros."""
    case = Case(**{name: 0})
    for form in (TEXTBOOK, 4):
        leaves = [t.to(device).requires_grad_() for t in inputs_of(case, torch.float32, form)]
        output = call(case, form, leaves)
        assert output.shape == (case.images, case.queries, case.heads * case.channels)
        output.sum().backward()
        assert all(t.grad.shape == t.shape and not t.grad.any() for t in leaves)


def check_strides(device: str) -> None:
    """Views give what contiguous tensors do."""
    case = Case(shapes=((3, 4), (1, 2)), channels=8, heads=2, points=2)
    for form in (TEXTBOOK, 4):
        plain = [t.to(device) for t in inputs_of(case, torch.float32, form)]
        views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain]
        assert not any(view.is_contiguous() for view in views)
        results = []
        for tensors in (plain, views):
            leaves = [t.detach().requires_grad_() for t in tensors]
            output = call(case, form, leaves)
            output.backward(torch.ones(1, device=device).expand_as(output))
            results.append((output, *(leaf.grad for leaf in leaves)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def check_registration(form: Form, device: str) -> None:
    """Schemas, shapes without data and gradients are registered as torch wants them."""
    case = Case(shapes=((2, 3), (1, 1)), channels=4, heads=1, points=2, queries=7, images=1)
    leaves = [t.to(device).requires_grad_() for t in inputs_of(case, torch.float32, form)]
    tensors = [t.detach() for t in leaves]
    grad = torch.randn(1, 7, case.channels, device=device)
    shapes = case.flat_shapes
    if form == TEXTBOOK:
        torch.library.opcheck(operators().ms_deform_attn.default, (leaves[0], shapes, *leaves[1:]))
        backward = operators().ms_deform_attn_backward.default
        torch.library.opcheck(backward, (grad, tensors[0], shapes, *tensors[1:]))
        return
    forward = operators().ms_deform_attn_fused.default
    reference = None if form is None else leaves[2]
    torch.library.opcheck(forward, (leaves[0], shapes, leaves[1], reference, case.points))
    reference = None if form is None else tensors[2]
    arguments = (grad, tensors[0], shapes, tensors[1], reference, case.points, form is not None)
    torch.library.opcheck(operators().ms_deform_attn_fused_backward.default, arguments)


def check_whole_graph(device: str) -> None:
    """`torch.compile` takes the operator as one piece, with its gradient."""
    case = Case(shapes=((3, 4), (1, 2)), channels=8, heads=1, points=2, images=1)
    tensors = [t.to(device) for t in inputs_of(case, torch.bfloat16, 4)]

    def plain(value: Tensor, raw: Tensor, reference: Tensor) -> Tensor:
        return 2 * ms_deform_attn_fused(value, case.shapes, raw, reference, case.points, "triton")

    targets: list[object] = []

    def record(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        targets.extend(node.target for node in module.graph.nodes)
        return module

    torch.compile(plain, backend=record, fullgraph=True)(*tensors)
    assert sum("maskdino_triton" in str(target) for target in targets) == 1
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = torch.compile(plain, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(output, 2 * call(case, 4, tensors))
    output.sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)
    doubles = [t.double() for t in tensors]  # there is no kernel for these
    output = torch.compile(plain, backend="eager", fullgraph=True)(*doubles)
    torch.testing.assert_close(output, plain(*doubles))


def check_entry_points(device: str) -> None:
    """Both functions call the operators where they can, and PyTorch where they cannot."""
    case = Case(shapes=((3, 4), (1, 2)), channels=8, heads=1, points=2, images=1)
    for dtype, form in ((torch.float32, TEXTBOOK), (torch.bfloat16, TEXTBOOK), (torch.bfloat16, 4)):
        tensors = [t.to(device) for t in inputs_of(case, dtype, form)]
        if form == TEXTBOOK:
            tensors[2] = tensors[2].to(dtype)  # weights may have any dtype
            output = ms_deform_attn(tensors[0], case.shapes, *tensors[1:], "triton")
            tensors[2] = tensors[2].float()
        else:
            output = ms_deform_attn_fused(
                tensors[0], case.shapes, *tensors[1:], case.points, "triton"
            )
        assert torch.equal(output, call(case, form, tensors))
    doubles = [t.double().to(device) for t in inputs_of(case, torch.float32, TEXTBOOK)]
    output = ms_deform_attn(doubles[0], case.shapes, *doubles[1:], "triton")
    expected = ms_deform_attn_reference(doubles[0], case.shapes, *doubles[1:])
    assert output.dtype == torch.float64 and torch.equal(output, expected)
    many = Case(shapes=((1, 1),) * 17, channels=8, heads=1, points=1, images=1)
    tensors = [t.to(device) for t in inputs_of(many, torch.float32, 2)]
    output = ms_deform_attn_fused(tensors[0], many.shapes, *tensors[1:], 1, "triton")
    expected = ms_deform_attn_fused_reference(tensors[0], many.shapes, *tensors[1:], 1)
    assert torch.equal(output, expected)
