"""Triton kernel of the gradients of multi-scale deformable attention.

Shape key and blocks as in `maskdino.ops.triton_kernels`, whose parts compute locations and
weights anew here. Each corner is read, multiplied with the gradient of the output for the gradients
of its sample, and added to the value's gradient with atomics of four channels (one, before compute
capability 9.0). Gradients of weights wait in registers, in a block (BLOCK_Q, BLOCK_P, BLOCK_L) with
the levels padded to BLOCK_L, until the softmax can take all of a query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskdino.ops.triton_kernels import (
    _BOXES,
    _TEXTBOOK,
    _VARYING,
    _find_inputs,
    _find_queries,
    _largest_logit,
    _locate,
    _place,
    _size_at,
    _weights,
)


@triton.jit
def _corner_gradient(
    rows, targets, inside, covers, grad, share, scale, DETERMINISTIC: tl.constexpr
):  # fmt: skip
    """Products of a corner's channels with `grad`, (BLOCK_Q, BLOCK_P); adds to the value's."""
    mask = inside[:, :, None] & covers
    features = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
    addend = share[:, :, None] * grad
    if DETERMINISTIC:
        fixed = tl.floor(addend.to(tl.float64) * scale + 0.5).to(tl.int64)
        tl.atomic_add(targets, fixed, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(targets, addend, mask=mask, sem="relaxed")
    return tl.sum(features * grad, axis=2)


@triton.jit
def _sample_gradients(
    features, targets, covers, grad, x, y, weight, valid, first_token, height, width, scale,
    STRIDE: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Gradients of weights and pixel coordinates, (BLOCK_Q, BLOCK_P); adds to the value's.

    Returns:
        Which samples touch a pixel; gradients of weight, x, y. The last two are zero elsewhere.
    """
    touches, column, line, right, bottom = _place(x, y, height, width, valid)
    left_in = touches & (column >= 0)
    right_in = touches & (column + 1 < width)
    top_in = line >= 0
    bottom_in = line + 1 < height
    left = 1.0 - right
    top = 1.0 - bottom
    upper = (first_token + line * width + column).to(tl.int64)[:, :, None] * STRIDE
    lower = upper + width.to(tl.int64) * STRIDE
    dot_00 = _corner_gradient(
        features + upper, targets + upper, left_in & top_in, covers, grad,
        weight * top * left, scale, DETERMINISTIC,
    )  # fmt: skip
    dot_01 = _corner_gradient(
        features + upper + STRIDE, targets + upper + STRIDE, right_in & top_in, covers, grad,
        weight * top * right, scale, DETERMINISTIC,
    )  # fmt: skip
    dot_10 = _corner_gradient(
        features + lower, targets + lower, left_in & bottom_in, covers, grad,
        weight * bottom * left, scale, DETERMINISTIC,
    )  # fmt: skip
    dot_11 = _corner_gradient(
        features + lower + STRIDE, targets + lower + STRIDE, right_in & bottom_in, covers, grad,
        weight * bottom * right, scale, DETERMINISTIC,
    )  # fmt: skip
    of_weight = top * (left * dot_00 + right * dot_01)
    of_weight += bottom * (left * dot_10 + right * dot_11)
    of_x = weight * (top * (dot_01 - dot_00) + bottom * (dot_11 - dot_10))
    of_y = weight * (left * (dot_10 - dot_00) + right * (dot_11 - dot_01))
    return touches, of_weight, tl.where(touches, of_x, 0.0), tl.where(touches, of_y, 0.0)


@triton.jit
def _store_points(
    at, valid, touches, of_x, of_y, step_x, step_y, height, width, FORM: tl.constexpr
):  # fmt: skip
    """Stores gradients of locations or offsets; `of_x` and `of_y` are those of pixels."""
    if FORM == _TEXTBOOK:
        of_x = of_x * width.to(tl.float32)
        of_y = of_y * height.to(tl.float32)
    elif FORM == _BOXES:
        of_x = tl.where(touches, of_x * (step_x * width.to(tl.float32))[:, None], 0.0)
        of_y = tl.where(touches, of_y * (step_y * height.to(tl.float32))[:, None], 0.0)
    tl.store(at, of_x.to(at.dtype.element_ty), mask=valid)
    tl.store(at + 1, of_y.to(at.dtype.element_ty), mask=valid)


@triton.jit
def _store_logits(
    scores, grad_scores, scores_at, valid, largest, inverse, of_weights,
    FORM: tl.constexpr, LEVELS: tl.constexpr, NUM_POINTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of logits, from those of all weights of each query."""
    level = tl.arange(0, BLOCK_L)[None, None, :]
    sample = scores_at[:, None, None] + level * NUM_POINTS + tl.arange(0, BLOCK_P)[None, :, None]
    valid = valid[:, :, None] & (level < LEVELS)
    weights = _weights(scores + sample, valid, largest[:, None, None], FORM)
    weights = weights * inverse[:, None, None]
    mean = tl.sum(tl.sum(weights * of_weights, axis=2), axis=1)
    of_logits = weights * (of_weights - mean[:, None, None])
    tl.store(grad_scores + sample, of_logits.to(grad_scores.dtype.element_ty), mask=valid)


@triton.jit
def _store_reference(
    grad_reference, row, active, sum_x, sum_y, sum_w, sum_h, queries,
    FORM: tl.constexpr, HEADS: tl.constexpr, NUM_POINTS: tl.constexpr,
):  # fmt: skip
    """Stores this head's part of the gradient of references, (B, M, Q, 2 or 4)."""
    image = tl.program_id(2).to(tl.int64)
    pair = (image * HEADS + tl.program_id(1)) * queries + (row - image * queries)
    if FORM == _BOXES:
        at = grad_reference + pair * 4
        tl.store(at + 2, tl.sum(sum_w, axis=1) * (0.5 / NUM_POINTS), mask=active)
        tl.store(at + 3, tl.sum(sum_h, axis=1) * (0.5 / NUM_POINTS), mask=active)
    else:
        at = grad_reference + pair * 2
    tl.store(at, tl.sum(sum_x, axis=1), mask=active)
    tl.store(at + 1, tl.sum(sum_y, axis=1), mask=active)


@triton.jit
def _inverse_sum(
    scores, scores_at, active, largest, FORM: tl.constexpr, LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What weights of a softmax are multiplied by so that they sum to one, (BLOCK_Q,)."""
    point = tl.arange(0, BLOCK_P)[None, :]
    valid = active[:, None] & (point < NUM_POINTS)
    at = scores + scores_at[:, None] + point
    total = _weights(at, valid, largest[:, None], FORM)
    for level in tl.static_range(1, LEVELS):
        total += _weights(at + level * NUM_POINTS, valid, largest[:, None], FORM)
    return 1.0 / tl.where(active, tl.sum(total, axis=1), 1.0)


@triton.jit(do_not_specialize=_VARYING)
def backward_kernel(  # noqa: PLR0915 - one loop; its parts are above
    grad_output, value, points, scores, reference, grad_value, grad_points, grad_scores,
    grad_reference, scale, tokens, queries,
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    FORM: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, REFERENCE_GRADIENT: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs of `forward_kernel`, which names them; grid as there.

    `grad_value` is added to: float32, or int64 with DETERMINISTIC, in units of 1 / `scale` (one
    float64 number): integers have one sum in whatever order they arrive. `grad_points` and
    `grad_scores` are laid out as points and scores. `grad_reference` is (B, M, Q, 2 or 4) float32,
    to be summed over heads.
    """
    BLOCK_Q: tl.constexpr = TILE_H * TILE_W
    STRIDE: tl.constexpr = HEADS * CHANNELS
    row, active, center_x, center_y, step_x, step_y = _find_queries(
        reference, queries, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
        FORM, LEVELS, NUM_POINTS, TILE_H, TILE_W,
    )  # fmt: skip
    points_at, scores_at = _find_inputs(row, FORM, HEADS, LEVELS, NUM_POINTS)
    largest = center_x
    inverse = tl.full([BLOCK_Q], 1.0, dtype=tl.float32)
    if FORM != _TEXTBOOK:
        largest = _largest_logit(scores, scores_at, active, LEVELS, NUM_POINTS, BLOCK_P)
        inverse = _inverse_sum(
            scores, scores_at, active, largest, FORM, LEVELS, NUM_POINTS, BLOCK_P
        )
    unit = scale
    if DETERMINISTIC:
        unit = tl.load(scale)
    point = tl.arange(0, BLOCK_P)[None, :]
    valid = active[:, None] & (point < NUM_POINTS)
    # As many channels per thread as one atomic adds, so that all blocks are laid out alike.
    VECTOR: tl.constexpr = 4 if BLOCK_D >= 4 else BLOCK_D
    channel = tl.max_contiguous(tl.arange(0, BLOCK_D), VECTOR)[None, None, :]
    covers = channel < CHANNELS
    head_at = tl.program_id(1) * CHANNELS + channel
    image_at = tl.program_id(2).to(tl.int64) * tokens * STRIDE
    features = value + image_at + head_at
    targets = grad_value + image_at + head_at
    grad_at = grad_output + row[:, None, None] * STRIDE + head_at
    grad = tl.load(grad_at, mask=active[:, None, None] & covers, other=0.0).to(tl.float32)
    sum_x = tl.zeros([BLOCK_Q, BLOCK_P], dtype=tl.float32)
    sum_y = tl.zeros([BLOCK_Q, BLOCK_P], dtype=tl.float32)
    sum_w = tl.zeros([BLOCK_Q, BLOCK_P], dtype=tl.float32)
    sum_h = tl.zeros([BLOCK_Q, BLOCK_P], dtype=tl.float32)
    of_weights = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_L], dtype=tl.float32)
    first_token = 0
    for level in range(LEVELS):
        height, width = _size_at(
            level, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, LEVELS
        )
        sample = level * NUM_POINTS + point
        x, y, offset_x, offset_y = _locate(
            points + points_at[:, None] + 2 * sample, valid,
            center_x, center_y, step_x, step_y, height, width, FORM,
        )  # fmt: skip
        weight = _weights(scores + scores_at[:, None] + sample, valid, largest[:, None], FORM)
        touches, of_weight, of_x, of_y = _sample_gradients(
            features, targets, covers, grad, x, y, weight * inverse[:, None], valid, first_token,
            height, width, unit, STRIDE, DETERMINISTIC,
        )  # fmt: skip
        _store_points(
            grad_points + points_at[:, None] + 2 * sample, valid, touches, of_x, of_y,
            step_x, step_y, height, width, FORM,
        )  # fmt: skip
        if FORM == _TEXTBOOK:
            at = grad_scores + scores_at[:, None] + sample
            tl.store(at, of_weight.to(grad_scores.dtype.element_ty), mask=valid)
        else:
            in_level = tl.arange(0, BLOCK_L)[None, None, :] == level
            of_weights = tl.where(in_level, of_weight[:, :, None], of_weights)
        if REFERENCE_GRADIENT:
            of_x = of_x * width.to(tl.float32)
            of_y = of_y * height.to(tl.float32)
            sum_x += of_x
            sum_y += of_y
            sum_w += tl.where(touches, of_x * offset_x, 0.0)
            sum_h += tl.where(touches, of_y * offset_y, 0.0)
        first_token += height * width
    if FORM != _TEXTBOOK:
        _store_logits(
            scores, grad_scores, scores_at, valid, largest, inverse, of_weights,
            FORM, LEVELS, NUM_POINTS, BLOCK_P, BLOCK_L,
        )  # fmt: skip
    if REFERENCE_GRADIENT:
        _store_reference(
            grad_reference, row, active, sum_x, sum_y, sum_w, sum_h, queries,
            FORM, HEADS, NUM_POINTS,
        )  # fmt: skip
