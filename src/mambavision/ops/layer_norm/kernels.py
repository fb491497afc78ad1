"""The layer norm's GPU kernel, in Triton; `triton_op` launches it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x,  # (rows, channels)
    share,  # (rows, channels): is first added to x, in place
    offset,  # (channels,)
    out,  # (rows, channels)
    shift,  # (channels,)
    shifted,  # (rows, channels)
    rows,
    channels,
    eps: tl.constexpr,  # not a number at run time, which torch.compile would pass as a float64
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """BLOCK_M rows: x += share, out = norm(x + offset), shifted = x + shift. Grid: (blocks of rows,)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    there = (row < rows)[:, None] & (column < channels)[None, :]
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    v = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if HAS_SHARE:
        v += tl.load(share + place, mask=there, other=0.0).to(tl.float32)
        total = v.to(x.dtype.element_ty)
        tl.store(x + place, total, mask=there)
        v = total.to(tl.float32)
    if HAS_SHIFT:
        more = tl.load(shift + column, mask=column < channels, other=0.0).to(tl.float32)
        tl.store(shifted + place, (v + more[None, :]).to(shifted.dtype.element_ty), mask=there)
    if HAS_OFFSET:
        v += tl.load(offset + column, mask=column < channels, other=0.0)[None, :]
    mean = tl.sum(v, 1) / channels
    v = tl.where(there, v - mean[:, None], 0.0)
    rate = tl.rsqrt(tl.sum(v * v, 1) / channels + eps)
    tl.store(out + place, (v * rate[:, None]).to(out.dtype.element_ty), mask=there)
