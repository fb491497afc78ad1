"""The window attention's GPU kernel, in Triton; `triton_op` launches it."""

import triton
import triton.language as tl


@triton.jit
def window_attention_kernel(
    qkv,  # (windows, length, 3 x heads x WIDTH)
    out,  # (windows, length, heads x WIDTH)
    length,
    heads,
    scale,  # of the scores, over ln 2
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,  # the power of two at or above WIDTH
    BLOCK_L: tl.constexpr,  # at or above the length: all keys of a window at once, so that one softmax is the whole
    BLOCK_Q: tl.constexpr,
):
    """BLOCK_Q queries of one head. Grid: (windows x heads, blocks of queries)."""
    window = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    channels = heads * WIDTH
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_L)
    d = tl.arange(0, BLOCK_D)
    start = qkv + window * length * (3 * channels) + head * WIDTH
    q_at = start + query[:, None] * (3 * channels) + d[None, :]
    k_at = start + channels + key[None, :] * (3 * channels) + d[:, None]
    v_at = start + 2 * channels + key[:, None] * (3 * channels) + d[None, :]
    q = tl.load(q_at, mask=(query < length)[:, None] & (d < WIDTH)[None, :], other=0.0)
    k = tl.load(k_at, mask=(key < length)[None, :] & (d < WIDTH)[:, None], other=0.0)
    v = tl.load(v_at, mask=(key < length)[:, None] & (d < WIDTH)[None, :], other=0.0)
    scores = tl.where((key < length)[None, :], tl.dot(q, k) * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)
    y = tl.dot(weights.to(v.dtype), v) / total[:, None]
    y_at = out + (window * length + query)[:, None] * channels + head * WIDTH + d[None, :]
    tl.store(y_at, y.to(out.dtype.element_ty), mask=(query < length)[:, None] & (d < WIDTH)[None, :])
