"""GELU, and its backward with the sums that the bias before it needs, in Triton; `triton_op` launches them."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated, normal_integral


@triton.jit
def gelu_kernel(
    before,  # (count,), of 16 bits an element
    y,  # the same
    count,
    BLOCK: tl.constexpr,
):
    """GELU of each. Grid: (blocks,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(before + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, activated(v, "gelu").to(y.dtype.element_ty), mask=at < count)


@triton.jit
def gelu_backward_kernel(
    grad_y,  # (rows, columns)
    before,  # (rows, columns): the GELU's argument
    grad_before,  # (rows, columns)
    grad_bias,  # (blocks of rows, columns): what each adds, float32
    rows,
    columns,  # in units of UNIT elements, so that the compiler knows what divides it
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass over both. Grid: (blocks of rows x tiles of columns,)."""
    columns = columns * UNIT
    tiles = tl.cdiv(columns, BLOCK_N)
    block = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    v = tl.load(before + at, mask=there, other=0.0).to(tl.float32)
    new = tl.load(grad_y + at, mask=there, other=0.0).to(tl.float32)
    # The normal distribution's integral and v times its density.
    if before.dtype.element_ty == tl.float32:
        integral = 0.5 + 0.5 * tl.erf(0.7071067811865476 * v)
    else:  # nearer than 16 bits tell of all but small results, for half the instructions
        integral = normal_integral(v)
    new *= integral + v * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * v * v))
    tl.store(grad_before + at, new.to(grad_before.dtype.element_ty), mask=there)
    tl.store(grad_bias + block * columns + column, tl.sum(new, 0), mask=column < columns)
