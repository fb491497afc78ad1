"""The fused 3x3 convolution's GPU kernel, in Triton; `triton_op` launches it."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated


@triton.jit
def conv3x3_kernel(
    x,  # (batch, height, width, CHANNELS)
    weight,  # (columns, 3, 3, CHANNELS)
    bias,  # (columns,)
    residual,  # (batch, out_height, out_width, columns)
    out,  # the same
    batch,
    height,
    width,
    out_height,
    out_width,
    columns,
    x_batch,  # strides of x in units of UNIT elements, so that the compiler knows what divides them
    x_row,
    x_column,
    out_column,  # stride from pixel to pixel of `out` and `residual`, likewise
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # columns of a second, narrower tile, or 0: 80 channels are 64 and 16, without a rest
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """BLOCK_M output pixels by BLOCK_N + TAIL channels. Grid: (tiles of channels, tiles of pixels).

    A product of matrices whose left one is never formed: its inner index runs over taps and channels, and its rows are
    gathered from the map on the way.
    """
    INNER: tl.constexpr = 9 * CHANNELS
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = batch * out_height * out_width
    image = pixel // (out_height * out_width)
    top = pixel // out_width % out_height * STRIDE - 1
    left = pixel % out_width * STRIDE - 1
    row_step = x_row * UNIT
    column_step = x_column * UNIT
    x_at = x + (image.to(tl.int64) * (x_batch * UNIT) + top * row_step + left * column_step)
    top = tl.where(pixel < pixels, top, -4)  # past the end nothing is read

    k = tl.arange(0, BLOCK_K)
    first = tl.program_id(0) * (BLOCK_N + TAIL)
    column = first + tl.arange(0, BLOCK_N)
    weight_at = weight + (column % columns)[None, :] * INNER + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TAIL > 0:
        tail_column = first + BLOCK_N + tl.arange(0, TAIL)
        tail_at = weight + (tail_column % columns)[None, :] * INNER + k[:, None]
        tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    for start in range(0, INNER, BLOCK_K):
        # From the whole index, and not tap by tap, so that the compiler sees which 16 bytes lie side by side.
        tap = (start + k) // CHANNELS
        y = top[:, None] + (tap // 3)[None, :]
        z = left[:, None] + (tap % 3)[None, :]
        there = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (tap < 9)[None, :]
        place = tap // 3 * row_step + tap % 3 * column_step + (start + k) % CHANNELS
        a = tl.load(x_at[:, None] + place[None, :], mask=there, other=0.0)
        if INNER % BLOCK_K == 0:
            b = tl.load(weight_at)
        else:
            b = tl.load(weight_at, mask=(start + k < INNER)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
        weight_at += BLOCK_K
        if TAIL > 0:
            if INNER % BLOCK_K == 0:
                b = tl.load(tail_at)
            else:
                b = tl.load(tail_at, mask=(start + k < INNER)[:, None], other=0.0)
            tail = tl.dot(a, b, tail)
            tail_at += BLOCK_K

    offset = pixel.to(tl.int64) * (out_column * UNIT)
    inside = pixel < pixels
    _finish(acc, bias, residual, out, offset, inside, column, columns, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
    if TAIL > 0:
        _finish(tail, bias, residual, out, offset, inside, tail_column, columns, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)


@triton.jit
def _finish(
    acc,
    bias,
    residual,
    out,
    offset,
    inside,
    column,
    columns,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Bias, activation and residual, then the store."""
    there = inside[:, None] & (column < columns)[None, :]
    at = offset[:, None] + column[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION)
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def finish_kernel(
    out,  # (pixels, columns): a product, replaced by what becomes of it
    bias,
    residual,  # (pixels, columns)
    pixels,
    columns,  # in units of UNIT elements, so that the compiler knows what divides it
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The end of a convolution that a library computed. Grid: (blocks of channels, blocks of pixels)."""
    columns = columns * UNIT
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = pixel.to(tl.int64) * columns
    inside = pixel < pixels
    acc = tl.load(
        out + offset[:, None] + column[None, :], mask=inside[:, None] & (column < columns)[None, :], other=0.0
    )
    acc = acc.to(tl.float32)
    _finish(acc, bias, residual, out, offset, inside, column, columns, HAS_BIAS, HAS_RESIDUAL, ACTIVATION)
