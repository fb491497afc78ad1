"""The stem's GPU kernels, in Triton; `triton_op` launches them."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated


@triton.jit(do_not_specialize=["batch"])
def stem_kernel(
    x,  # (batch, IN, height, width), any strides
    weight1,  # (MIDDLE, 3, 3, IN)
    bias1,  # (MIDDLE,)
    weight2,  # (columns, 3, 3, MIDDLE)
    bias2,  # (columns,)
    out,  # (batch, out_height, out_width, columns)
    batch,
    height,
    width,
    mid_height,
    mid_width,
    out_height,
    out_width,
    columns,
    x_batch,
    x_colour,
    x_row,
    x_column,
    out_column,  # stride from pixel to pixel in units of UNIT elements
    UNIT: tl.constexpr,
    IN: tl.constexpr,
    PATCH: tl.constexpr,  # the power of two at or above 9 IN
    MIDDLE: tl.constexpr,
    STRIDE1: tl.constexpr,
    STRIDE2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Both convolutions, each with ReLU, for BLOCK_M pixels. Grid: (tiles of channels, tiles of pixels).

    The map between the two is not stored: each of the nine taps of the second convolution makes what it needs of it
    anew, 9 / 4 times the work of the first. That spares a launch, which counts where there is little to do.
    """
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = batch * out_height * out_width
    image = pixel // (out_height * out_width)
    top = pixel // out_width % out_height * STRIDE2 - 1
    left = pixel % out_width * STRIDE2 - 1
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    part = tl.arange(0, PATCH)
    colour = part % IN  # (row, column, colour) of the patch, as the weights lie
    part_row = part // (3 * IN) - 1
    part_column = part // IN % 3 - 1
    middle = tl.arange(0, MIDDLE)
    first = tl.load(weight1 + middle[None, :] * (9 * IN) + part[:, None], mask=(part < 9 * IN)[:, None], other=0.0)
    shift = tl.load(bias1 + middle).to(tl.float32)
    image_at = x + image.to(tl.int64) * x_batch

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(9):
        y = top + tap // 3
        z = left + tap % 3
        inside = (y >= 0) & (y < mid_height) & (z >= 0) & (z < mid_width) & (pixel < pixels)
        # Pixels along the lanes of a warp, since neighbours share cache lines: (PATCH, BLOCK_M).
        row = y[None, :] * STRIDE1 + part_row[:, None]
        col = z[None, :] * STRIDE1 + part_column[:, None]
        there = inside[None, :] & (row >= 0) & (row < height) & (col >= 0) & (col < width) & (part < 9 * IN)[:, None]
        at = image_at[None, :] + (colour[:, None] * x_colour + row * x_row + col * x_column)
        patch = tl.load(at, mask=there, other=0.0).to(first.dtype)
        hidden = tl.dot(tl.trans(patch), first) + shift[None, :]  # (BLOCK_M, MIDDLE)
        hidden = tl.where(inside[:, None], activated(hidden, "relu"), 0.0)
        at = weight2 + (column % columns)[None, :] * (9 * MIDDLE) + tap * MIDDLE + middle[:, None]
        acc = tl.dot(hidden.to(first.dtype), tl.load(at), acc)

    acc += tl.load(bias2 + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    acc = activated(acc, "relu")
    at = out + pixel.to(tl.int64)[:, None] * (out_column * UNIT) + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(pixel < pixels)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["batch"])
def first_conv_kernel(
    x,  # (batch, IN, height, width), any strides
    weight,  # (MIDDLE, 3, 3, IN)
    bias,  # (MIDDLE,)
    out,  # (batch, out_height, out_width, MIDDLE)
    batch,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_colour,
    x_row,
    x_column,
    IN: tl.constexpr,
    PATCH: tl.constexpr,
    MIDDLE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The first convolution with ReLU alone, for BLOCK_M pixels. Grid: (tiles of pixels,)."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = batch * out_height * out_width
    image = pixel // (out_height * out_width)
    part = tl.arange(0, PATCH)
    colour = part % IN
    row = (pixel // out_width % out_height * STRIDE)[None, :] + (part // (3 * IN) - 1)[:, None]
    column = (pixel % out_width * STRIDE)[None, :] + (part // IN % 3 - 1)[:, None]
    there = (pixel < pixels)[None, :] & (part < 9 * IN)[:, None]
    there = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = (x + image.to(tl.int64) * x_batch)[None, :] + (colour[:, None] * x_colour + row * x_row + column * x_column)
    middle = tl.arange(0, MIDDLE)
    first = tl.load(weight + middle[None, :] * (9 * IN) + part[:, None], mask=(part < 9 * IN)[:, None], other=0.0)
    patch = tl.load(at, mask=there, other=0.0).to(first.dtype)  # (PATCH, BLOCK_M)
    hidden = tl.dot(tl.trans(patch), first) + tl.load(bias + middle).to(tl.float32)[None, :]
    hidden = activated(hidden, "relu").to(out.dtype.element_ty)
    tl.store(out + pixel.to(tl.int64)[:, None] * MIDDLE + middle[None, :], hidden, mask=(pixel < pixels)[:, None])
