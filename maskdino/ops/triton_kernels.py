"""Triton kernels of multi-scale deformable attention, forward and backward.

Shape key: B images, S tokens of all levels, Q queries, M heads, D channels of a head, L levels,
P points per level and head; a program works on BLOCK_Q queries of one head and image, with P and D
padded to the powers of two BLOCK_P and BLOCK_D.

All points of a level are taken at once: blocks are (BLOCK_Q, BLOCK_P, BLOCK_D), so that many reads
are on their way together, and sums over points are kept apart until all levels are done. The sizes
of a level come as one integer, height * 2^32 + width, a kernel argument of its own: no tensor is
made for them, and no size of an image compiles anything anew.

The forms say where samples lie: TEXTBOOK reads float32 locations and weights; the others read
offsets and logits of one linear layer and start at a token's own cell center (TOKENS), a point
(POINTS) or a box (BOXES). Locations, weights and sums are float32. A sample that touches no pixel,
or is NaN, reads zero and has no gradient; a corner outside the map is not read at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LEVELS = 16
TEXTBOOK, TOKENS, POINTS, BOXES = 0, 1, 2, 3
_TEXTBOOK, _TOKENS = tl.constexpr(TEXTBOOK), tl.constexpr(TOKENS)
_POINTS, _BOXES = tl.constexpr(POINTS), tl.constexpr(BOXES)
# Numbers that differ between images or batches; a kernel must not be compiled for each of them.
_VARYING = ["tokens", "queries", *(f"s{level}" for level in range(MAX_LEVELS))]


@triton.jit
def _size(  # noqa: C901, PLR0912 - kernels of older Tritons know no tuples
    LEVEL: tl.constexpr, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15
):
    """Height and width of a level."""
    if LEVEL == 0:
        size = s0
    elif LEVEL == 1:
        size = s1
    elif LEVEL == 2:
        size = s2
    elif LEVEL == 3:
        size = s3
    elif LEVEL == 4:
        size = s4
    elif LEVEL == 5:
        size = s5
    elif LEVEL == 6:
        size = s6
    elif LEVEL == 7:
        size = s7
    elif LEVEL == 8:
        size = s8
    elif LEVEL == 9:
        size = s9
    elif LEVEL == 10:
        size = s10
    elif LEVEL == 11:
        size = s11
    elif LEVEL == 12:
        size = s12
    elif LEVEL == 13:
        size = s13
    elif LEVEL == 14:
        size = s14
    else:
        size = s15
    return (size >> 32).to(tl.int32), size.to(tl.int32)


@triton.jit
def _size_at(
    level, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Height and width of a level that is known at run time only."""
    height, width = _size(0, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    for other in tl.static_range(1, LEVELS):
        h, w = _size(other, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
        height = tl.where(level == other, h, height)
        width = tl.where(level == other, w, width)
    return height, width


@triton.jit
def _find_tokens(
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    LEVELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """The tokens of this program's tile of TILE_H x TILE_W cells, and their centers in [0, 1].

    Neighbors look at the same pixels, so a tile finds most of them in its cache. Tiles are
    numbered line by line, level after level; those at the right and lower border are cut.
    """
    block = tl.program_id(0)
    height, width = _size(0, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
    next_token = height * width
    next_tile = ((height + TILE_H - 1) // TILE_H) * ((width + TILE_W - 1) // TILE_W)
    first_token = block * 0
    tile = block
    for level in tl.static_range(1, LEVELS):
        h, w = _size(level, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)
        reached = block >= next_tile
        height = tl.where(reached, h, height)
        width = tl.where(reached, w, width)
        first_token = tl.where(reached, next_token, first_token)
        tile = tl.where(reached, block - next_tile, tile)
        next_token += h * w
        next_tile += ((h + TILE_H - 1) // TILE_H) * ((w + TILE_W - 1) // TILE_W)
    tiles_in_line = (width + TILE_W - 1) // TILE_W
    slot = tl.arange(0, TILE_H * TILE_W)
    line = (tile // tiles_in_line) * TILE_H + slot // TILE_W
    column = (tile % tiles_in_line) * TILE_W + slot % TILE_W
    active = (line < height) & (column < width)
    token = tl.where(active, first_token + line * width + column, 0)
    center_x = (column.to(tl.float32) + 0.5) / width.to(tl.float32)
    center_y = (line.to(tl.float32) + 0.5) / height.to(tl.float32)
    return token, active, center_x, center_y


@triton.jit
def _find_queries(
    reference, queries,
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    FORM: tl.constexpr, LEVELS: tl.constexpr, NUM_POINTS: tl.constexpr, TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):  # fmt: skip
    """The program's queries: row in (B * Q), whether it exists, start, normalized step (BOXES)."""
    BLOCK_Q: tl.constexpr = TILE_H * TILE_W
    step_x = tl.full([BLOCK_Q], 1.0, dtype=tl.float32)
    step_y = tl.full([BLOCK_Q], 1.0, dtype=tl.float32)
    if FORM == _TOKENS:
        query, active, center_x, center_y = _find_tokens(
            s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
            LEVELS, TILE_H, TILE_W,
        )  # fmt: skip
    else:
        query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        active = query < queries
        center_x = tl.zeros([BLOCK_Q], dtype=tl.float32)
        center_y = tl.zeros([BLOCK_Q], dtype=tl.float32)
    row = tl.program_id(2).to(tl.int64) * queries + query
    if FORM == _BOXES:
        box = reference + row * 4
        center_x = tl.load(box, mask=active, other=0.0)
        center_y = tl.load(box + 1, mask=active, other=0.0)
        step_x = tl.load(box + 2, mask=active, other=0.0) * (0.5 / NUM_POINTS)
        step_y = tl.load(box + 3, mask=active, other=0.0) * (0.5 / NUM_POINTS)
    elif FORM == _POINTS:
        center_x = tl.load(reference + row * 2, mask=active, other=0.0)
        center_y = tl.load(reference + row * 2 + 1, mask=active, other=0.0)
    return row, active, center_x, center_y, step_x, step_y


@triton.jit
def _find_inputs(
    row, FORM: tl.constexpr, HEADS: tl.constexpr, LEVELS: tl.constexpr, NUM_POINTS: tl.constexpr
):
    """Where the first location or offset, and the first weight or logit, of a query lie: (Q,)."""
    SAMPLES: tl.constexpr = LEVELS * NUM_POINTS
    head = tl.program_id(1)
    if FORM == _TEXTBOOK:
        points_at = (row * HEADS + head) * (2 * SAMPLES)
        scores_at = (row * HEADS + head) * SAMPLES
    else:
        points_at = row * (3 * HEADS * SAMPLES) + head * (2 * SAMPLES)
        scores_at = row * (3 * HEADS * SAMPLES) + (2 * HEADS + head) * SAMPLES
    return points_at, scores_at


@triton.jit
def _largest_logit(
    scores, scores_at, active, LEVELS: tl.constexpr, NUM_POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The largest logit of each query, (BLOCK_Q,)."""
    point = tl.arange(0, BLOCK_P)[None, :]
    valid = active[:, None] & (point < NUM_POINTS)
    at = scores + scores_at[:, None] + point
    largest = tl.load(at, mask=valid, other=float("-inf")).to(tl.float32)
    for level in tl.static_range(1, LEVELS):
        logits = tl.load(at + level * NUM_POINTS, mask=valid, other=float("-inf"))
        largest = tl.maximum(largest, logits.to(tl.float32))
    return tl.max(largest, axis=1)


@triton.jit
def _weights(at, valid, largest, FORM: tl.constexpr):
    """Attention weights of samples; those of a softmax before the division by their sum."""
    scores = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    weights = scores
    if FORM != _TEXTBOOK:
        weights = tl.where(valid, tl.exp(scores - largest), 0.0)
    return weights


@triton.jit
def _locate(at, valid, center_x, center_y, step_x, step_y, height, width, FORM: tl.constexpr):
    """Pixel coordinates, pixel centers at integers, and the numbers they come of."""
    offset_x = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    offset_y = tl.load(at + 1, mask=valid, other=0.0).to(tl.float32)
    width = width.to(tl.float32)
    height = height.to(tl.float32)
    if FORM == _TEXTBOOK:
        x = offset_x * width - 0.5
        y = offset_y * height - 0.5
    elif FORM == _BOXES:
        x = (center_x * width - 0.5)[:, None] + offset_x * (step_x * width)[:, None]
        y = (center_y * height - 0.5)[:, None] + offset_y * (step_y * height)[:, None]
    else:
        x = (center_x * width - 0.5)[:, None] + offset_x
        y = (center_y * height - 0.5)[:, None] + offset_y
    return x, y, offset_x, offset_y


@triton.jit
def _place(x, y, height, width, valid):
    """Splits coordinates into the pixel at the upper left and the distance from it.

    Samples that touch no pixel (NaN among them) are moved to the origin, where everything is
    finite; `touches` says that they must not be used.
    """
    touches = valid & (x > -1.0) & (x < width.to(tl.float32))
    touches = touches & (y > -1.0) & (y < height.to(tl.float32))
    x = tl.where(touches, x, 0.0)
    y = tl.where(touches, y, 0.0)
    left_edge = tl.floor(x)
    top_edge = tl.floor(y)
    return touches, left_edge.to(tl.int32), top_edge.to(tl.int32), x - left_edge, y - top_edge


@triton.jit
def _add_corner(sums, rows, inside, covers, weight):
    """Adds the weighted channels of one corner, (BLOCK_Q, BLOCK_P, BLOCK_D)."""
    features = tl.load(rows, mask=inside[:, :, None] & covers, other=0.0).to(tl.float32)
    return sums + weight[:, :, None] * features


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    value, points, scores, reference, output, tokens, queries,
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
    FORM: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr,
    NUM_POINTS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output (B, Q, M, D) of value (B, S, M, D); grid (blocks of queries, M, B).

    TEXTBOOK: `points` are locations (B, Q, M, L, P, 2) and `scores` weights (B, Q, M, L, P), both
    float32. Else both are the tensor (B, Q, M * L * P * 3) of offsets and logits. `reference` is
    (B, Q, 2 or 4) float32, and is not read in the two other forms.
    """
    STRIDE: tl.constexpr = HEADS * CHANNELS
    row, active, center_x, center_y, step_x, step_y = _find_queries(
        reference, queries, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15,
        FORM, LEVELS, NUM_POINTS, TILE_H, TILE_W,
    )  # fmt: skip
    points_at, scores_at = _find_inputs(row, FORM, HEADS, LEVELS, NUM_POINTS)
    largest = center_x
    if FORM != _TEXTBOOK:
        largest = _largest_logit(scores, scores_at, active, LEVELS, NUM_POINTS, BLOCK_P)
    point = tl.arange(0, BLOCK_P)[None, :]
    valid = active[:, None] & (point < NUM_POINTS)
    channel = tl.arange(0, BLOCK_D)[None, None, :]
    covers = channel < CHANNELS
    image_at = tl.program_id(2).to(tl.int64) * tokens * STRIDE
    features = value + image_at + tl.program_id(1) * CHANNELS + channel
    sums = tl.zeros([TILE_H * TILE_W, BLOCK_P, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([TILE_H * TILE_W, BLOCK_P], dtype=tl.float32)
    first_token = 0
    for level in range(LEVELS):
        height, width = _size_at(
            level, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, LEVELS
        )
        sample = level * NUM_POINTS + point
        x, y, _, _ = _locate(
            points + points_at[:, None] + 2 * sample, valid,
            center_x, center_y, step_x, step_y, height, width, FORM,
        )  # fmt: skip
        weight = _weights(scores + scores_at[:, None] + sample, valid, largest[:, None], FORM)
        total += weight
        touches, column, line, right, bottom = _place(x, y, height, width, valid)
        left_in = touches & (column >= 0)
        right_in = touches & (column + 1 < width)
        top_in = line >= 0
        bottom_in = line + 1 < height
        token = (first_token + line * width + column).to(tl.int64)
        upper = features + token[:, :, None] * STRIDE
        lower = upper + width.to(tl.int64) * STRIDE
        top = weight * (1.0 - bottom)
        bottom = weight * bottom
        sums = _add_corner(sums, upper, left_in & top_in, covers, top * (1.0 - right))
        sums = _add_corner(sums, upper + STRIDE, right_in & top_in, covers, top * right)
        sums = _add_corner(sums, lower, left_in & bottom_in, covers, bottom * (1.0 - right))
        sums = _add_corner(sums, lower + STRIDE, right_in & bottom_in, covers, bottom * right)
        first_token += height * width
    result = tl.sum(sums, axis=1)
    if FORM != _TEXTBOOK:
        # Rows without a query have no weights.
        result = result / tl.where(active, tl.sum(total, axis=1), 1.0)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    at = output + row[:, None] * STRIDE + tl.program_id(1) * CHANNELS + channel
    mask = active[:, None] & (channel < CHANNELS)
    tl.store(at, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def empty_kernel(number):  # noqa: ARG001
    """Does nothing: whether it can be started tells whether Triton works here."""
    tl.debug_barrier()
