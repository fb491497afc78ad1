"""The stem's GPU kernels, in Triton; `triton_op` launches them."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated
from mambavision.ops.conv3x3.kernels import place_of, taps_within


@triton.jit
def _patches(
    centre,  # (pixels,), as all here but offset and tap
    offset,  # (PATCH,): from the centre
    tap,  # (PATCH,)
    row,
    column,
    inside,
    height,
    width,
):
    """What lies around pixels, (pixels, PATCH), with zeros beyond the picture and where a pixel is not `inside`.

    Triton lays the first dimension along the lanes of a warp where it knows of no neighbours in memory: pixels share
    cache lines.
    """
    within = tl.where(inside, taps_within(row, column, height, width), 0)
    there = (within[:, None] >> tap[None, :]) & 1
    return tl.load(centre[:, None] + offset[None, :], mask=there != 0, other=0.0)


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
    image, top, left = place_of(pixel, out_height, out_width)
    top, left = top * STRIDE2 - 1, left * STRIDE2 - 1
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)

    part = tl.arange(0, PATCH)  # (row, column, colour) of the patch, as the weights lie
    tap = part // IN
    offset = part % IN * x_colour + (tap // 3 - 1) * x_row + (tap % 3 - 1) * x_column
    middle = tl.arange(0, MIDDLE)
    first = tl.load(weight1 + middle[None, :] * (9 * IN) + part[:, None], mask=(part < 9 * IN)[:, None], other=0.0)
    shift = tl.load(bias1 + middle).to(tl.float32)
    image_at = x + image.to(tl.int64) * x_batch

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for second in range(9):  # taps
        y = top + second // 3
        z = left + second % 3
        inside = (y >= 0) & (y < mid_height) & (z >= 0) & (z < mid_width) & (pixel < pixels)
        row, col = y * STRIDE1, z * STRIDE1
        patch = _patches(image_at + (row * x_row + col * x_column), offset, tap, row, col, inside, height, width)
        hidden = tl.dot(patch.to(first.dtype), first) + shift[None, :]  # (BLOCK_M, MIDDLE)
        hidden = tl.where(inside[:, None], activated(hidden, "relu"), 0.0)
        at = weight2 + (column % columns)[None, :] * (9 * MIDDLE) + second * MIDDLE + middle[:, None]
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
    image, row, column = place_of(pixel, out_height, out_width)
    row, column = row * STRIDE, column * STRIDE
    part = tl.arange(0, PATCH)
    tap = part // IN
    offset = part % IN * x_colour + (tap // 3 - 1) * x_row + (tap % 3 - 1) * x_column
    at = x + image.to(tl.int64) * x_batch + (row * x_row + column * x_column)
    middle = tl.arange(0, MIDDLE)
    first = tl.load(weight + middle[None, :] * (9 * IN) + part[:, None], mask=(part < 9 * IN)[:, None], other=0.0)
    patch = _patches(at, offset, tap, row, column, pixel < pixels, height, width).to(first.dtype)
    hidden = tl.dot(patch, first) + tl.load(bias + middle).to(tl.float32)[None, :]
    hidden = activated(hidden, "relu").to(out.dtype.element_ty)
    tl.store(out + pixel.to(tl.int64)[:, None] * MIDDLE + middle[None, :], hidden, mask=(pixel < pixels)[:, None])
