"""The fused linear layer's GPU kernel, in Triton; `triton_op` launches it."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # (rows, inner)
    weight,  # (columns, inner)
    bias,  # (columns,)
    weight_sum,  # (columns,): sums of the weight's rows, float32
    residual,  # (rows, columns)
    out,  # (rows, columns)
    rows,
    columns,
    inner,  # this and the row strides in units of UNIT elements, so that the compiler knows what divides them
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A tile of act(norm(x) weight^T + bias) + residual. Grid: (tiles,).

    The norm is not applied to x but to the product: with mean m and deviation s of a row, the normalised row times a
    row w of the weight is (x w - m sum(w)) / s. So x goes to the matrix unit as it is.
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
    if NORM:
        # In a loop of its own: the product's loop leaves x in shared memory, where threads may not look at it.
        total = tl.zeros([BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        # In wide steps, since nothing hides their latency.
        part = tl.arange(0, 256)
        row_at = x + (row % rows).to(tl.int64)[:, None] * (x_row * UNIT) + part[None, :]
        for start in range(0, inner, 256):
            wide = tl.load(row_at + start, mask=(start + part < inner)[None, :], other=0.0).to(tl.float32)
            total += tl.sum(wide, 1)
            squares += tl.sum(wide * wide, 1)
    weight_at = weight + (column % columns)[None, :] * inner + k[:, None]
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
        mean = total / inner
        rate = tl.rsqrt(tl.maximum(squares / inner - mean * mean, 0.0) + eps)
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
    tl.store(out + wide_row * (out_row * UNIT) + column[None, :], acc.to(out.dtype.element_ty), mask=there)
