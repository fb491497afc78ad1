"""GPU kernels of the convolutions over tokens, forward and backward, in Triton; `triton_op` launches them."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated


@triton.jit
def token_conv_kernel(
    x,  # (windows x length, channels)
    weight,  # (channels, KERNEL)
    out,  # (windows x length, channels)
    rows,
    length,
    channels,
    x_row,  # row strides in units of UNIT elements, so that the compiler knows what divides them
    out_row,
    UNIT: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """SiLU of each channel's convolution over the tokens of its window. Grid: (tiles,)."""
    tiles = tl.cdiv(channels, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    token = row % length
    there = (row < rows)[:, None] & (channel < channels)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wide_row = row.to(tl.int64)[:, None]
    for tap in tl.static_range(KERNEL):
        near = (token + (tap - KERNEL // 2) >= 0) & (token + (tap - KERNEL // 2) < length)
        at = x + (wide_row + (tap - KERNEL // 2)) * (x_row * UNIT) + channel[None, :]
        factor = tl.load(weight + channel * KERNEL + tap, mask=channel < channels, other=0.0).to(tl.float32)
        acc += tl.load(at, mask=there & near[:, None], other=0.0).to(tl.float32) * factor[None, :]
    acc = activated(acc, "silu")
    tl.store(out + wide_row * (out_row * UNIT) + channel[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def token_conv_backward_kernel(
    x,  # (windows x length, channels)
    weight,  # (channels, KERNEL)
    grad_y,  # (windows x length, channels)
    grad_x,  # the same
    grad_weight,  # (programs along the tokens, channels, KERNEL): what each adds, float32
    rows,
    length,
    channels,
    steps,
    x_row,  # row strides in units of UNIT elements, so that the compiler knows what divides them
    grad_y_row,
    grad_x_row,
    UNIT: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`steps` blocks of tokens. Grid: (groups of blocks x tiles of channels,).

    A token's gradient needs those of its neighbours' sums, which are made anew from their own neighbours: cheaper than
    a pass through memory.
    """
    REACH: tl.constexpr = KERNEL // 2
    tiles = tl.cdiv(channels, BLOCK_N)
    group = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    real = channel < channels
    factors, sums = (), ()
    for tap in tl.static_range(KERNEL):
        factors = factors + (tl.load(weight + channel * KERNEL + tap, mask=real, other=0.0).to(tl.float32)[None, :],)
        sums = sums + (tl.zeros([BLOCK_N], tl.float32),)
    for step in range(steps):
        row = (group * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        token = row % length
        there = (row < rows)[:, None] & real[None, :]
        x_at = x + row.to(tl.int64)[:, None] * (x_row * UNIT) + channel[None, :]
        grad_y_at = grad_y + row.to(tl.int64)[:, None] * (grad_y_row * UNIT) + channel[None, :]
        tokens = ()  # from 2 REACH before to as many behind
        for place in tl.static_range(4 * REACH + 1):
            near = (token + (place - 2 * REACH) >= 0) & (token + (place - 2 * REACH) < length)
            shifted = tl.load(x_at + (place - 2 * REACH) * (x_row * UNIT), mask=there & near[:, None], other=0.0)
            tokens = tokens + (shifted.to(tl.float32),)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        new_sums = ()
        for place in tl.static_range(KERNEL):  # of the neighbour whose sum is differentiated
            near = (token + (place - REACH) >= 0) & (token + (place - REACH) < length)
            shift = (place - REACH) * (grad_y_row * UNIT)
            grad = tl.load(grad_y_at + shift, mask=there & near[:, None], other=0.0).to(tl.float32)
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for tap in tl.static_range(KERNEL):
                total += factors[tap] * tokens[place + tap]
            logistic = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * total))
            grad *= logistic * (1.0 + total * (1.0 - logistic))  # the derivative of SiLU
            acc += factors[KERNEL - 1 - place] * grad
            if place == REACH:  # the token itself
                for tap in tl.static_range(KERNEL):
                    new_sums = new_sums + (sums[tap] + tl.sum(grad * tokens[REACH + tap], 0),)
        sums = new_sums
        at = grad_x + row.to(tl.int64)[:, None] * (grad_x_row * UNIT) + channel[None, :]
        tl.store(at, acc.to(grad_x.dtype.element_ty), mask=there)
    for tap in tl.static_range(KERNEL):
        at = grad_weight + (group * channels + channel) * KERNEL + tap
        tl.store(at, sums[tap], mask=real)
