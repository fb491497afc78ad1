"""GPU kernels of batch norm by the batch's statistics, forward and backward, in Triton; `triton_op` launches them.

A map is seen as (rows, columns) with the channels of FOLD neighbouring pixels in a row, so that tiles of 128 columns
fit 80 or 160 channels without idle threads; a column's channel is its number modulo the channels.
"""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated, slope


@triton.jit
def _tile(COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's group of rows and its columns. Grid: (groups x tiles of columns,)."""
    tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return group, column


@triton.jit
def _scales(scale, row, rows, picture_rows, HAS_SCALE: tl.constexpr):
    """What the rows are multiplied with, float32."""
    if HAS_SCALE:
        return tl.load(scale + row // picture_rows, mask=row < rows, other=0.0).to(tl.float32)
    return tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def _part(partial, part, channel, CHANNELS: tl.constexpr, FOLD: tl.constexpr):
    """Where the first number of a channel is in (groups, 2, FOLD, channels), of parts counted over groups and FOLD."""
    return partial + (part // FOLD * 2 * FOLD + part % FOLD)[:, None] * CHANNELS + channel[None, :]


@triton.jit
def statistics_kernel(
    x,  # (rows, COLUMNS)
    partial,  # (groups, 2, COLUMNS): mean and sum of squared deviations of a group's rows, float32
    rows,
    steps,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Statistics of `steps` blocks of rows, of each column. Grid: see `_tile`.

    Deviations are taken from the group's first row, so that a large mean costs no digits.
    """
    group, column = _tile(COLUMNS, BLOCK_N)
    real = column < COLUMNS
    first = group * steps * BLOCK_M
    shift = tl.load(x + first.to(tl.int64) * COLUMNS + column, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        row = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        there = (row < rows)[:, None] & real[None, :]
        v = tl.load(x + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=there, other=0.0).to(tl.float32)
        v = tl.where(there, v - shift[None, :], 0.0)
        total += v
        squares += v * v
    count = tl.minimum(rows - first, steps * BLOCK_M) * 1.0
    mean = tl.sum(total, 0) / count
    at = partial + group.to(tl.int64) * (2 * COLUMNS) + column
    tl.store(at, mean + shift, mask=real)
    tl.store(at + COLUMNS, tl.maximum(tl.sum(squares, 0) - count * mean * mean, 0.0), mask=real)


@triton.jit
def merge_statistics_kernel(
    partial,  # (groups, 2, FOLD, channels)
    mean,  # (channels,)
    variance,
    rows,
    groups,
    group_rows,
    CHANNELS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of all from those of the groups (Chan, Golub & LeVeque, 1979). Grid: (blocks of channels,)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    parts = groups * FOLD
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        count = tl.minimum(rows - part // FOLD * group_rows, group_rows) * 1.0
        at = _part(partial, part, channel, CHANNELS, FOLD)
        total += tl.load(at, mask=(part < parts)[:, None] & real[None, :], other=0.0) * count[:, None]
    values = rows * (1.0 * FOLD)
    average = tl.sum(total, 0) / values
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        count = tl.minimum(rows - part // FOLD * group_rows, group_rows) * 1.0
        at = _part(partial, part, channel, CHANNELS, FOLD)
        there = (part < parts)[:, None] & real[None, :]
        away = tl.load(at, mask=there, other=0.0) - average[None, :]
        squares = tl.load(at + FOLD * CHANNELS, mask=there, other=0.0)
        total += tl.where(there, squares + away * away * count[:, None], 0.0)
    tl.store(mean + channel, average, mask=real)
    tl.store(variance + channel, tl.sum(total, 0) / values, mask=real)


@triton.jit
def apply_kernel(
    x,  # (rows, COLUMNS)
    weight,  # (channels,), as the next three
    bias,
    mean,
    variance,
    scale,  # (pictures,)
    residual,  # (rows, COLUMNS)
    out,  # (rows, COLUMNS)
    rows,
    picture_rows,
    eps: tl.constexpr,  # not a number at run time, which torch.compile would pass as a float64
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """act((x - mean) rate weight + bias) scale + residual. Grid: see `_tile`, a block of rows a group."""
    group, column = _tile(COLUMNS, BLOCK_N)
    real = column < COLUMNS
    channel = column % CHANNELS
    row = group * BLOCK_M + tl.arange(0, BLOCK_M)
    there = (row < rows)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.load(variance + channel) + eps) * tl.load(weight + channel).to(tl.float32)
    v = (v - tl.load(mean + channel)[None, :]) * factor[None, :] + tl.load(bias + channel).to(tl.float32)[None, :]
    v = activated(v, ACTIVATION)
    if HAS_SCALE:
        v *= _scales(scale, row, rows, picture_rows, HAS_SCALE)[:, None]
    if HAS_RESIDUAL:
        v += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=there)


@triton.jit
def _before(x, grad_y, at, there, centre, factor, shift, scales, ACTIVATION: tl.constexpr):
    """What x is above the mean, and the gradient of what the activation takes."""
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32) - centre[None, :]
    grad = tl.load(grad_y + at, mask=there, other=0.0).to(tl.float32) * scales[:, None]
    return v, grad * slope(v * factor[None, :] + shift[None, :], ACTIVATION)


@triton.jit
def sums_kernel(
    x,  # (rows, COLUMNS)
    grad_y,  # (rows, COLUMNS)
    weight,  # (channels,), as the next three
    bias,
    mean,
    variance,
    scale,  # (pictures,)
    partial,  # (groups, 2, COLUMNS): sums of the activation's gradient, and of its product with x - mean, float32
    rows,
    steps,
    picture_rows,
    eps: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What the gradients need of `steps` blocks of rows. Grid: see `_tile`."""
    group, column = _tile(COLUMNS, BLOCK_N)
    real = column < COLUMNS
    channel = column % CHANNELS
    centre = tl.load(mean + channel)
    factor = tl.rsqrt(tl.load(variance + channel) + eps) * tl.load(weight + channel).to(tl.float32)
    shift = tl.load(bias + channel).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        row = (group * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        there = (row < rows)[:, None] & real[None, :]
        scales = _scales(scale, row, rows, picture_rows, HAS_SCALE)
        at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        v, grad = _before(x, grad_y, at, there, centre, factor, shift, scales, ACTIVATION)
        total += grad
        product += grad * v
    at = partial + group.to(tl.int64) * (2 * COLUMNS) + column
    tl.store(at, tl.sum(total, 0), mask=real)
    tl.store(at + COLUMNS, tl.sum(product, 0), mask=real)


@triton.jit
def merge_sums_kernel(
    partial,  # (groups, 2, FOLD, channels)
    variance,  # (channels,)
    grad_weight,
    grad_bias,
    groups,
    eps: tl.constexpr,
    CHANNELS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parameters' gradients from the groups' sums. Grid: (blocks of channels,)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    parts = groups * FOLD
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = _part(partial, part, channel, CHANNELS, FOLD)
        there = (part < parts)[:, None] & real[None, :]
        total += tl.load(at, mask=there, other=0.0)
        product += tl.load(at + FOLD * CHANNELS, mask=there, other=0.0)
    rate = tl.rsqrt(tl.load(variance + channel, mask=real, other=1.0) + eps)
    tl.store(grad_bias + channel, tl.sum(total, 0), mask=real)
    tl.store(grad_weight + channel, tl.sum(product, 0) * rate, mask=real)


@triton.jit
def gradient_kernel(
    x,  # (rows, COLUMNS)
    grad_y,  # (rows, COLUMNS)
    weight,  # (channels,), as the next five
    bias,
    mean,
    variance,
    grad_weight,
    grad_bias,
    scale,  # (pictures,)
    grad_x,  # (rows, COLUMNS)
    rows,
    picture_rows,
    values,  # that a channel has
    eps: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The gradient of x, which moves the mean and the variance too. Grid: see `_tile`, a block of rows a group."""
    group, column = _tile(COLUMNS, BLOCK_N)
    real = column < COLUMNS
    channel = column % CHANNELS
    rate = tl.rsqrt(tl.load(variance + channel) + eps)
    factor = rate * tl.load(weight + channel).to(tl.float32)
    by_mean = tl.load(grad_bias + channel) / values
    by_variance = tl.load(grad_weight + channel) * rate / values
    row = group * BLOCK_M + tl.arange(0, BLOCK_M)
    there = (row < rows)[:, None] & real[None, :]
    scales = _scales(scale, row, rows, picture_rows, HAS_SCALE)
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    shift = tl.load(bias + channel).to(tl.float32)
    v, grad = _before(x, grad_y, at, there, tl.load(mean + channel), factor, shift, scales, ACTIVATION)
    grad = (grad - by_mean[None, :] - v * by_variance[None, :]) * factor[None, :]
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=there)
