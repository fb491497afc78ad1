"""GPU kernels of the convolutions over tokens, forward and backward, in Triton; `triton_op` launches them."""

import triton
import triton.language as tl

from mambavision.ops.activation_kernels import activated


@triton.jit(do_not_specialize=["rows"])
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
def _in_window(token: tl.constexpr, first, left):
    """Whether a run's token, negative before the run, is one of its window."""
    return first >= -token if token < 0 else left > token


@triton.jit
def token_conv_backward_kernel(
    x,  # (windows, length, CHANNELS)
    weight,  # (CHANNELS, KERNEL)
    grad_y,  # (windows, length, CHANNELS)
    grad_x,  # the same, contiguous
    parts,  # (programs along the tokens, CHANNELS, KERNEL): what each adds to the weight's gradient, float32
    runs,
    length,
    steps,
    CHANNELS: tl.constexpr,
    X_ROW: tl.constexpr,  # strides of rows, known to the compiler: a run's tokens are then offsets in its loads
    GRAD_Y_ROW: tl.constexpr,
    KERNEL: tl.constexpr,
    RUN: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`steps` blocks of runs of RUN tokens of one window. Grid: (groups of blocks x tiles of channels,).

    A thread walks along a run with what it needs again in registers, so that each sum and its derivative are made once;
    twice only at the ends of runs, whose gradients need their neighbours' sums. It loads AHEAD tokens before it uses
    them, and explicitly so: the compiler lets no load pass a store.
    """
    REACH: tl.constexpr = KERNEL // 2
    tiles = tl.cdiv(CHANNELS, BLOCK_N)
    group = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    real = channel < CHANNELS
    factors, sums = (), ()
    for tap in tl.static_range(KERNEL):
        factors = factors + (tl.load(weight + channel * KERNEL + tap, mask=real, other=0.0).to(tl.float32)[None, :],)
        sums = sums + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    runs_each = tl.cdiv(length, RUN)
    for step in range(steps):
        run = (group * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        first = tl.where(run < runs, run % runs_each * RUN, 0)
        left = tl.where(run < runs, length - first, 0)  # tokens from the first to the window's end
        row = ((run // runs_each).to(tl.int64) * length + first)[:, None]
        x_at = x + row * X_ROW + channel[None, :]
        grad_y_at = grad_y + row * GRAD_Y_ROW + channel[None, :]
        grad_x_at = grad_x + row * CHANNELS + channel[None, :]
        tokens, grads, slopes = (), (), ()  # of x, from 2 REACH before the run; of grad_y and of the sums, from REACH
        for place in tl.static_range(RUN + 4 * REACH + AHEAD):
            if place < RUN + 4 * REACH:
                there = _in_window(place - 2 * REACH, first, left)[:, None] & real[None, :]
                tokens = tokens + (tl.load(x_at + (place - 2 * REACH) * X_ROW, mask=there, other=0.0),)
                if place >= 2 * REACH:
                    there = _in_window(place - 3 * REACH, first, left)[:, None] & real[None, :]
                    grads = grads + (tl.load(grad_y_at + (place - 3 * REACH) * GRAD_Y_ROW, mask=there, other=0.0),)
            if place >= 2 * REACH + AHEAD:
                total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for tap in tl.static_range(KERNEL):
                    total += factors[tap] * tokens[place - (2 * REACH + AHEAD) + tap].to(tl.float32)
                # SiLU's derivative. A squared reciprocal root takes half the instructions of a division; the logistic
                # function of -total is a product with no loss where it is small, if the exponential stays finite.
                exponential = tl.exp2(tl.minimum(-1.4426950408889634 * total, 126.0))
                root = tl.math.rsqrt(1.0 + exponential)
                logistic = root * root
                slope = grads[place - (2 * REACH + AHEAD)].to(tl.float32) * logistic
                slope *= 1.0 + total * (exponential * logistic)
                slopes = slopes + (slope,)
                if place >= 3 * REACH + AHEAD and place < RUN + 3 * REACH + AHEAD:  # the run's own
                    new_sums = ()
                    for tap in tl.static_range(KERNEL):
                        factor = tokens[place - (2 * REACH + AHEAD) + tap].to(tl.float32)
                        new_sums = new_sums + (sums[tap] + slope * factor,)
                    sums = new_sums
            if place >= 4 * REACH + AHEAD:
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for tap in tl.static_range(KERNEL):
                    acc += factors[tap] * slopes[place - (2 * REACH + AHEAD) - tap]
                there = _in_window(place - (4 * REACH + AHEAD), first, left)[:, None] & real[None, :]
                at = grad_x_at + (place - (4 * REACH + AHEAD)) * CHANNELS
                tl.store(at, acc.to(grad_x.dtype.element_ty), mask=there)
    for tap in tl.static_range(KERNEL):
        at = parts + (group * CHANNELS + channel) * KERNEL + tap
        tl.store(at, tl.sum(sums[tap], 0), mask=real)
