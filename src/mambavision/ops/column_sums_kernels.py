"""The kernel of `column_sums`, in Triton."""

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(
    parts,  # (count, columns), float32
    sums,  # (columns,), float32
    count,
    columns,  # in units of UNIT elements, so that the compiler knows what divides it
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of BLOCK_N columns. Grid: (blocks of columns,)."""
    columns = columns * UNIT
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        there = (part < count)[:, None] & (column < columns)[None, :]
        total += tl.load(parts + part[:, None] * columns + column[None, :], mask=there, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < columns)
