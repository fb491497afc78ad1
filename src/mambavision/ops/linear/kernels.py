"""The fused linear layer's GPU kernel, in Triton; `triton_op` launches it."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated
from mambavision.ops.linear import reference

PART = tl.constexpr(reference.PART)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # (rows, inner)
    weight,  # (columns, inner), a row of it `weight_row` behind the last
    bias,  # (columns,)
    weight_sum,  # (columns,): sums of the weight's rows, float32
    residual,  # (rows, columns)
    moments,  # (rows, 2, parts of inner): of x, float32
    out,  # (rows, columns)
    out_moments,  # (rows, 2, parts of columns): of out, each part's mean and squares around it, float32
    rows,
    columns,
    inner,  # this and the row strides in units of UNIT elements, so that the compiler knows what divides them
    weight_row,
    x_row,
    residual_row,
    out_row,
    eps: tl.constexpr,  # not a number at run time, which torch.compile would pass as a float64
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # rows of tiles that are worked on together, for the cache
    EVEN_K: tl.constexpr,  # whether BLOCK_K divides `inner`
    NORM: tl.constexpr,
    PARTS: tl.constexpr,  # of inner, rounded up to a power of 2, where moments are given, else 0
    GIVES_MOMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A tile of act(norm(x) weight^T + bias) + residual. Grid: (tiles,).

    The norm is not applied to x but to the product: with mean m and deviation s of a row, the normalised row times a
    row w of the weight is (x w - m sum(w)) / s. So x goes to the matrix unit as it is. What m and s need of it is read
    from x, or, sixteen times less, from what the kernel that made x has left of each PART columns. No square is of
    numbers that lie far from zero side by side: their sum would lose the digits that the deviation is made of.
    """
    inner = inner * UNIT
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    width = GROUP * tiles_n
    first = tl.program_id(0) // width * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + tl.program_id(0) % width % group
    tile_n = tl.program_id(0) % width // group
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows and columns past the end read what another does and are not stored.
    x_at = x + (row % rows).to(tl.int64)[:, None] * (x_row * UNIT) + k[None, :]
    if NORM and PARTS > 0:
        part, parts = tl.arange(0, PARTS), tl.cdiv(inner, PART)
        at = moments + (row % rows).to(tl.int64)[:, None] * (2 * parts) + part[None, :]
        means = tl.load(at, mask=(part < parts)[None, :], other=0.0)
        within = tl.load(at + parts, mask=(part < parts)[None, :], other=0.0)
        many = tl.maximum(tl.minimum(inner - part * PART, PART), 0).to(tl.float32)[None, :]
        mean = tl.sum(many * means, 1) / inner
        apart = means - mean[:, None]
        variance = tl.sum(within + many * apart * apart, 1) / inner
    elif NORM:
        # In a loop of its own: the product's loop leaves x in shared memory, where threads may not look at it.
        total = tl.zeros([BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        # In wide steps, since nothing hides their latency.
        part = tl.arange(0, 256)
        first_at = x + (row % rows).to(tl.int64) * (x_row * UNIT)
        first = tl.load(first_at).to(tl.float32)
        for start in range(0, inner, 256):
            here = (start + part < inner)[None, :]
            wide = tl.load(first_at[:, None] + (start + part)[None, :], mask=here, other=0.0).to(tl.float32)
            wide = tl.where(here, wide - first[:, None], 0.0)
            total += tl.sum(wide, 1)
            squares += tl.sum(wide * wide, 1)
        mean = total / inner
        variance = squares / inner - mean * mean
        mean += first
    weight_at = weight + (column % columns)[None, :] * (weight_row * UNIT) + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
            b = tl.load(weight_at)
        else:
            a = tl.load(x_at, mask=(start + k < inner)[None, :], other=0.0)
            b = tl.load(weight_at, mask=(start + k < inner)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
        x_at += BLOCK_K
        weight_at += BLOCK_K

    inside = column < columns
    if NORM:
        rate = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
        sums = tl.load(weight_sum + column, mask=inside, other=0.0)
        acc = (acc - mean[:, None] * sums[None, :]) * rate[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION)
    there = (row < rows)[:, None] & inside[None, :]
    wide_row = row.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        before = tl.load(residual + wide_row * (residual_row * UNIT) + column[None, :], mask=there, other=0.0)
        acc += before.to(tl.float32)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + wide_row * (out_row * UNIT) + column[None, :], rounded, mask=there)
    if GIVES_MOMENTS:
        part, parts = tile_n * (BLOCK_N // PART) + tl.arange(0, BLOCK_N // PART), tl.cdiv(columns, PART)
        many = tl.maximum(tl.minimum(columns - part * PART, PART), 1).to(tl.float32)[None, :]
        value = tl.reshape(tl.where(inside[None, :], rounded.to(tl.float32), 0.0), (BLOCK_M, BLOCK_N // PART, PART))
        means = tl.sum(value, 2) / many
        within = (part[:, None] * PART + tl.arange(0, PART)[None, :] < columns)[None, :, :]
        value = tl.where(within, value - means[:, :, None], 0.0)
        at = out_moments + wide_row * (2 * parts) + part[None, :]
        there = (row < rows)[:, None] & (part < parts)[None, :]
        tl.store(at, means, mask=there)
        tl.store(at + parts, tl.sum(value * value, 2), mask=there)
