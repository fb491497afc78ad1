"""The products of the MLP that have the GELU behind them, forward and backward, in Triton; `triton_op` launches them.

Apart, the activation costs as much as the product: the hidden layer is what a block has most of.
"""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated, gelu_slope
from mambavision.ops.linear.kernels import product, tile_numbers


@triton.jit
def hidden_kernel(
    x,  # (rows, inner)
    weight,  # (columns, inner)
    bias,  # (columns,)
    before,  # (rows, columns)
    hidden,  # (rows, columns)
    rows,
    columns,  # this and `inner` in units of UNIT elements, so that the compiler knows what divides them
    inner,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """A tile of x weight^T + bias, and of its GELU. Grid: (tiles,)."""
    inner, columns = inner * UNIT, columns * UNIT
    tile_m, tile_n = tile_numbers(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read what another does and are not stored.
    x_at = x + (row % rows).to(tl.int64)[:, None] * inner + k[None, :]
    weight_at = weight + (column % columns)[None, :] * inner + k[:, None]
    acc = product(x_at, weight_at, 1, inner, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(before + at, acc.to(before.dtype.element_ty), mask=there)
    tl.store(hidden + at, activated(acc, "gelu").to(hidden.dtype.element_ty), mask=there)


@triton.jit
def hidden_backward_kernel(
    grad_y,  # (rows, inner)
    weight,  # (inner, columns)
    before,  # (rows, columns)
    grad_before,  # (rows, columns)
    grad_bias,  # (tiles of rows, columns): what each adds, float32
    rows,
    columns,
    inner,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """A tile of grad_y weight times the GELU's slope, and its sums by column. Grid: (tiles,)."""
    inner, columns = inner * UNIT, columns * UNIT
    tile_m, tile_n = tile_numbers(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    grad_y_at = grad_y + (row % rows).to(tl.int64)[:, None] * inner + k[None, :]
    # Where a tile is full, the compiler may know that columns follow each other.
    near = tl.max_contiguous(tl.multiple_of(column % columns, UNIT), UNIT)
    weight_at = weight + near[None, :] + k[:, None] * columns
    acc = product(grad_y_at, weight_at, columns, inner, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    acc *= gelu_slope(tl.load(before + at, mask=there, other=0.0).to(tl.float32))
    tl.store(grad_before + at, acc.to(grad_before.dtype.element_ty), mask=there)
    total = tl.sum(tl.where(there, acc, 0.0), 0)
    tl.store(grad_bias + tile_m * columns + column, total, mask=column < columns)
