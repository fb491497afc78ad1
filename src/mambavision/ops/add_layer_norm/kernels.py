"""GPU kernels of a residual sum and its layer norm, forward and backward, in Triton; `triton_op` launches them."""

import triton
import triton.language as tl


@triton.jit
def add_layer_norm_kernel(
    x,  # (rows, channels)
    branch,  # (rows, channels)
    shift,  # (channels,), as the next
    gamma,
    scale,  # (samples,)
    weight,  # (channels,)
    bias,  # (channels,)
    total,  # (rows, channels)
    out,  # (rows, channels)
    mean,  # (rows,), float32, as the next
    rate,  # (rows,)
    rows,
    sample_rows,
    channels,  # in units of UNIT elements, so that the compiler knows what divides it
    eps: tl.constexpr,  # not a number at run time, which torch.compile would pass as a float64
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """BLOCK_M rows. Grid: (blocks of rows,)."""
    channels = channels * UNIT
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    real = column < channels
    there = (row < rows)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        more = tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            more += tl.load(shift + column, mask=real, other=0.0).to(tl.float32)[None, :]
        if HAS_GAMMA:
            more *= tl.load(gamma + column, mask=real, other=0.0).to(tl.float32)[None, :]
        if HAS_SCALE:
            more *= tl.load(scale + row // sample_rows, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        rounded = (v + more).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=there)
        v = rounded.to(tl.float32)  # what the backward will read
    centre = tl.sum(v, 1) / channels
    v = tl.where(there, v - centre[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(v * v, 1) / channels + eps)
    v *= factor[:, None] * tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    v += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=there)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rate + row, factor, mask=row < rows)


@triton.jit
def add_layer_norm_backward_kernel(
    grad_total,  # (rows, channels): of the sum, but for what comes through the norm
    grad_y,  # (rows, channels)
    total,  # (rows, channels)
    branch,  # (rows, channels)
    gamma,  # (channels,)
    scale,  # (samples,)
    weight,  # (channels,)
    mean,  # (rows,), float32, as the next
    rate,  # (rows,)
    grad_x,  # (rows, channels)
    grad_branch,  # (rows, channels)
    parts,  # (programs, PARTS, channels): added to the gradients of weight and bias and, where there is one, of gamma
    # but for the shift, and of a shift before gamma; float32
    rows,
    sample_rows,
    channels,  # in units of UNIT elements, so that the compiler knows what divides it
    steps,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`steps` blocks of rows, whose sums stay in registers from one to the next. Grid: (groups of blocks,)."""
    channels = channels * UNIT
    column = tl.arange(0, BLOCK_N)
    real = column < channels
    factors = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    layer_scale = tl.full([1, BLOCK_N], 1.0, tl.float32)
    if HAS_GAMMA:
        layer_scale = tl.load(gamma + column, mask=real, other=0.0).to(tl.float32)[None, :]
    # A number for each element, summed over the rows once at the end: across threads only there.
    by_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    by_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    by_gamma = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    by_shift = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        row = (tl.program_id(0) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        there = (row < rows)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        grad = tl.load(grad_y + at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(total + at, mask=there, other=0.0).to(tl.float32)
        factor = tl.load(rate + row, mask=row < rows, other=0.0)[:, None]
        v = (v - tl.load(mean + row, mask=row < rows, other=0.0)[:, None]) * factor  # beyond the row grad is 0
        by_weight += grad * v
        by_bias += grad
        grad *= factors
        along = tl.sum(grad * v, 1) / channels
        grad = (grad - (tl.sum(grad, 1) / channels)[:, None] - v * along[:, None]) * factor
        if HAS_BRANCH:
            grad += tl.load(grad_total + at, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=there)
        if HAS_SCALE:
            grad *= tl.load(scale + row // sample_rows, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        if HAS_SHIFT:
            by_shift += grad
        if HAS_GAMMA:
            by_gamma += grad * tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
            grad *= layer_scale
        if HAS_GAMMA or HAS_SCALE:
            tl.store(grad_branch + at, grad.to(grad_branch.dtype.element_ty), mask=there)
    PARTS: tl.constexpr = 2 + HAS_GAMMA + HAS_SHIFT
    at = parts + tl.program_id(0) * (PARTS * channels) + column
    tl.store(at, tl.sum(by_weight, 0), mask=real)
    tl.store(at + channels, tl.sum(by_bias, 0), mask=real)
    if HAS_GAMMA:
        tl.store(at + 2 * channels, tl.sum(by_gamma, 0), mask=real)
    if HAS_SHIFT:
        tl.store(at + (2 + HAS_GAMMA) * channels, tl.sum(by_shift, 0), mask=real)
