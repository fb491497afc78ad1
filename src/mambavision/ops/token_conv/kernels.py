"""The GPU kernel of the convolutions over tokens, in Triton; `triton_op` launches it."""

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
    """SiLU of each channel's convolution over the tokens of its window. Grid: (tiles of channels, tiles of tokens)."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
