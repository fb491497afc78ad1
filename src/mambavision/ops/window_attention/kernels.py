"""GPU kernels of the attention inside windows, forward and backward, in Triton; `triton_op` launches them.

They read q, k and v where the projection left them, interleaved and of any width, and write the gradients to the same
places, which spares the copies that general kernels need around them.

Shapes: qkv and its gradient (windows, length, 3, heads, width); out and its gradient (windows, length, heads, width);
logs and means (windows, heads, length). Source: Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.1.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(tensor, first, row_step: tl.constexpr, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """ROWS rows of `tensor` from number `first` on, zeros past the end and past WIDTH; (ROWS, D)."""
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    there = (row < length)[:, None] & (channel < WIDTH)[None, :]
    return tl.load(tensor + row[:, None] * row_step + channel[None, :], mask=there, other=0.0)


@triton.jit
def _store_rows(
    tensor, first, values, row_step: tl.constexpr, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """The inverse of `_rows`."""
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    there = (row < length)[:, None] & (channel < WIDTH)[None, :]
    tl.store(tensor + row[:, None] * row_step + channel[None, :], values.to(tensor.dtype.element_ty), mask=there)


@triton.jit
def attend_kernel(
    qkv,
    out,
    logs,  # log2 of each query's sum of exponentials, float32
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # of a head
    D: tl.constexpr,  # the same, padded
    SCALE: tl.constexpr,  # what the products of queries and keys are multiplied by
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """BLOCK queries of one head, in steps of STEP keys. Grid: (windows x heads, blocks of queries)."""
    INNER: tl.constexpr = HEADS * WIDTH
    RATE: tl.constexpr = SCALE * 1.4426950408889634  # as exp2 takes it
    window = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    q_at = qkv + window * length * (3 * INNER) + head * WIDTH
    first = tl.program_id(1) * BLOCK
    q = _rows(q_at, first, 3 * INNER, length, BLOCK, WIDTH, D)
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, length, STEP):
        k = _rows(q_at + INNER, start, 3 * INNER, length, STEP, WIDTH, D)
        v = _rows(q_at + 2 * INNER, start, 3 * INNER, length, STEP, WIDTH, D)
        real = start + tl.arange(0, STEP) < length
        scores = tl.where(real[None, :], tl.dot(q, tl.trans(k)) * RATE, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
        top = higher
    _store_rows(
        out + window * length * INNER + head * WIDTH, first, acc / total[:, None], INNER, length, BLOCK, WIDTH, D
    )
    query = first + tl.arange(0, BLOCK)
    tl.store(logs + tl.program_id(0).to(tl.int64) * length + query, top + tl.log2(total), mask=query < length)


@triton.jit
def mean_kernel(
    out,
    grad_out,
    means,  # like logs
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each query the gradients of its weights, averaged by the weights. Grid: (windows x heads, blocks of queries).

    That is its output times that output's gradient.
    """
    INNER: tl.constexpr = HEADS * WIDTH
    offset = (tl.program_id(0) // HEADS).to(tl.int64) * length * INNER + tl.program_id(0) % HEADS * WIDTH
    first = tl.program_id(1) * BLOCK
    y = _rows(out + offset, first, INNER, length, BLOCK, WIDTH, D).to(tl.float32)
    g = _rows(grad_out + offset, first, INNER, length, BLOCK, WIDTH, D).to(tl.float32)
    query = first + tl.arange(0, BLOCK)
    tl.store(means + tl.program_id(0).to(tl.int64) * length + query, tl.sum(y * g, 1), mask=query < length)


@triton.jit
def attend_backward_kernel(
    qkv,
    grad_out,
    logs,
    means,
    grad_qkv,
    length,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of BLOCK keys and values, or of BLOCK queries. Grid: (windows x heads, 2 x blocks).

    Each makes the weights anew, so that nothing is summed across programs.
    """
    INNER: tl.constexpr = HEADS * WIDTH
    RATE: tl.constexpr = SCALE * 1.4426950408889634  # as exp2 takes it
    window = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    offset = window * length * INNER + head * WIDTH
    grad_out += offset
    offset += window * length * (2 * INNER)
    q_at = qkv + offset
    grad_at = grad_qkv + offset
    logs += tl.program_id(0).to(tl.int64) * length
    means += tl.program_id(0).to(tl.int64) * length
    first = tl.program_id(1) // 2 * BLOCK
    if tl.program_id(1) % 2 == 0:
        # Keys are rows, so that the weights and their gradients are operands as they come. Rows past the end are
        # neither stored nor read by others.
        k = _rows(q_at + INNER, first, 3 * INNER, length, BLOCK, WIDTH, D)
        v = _rows(q_at + 2 * INNER, first, 3 * INNER, length, BLOCK, WIDTH, D)
        grad_k = tl.zeros([BLOCK, D], tl.float32)
        grad_v = tl.zeros([BLOCK, D], tl.float32)
        for start in range(0, length, STEP):
            q = _rows(q_at, start, 3 * INNER, length, STEP, WIDTH, D)
            g = _rows(grad_out, start, INNER, length, STEP, WIDTH, D)
            query = start + tl.arange(0, STEP)
            log = tl.load(logs + query, mask=query < length, other=0.0)
            mean = tl.load(means + query, mask=query < length, other=0.0)
            weights = tl.exp2(tl.dot(k, tl.trans(q)) * RATE - log[None, :])
            grad_scores = weights * (tl.dot(v, tl.trans(g)) - mean[None, :])
            grad_v = tl.dot(weights.to(g.dtype), g, grad_v)
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
        _store_rows(grad_at + INNER, first, grad_k * SCALE, 3 * INNER, length, BLOCK, WIDTH, D)
        _store_rows(grad_at + 2 * INNER, first, grad_v, 3 * INNER, length, BLOCK, WIDTH, D)
    else:
        q = _rows(q_at, first, 3 * INNER, length, BLOCK, WIDTH, D)
        g = _rows(grad_out, first, INNER, length, BLOCK, WIDTH, D)
        query = first + tl.arange(0, BLOCK)
        log = tl.load(logs + query, mask=query < length, other=0.0)
        mean = tl.load(means + query, mask=query < length, other=0.0)
        grad_q = tl.zeros([BLOCK, D], tl.float32)
        for start in range(0, length, STEP):
            k = _rows(q_at + INNER, start, 3 * INNER, length, STEP, WIDTH, D)
            v = _rows(q_at + 2 * INNER, start, 3 * INNER, length, STEP, WIDTH, D)
            # Past the end the keys are zeros, but an infinite weight times zero is NaN.
            real = start + tl.arange(0, STEP) < length
            weights = tl.where(real[None, :], tl.exp2(tl.dot(q, tl.trans(k)) * RATE - log[:, None]), 0.0)
            grad_scores = weights * (tl.dot(g, tl.trans(v)) - mean[:, None])
            grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q)
        _store_rows(grad_at, first, grad_q * SCALE, 3 * INNER, length, BLOCK, WIDTH, D)
