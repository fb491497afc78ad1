"""The fused 3x3 convolution's GPU kernel, in Triton; `triton_op` launches it."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated
from mambavision.ops.float8.kernels import rounded_to_float8


@triton.jit
def place_of(pixel, height, width):
    """Picture, row and column of pixels that are numbered one after the other; unsigned, which divides faster."""
    width = tl.cast(width, tl.uint32)
    height = tl.cast(height, tl.uint32)
    pixel = pixel.to(tl.uint32)
    line = pixel // width
    picture = line // height
    row = line - picture * height
    return picture.to(tl.int32), row.to(tl.int32), (pixel - line * width).to(tl.int32)


@triton.jit
def taps_within(row, column, height, width):
    """Of pixels of a map, a bit for each of the 3x3 taps around them that is in it, too; row by row.

    Computed once: what a loop asks of each pixel and tap would take more instructions than the products.
    """
    three = (column > 0).to(tl.int32) | 2 | ((column + 1 < width).to(tl.int32) << 2)
    return tl.where(row > 0, three, 0) | (three << 3) | tl.where(row + 1 < height, three << 6, 0)


@triton.jit(do_not_specialize=["batch"])
def conv3x3_kernel(
    x,  # (batch, height, width, CHANNELS)
    weight,  # (columns, 3, 3, CHANNELS), a row of it WEIGHT_ROW elements behind the last, a tap WEIGHT_TAP
    scale,  # (columns,): what the product with 8-bit weights is multiplied by
    bias,  # (columns,)
    residual,  # (batch, out_height, out_width, columns)
    out,  # the same
    copy,  # the same: out once more, in 8 bits
    batch,
    height,
    width,
    out_height,
    out_width,
    x_batch,  # strides of x in units of UNIT elements, so that the compiler knows what divides them
    x_row,
    x_column,
    columns,  # likewise; also the stride from pixel to pixel of `out` and `residual`
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    WEIGHT_TAP: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # columns of a second, narrower tile, or 0: 80 channels are 64 and 16, without a rest
    BLOCK_K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """BLOCK_M output pixels by BLOCK_N + TAIL channels. Grid: (tiles of channels x tiles of pixels,), in this order.

    A product of matrices whose left one is never formed: its inner index runs over taps and channels, and its rows are
    gathered from the map on the way.
    """
    INNER: tl.constexpr = 9 * CHANNELS
    columns = columns * UNIT
    tiles = tl.cdiv(columns, BLOCK_N + TAIL)
    pixel = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = batch * out_height * out_width
    image, row, column = place_of(pixel, out_height, out_width)
    row, column = row * STRIDE, column * STRIDE
    row_step = x_row * UNIT
    column_step = x_column * UNIT
    x_at = x + (image.to(tl.int64) * (x_batch * UNIT) + (row - 1) * row_step + (column - 1) * column_step)
    within = tl.where(pixel < pixels, taps_within(row, column, height, width), 0)  # past the end nothing is read

    k = tl.arange(0, BLOCK_K)
    start_column = tl.program_id(0) % tiles * (BLOCK_N + TAIL)
    column = start_column + tl.arange(0, BLOCK_N)
    columns_of = (column,)  # an entry a tile, as in all that follows
    weights_at = (weight + (column % columns)[None, :] * WEIGHT_ROW,)
    sums = (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    if TAIL > 0:
        rest = start_column + BLOCK_N + tl.arange(0, TAIL)
        columns_of = columns_of + (rest,)
        weights_at = weights_at + (weight + (rest % columns)[None, :] * WEIGHT_ROW,)
        sums = sums + (tl.zeros([BLOCK_M, TAIL], tl.float32),)
    for start in range(0, INNER, BLOCK_K):
        # From the whole index, and not tap by tap, so that the compiler sees which 16 bytes lie side by side.
        tap, channel = (start + k) // CHANNELS, (start + k) % CHANNELS
        there = (within[:, None] >> tl.minimum(tap, 9)[None, :]) & 1
        place = tap // 3 * row_step + tap % 3 * column_step + channel
        a = tl.load(x_at[:, None] + place[None, :], mask=there != 0, other=0.0)
        of_row = start + k if WEIGHT_TAP == CHANNELS else tap * WEIGHT_TAP + channel
        new_sums = ()
        for part in tl.static_range(len(sums)):
            if INNER % BLOCK_K == 0:
                b = tl.load(weights_at[part] + of_row[:, None])
            else:
                b = tl.load(weights_at[part] + of_row[:, None], mask=(start + k < INNER)[:, None], other=0.0)
            new_sums = new_sums + (tl.dot(a, b, sums[part]),)
        sums = new_sums

    offset = pixel.to(tl.int64) * columns
    inside = pixel < pixels
    for part in tl.static_range(len(sums)):
        _finish(
            sums[part], scale, bias, residual, out, copy, offset, inside, columns_of[part], columns,
            HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, HAS_COPY, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _finish(
    acc,
    scale,
    bias,
    residual,
    out,
    copy,
    offset,
    inside,
    column,
    columns,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scale, bias, activation and residual, then the stores."""
    there = inside[:, None] & (column < columns)[None, :]
    at = offset[:, None] + column[None, :]
    if HAS_SCALE:
        acc *= tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, ACTIVATION)
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    if out.dtype.element_ty == tl.float8e4nv:
        tl.store(out + at, rounded_to_float8(acc), mask=there)
    else:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)
    if HAS_COPY:
        tl.store(copy + at, rounded_to_float8(acc), mask=there)


@triton.jit(do_not_specialize=["pixels"])
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
    """The end of a convolution that a library computed. Grid: (blocks of channels x blocks of pixels,)."""
    columns = columns * UNIT
    blocks = tl.cdiv(columns, BLOCK_N)
    pixel = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = pixel.to(tl.int64) * columns
    inside = pixel < pixels
    acc = tl.load(
        out + offset[:, None] + column[None, :], mask=inside[:, None] & (column < columns)[None, :], other=0.0
    )
    acc = acc.to(tl.float32)
    _finish(
        acc, None, bias, residual, out, None, offset, inside, column, columns,
        False, HAS_BIAS, HAS_RESIDUAL, False, ACTIVATION,
    )  # fmt: skip
